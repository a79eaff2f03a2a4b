// What the caller of a product passes beside the matrices.
#pragma once
#include "cpu/vector/indices.h"

namespace {

// D of C = A B + D: rows of stride ld. ld = 0: the same row for all; data null: zeros.
template <class C>
struct Addend {
  const C* data;
  int64_t ld;
};

// Other work that a tile product does while its instructions are in flight: run(context, part,
// parts) is called now and then and advances that work to part / parts. The caller does what is
// left after the product, which is all of it where products have no tiles.
struct OverlappedWork {
  void (*run)(void* context, int64_t part, int64_t parts) = nullptr;
  void* context = nullptr;
};

}  // namespace
