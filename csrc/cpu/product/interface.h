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

constexpr int kTileRows = 16;

// How a product of pairs goes through tiles: the rows of a tile of A, and the operands that are
// multiplied at a time. A block of rows of that depth stays in L1 while panels pass. Panels of a
// matrix from beyond L2 are read whole, in the order in which they lie.
struct TileShape {
  int64_t height = kTileRows, depth = 128;

  static FUSEDRNN_INLINE TileShape of(int64_t height, int64_t matrix_bytes) {
    constexpr int64_t kFarBytes = 1 << 20;
    TileShape shape{height};
    if (matrix_bytes > kFarBytes) shape.depth = int64_t(1) << 40;
    return shape;
  }
};

// Other work that a tile product does while its instructions are in flight: run(context, part,
// parts) is called now and then and advances that work to part / parts. The caller does what is
// left after the product, which is all of it where products have no tiles.
struct OverlappedWork {
  void (*run)(void* context, int64_t part, int64_t parts) = nullptr;
  void* context = nullptr;
};

}  // namespace
