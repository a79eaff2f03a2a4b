// The packed form of the right factor B [K, N] of a product.
//
// B is cut into panels of kColumns columns, one after the other. A panel is [K][its columns rounded
// up to a vector], with zeros after the last column; K counts operands. The planes of an operand
// (operand.h) follow each other in pieces of what a tile holds.
#pragma once
#include "cpu/product/operand.h"

namespace {

template <class X>
struct Panels {
  static constexpr int kWidth = Lanes<X>::kWidth;
  static constexpr int kVectors = kTiled<X> ? 1 : kVectorRegisters == 32 ? 4 : 3;
  static constexpr int kColumns = kVectors * kWidth;

  static constexpr int64_t padded(int64_t n) { return (n + kWidth - 1) / kWidth * kWidth; }
  static constexpr int64_t size(int64_t k, int64_t n) { return operands<X>(k) * padded(n); }
  // The row of a panel that holds the k-th operands of a plane.
  static constexpr int64_t row(int64_t k, int plane) {
    constexpr int kTileDepth = kStep<X> / kDepth<X>;
    return kPlanes<X> == 1 ? k
                           : (k / kTileDepth * kPlanes<X> + plane) * kTileDepth + k % kTileDepth;
  }
};

// A range of columns.
struct Columns {
  int64_t begin, end;
  FUSEDRNN_INLINE int64_t count() const { return end - begin; }
};
// Part `part` of `parts` of N columns, whole panels each.
template <class X>
FUSEDRNN_INLINE Columns share(int64_t N, int64_t part, int64_t parts) {
  const int64_t panels = (N + Panels<X>::kColumns - 1) / Panels<X>::kColumns;
  auto start = [&](int64_t i) { return min(N, panels * i / parts * Panels<X>::kColumns); };
  return {start(part), start(part + 1)};
}

// Transposes a w x w block: lane j of out[i] is lane i of rows[j], which are overwritten. Each of
// log2(w) rounds interleaves row i with row i + w/2.
template <class X, int... I>
FUSEDRNN_INLINE void transpose_rows(Vec<X>* out, Vec<X>* rows, Indices<I...>) {
  constexpr int w = sizeof...(I);
#pragma GCC unroll 4
  for (int round = 1; round < w; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < w / 2; i++) {
      out[2 * i] = shuffle<(I / 2 + I % 2 * w)...>(rows[i], rows[i + w / 2]);
      out[2 * i + 1] = shuffle<(I / 2 + w / 2 + I % 2 * w)...>(rows[i], rows[i + w / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < w; i++) rows[i] = out[i];
  }
}
// The same for operands: row(i) returns all planes.
template <class X, class Row, int... I>
FUSEDRNN_INLINE void transpose_block(Vec<X> (*out)[sizeof...(I)], Row row, Indices<I...> all) {
  constexpr int w = sizeof...(I);
  Vec<X> rows[kPlanes<X>][w];
#pragma GCC unroll 16
  for (int i = 0; i < w; i++) {
    const Operands<X> o = row(i);
    for (int p = 0; p < kPlanes<X>; p++) rows[p][i] = o.plane[p];
  }
  for (int p = 0; p < kPlanes<X>; p++) transpose_rows<X>(out[p], rows[p], all);
}

// Packs columns [n0, n1) (n0 a multiple of a panel) of B[k, n] = src[k * ld + n].
template <class X, class S>
void pack_panels(X* dst, const S* src, int64_t K, int64_t ld, int64_t n0, int64_t n1) {
  using P = Panels<X>;
  for (int64_t n = n0; n < n1; n += P::kColumns) {
    const int64_t cols = min(n1 - n, P::kColumns), width = P::padded(cols);
    X* const panel = dst + n * operands<X>(K);
    auto row = [&](int64_t k, int64_t j) {
      return k < K ? load(src + k * ld + n + j, cols - j) : Vec<Compute<X>>{};
    };
    for (int64_t k = 0; k < operands<X>(K) / kPlanes<X>; k++)
      for (int64_t j = 0; j < cols; j += P::kWidth) {
        const int64_t first = k * kDepth<X>;
        const Operands<X> both =
            operand<X>(row(first, j), kDepth<X> > 1 ? row(first + 1, j) : Vec<Compute<X>>{});
        for (int p = 0; p < kPlanes<X>; p++) store(panel + P::row(k, p) * width + j, both.plane[p]);
      }
  }
}

// Packs vectors of columns: lane j of vector v is row first_row(v) + j of src, which holds K values
// and has stride ld. Lanes from lanes(v) on are 0. Blocks are prefetched, because the
// hardware's prefetcher does not follow so many short rows.
template <class X, class S, class FirstRow, class Lanes_>
void pack_vectors(X* dst, const S* src, int64_t K, int64_t ld, int64_t vectors, FirstRow first_row,
                  Lanes_ lanes) {
  using P = Panels<X>;
  constexpr int w = P::kWidth;
  constexpr int64_t kDeep = w * kDepth<X>, kAhead = 4 * kDeep;
  for (int64_t v = 0; v < vectors; v++) {
    const int64_t in_panel = v % P::kVectors, panel = v - in_panel;
    const int64_t width = min(vectors - panel, P::kVectors) * w;
    X* out = dst + panel * w * operands<X>(K) + in_panel * w;
    const S* row = src + first_row(v) * ld;
    const S* const next = src + first_row(min(v + 1, vectors - 1)) * ld;
    const int64_t n = lanes(v);
    Vec<X> block[kPlanes<X>][w];
    for (int64_t left = K; left > 0; left -= kDeep, row += kDeep) {
      const S* const later = left > kAhead ? row + kAhead : next + (kAhead - left);
#pragma GCC unroll 16
      for (int i = 0; i < w; i++) __builtin_prefetch(later + i * ld);
      if (n >= w && left >= kDeep) {
        transpose_block<X>(
            block, [&](int i) { return load_operands<X>(row + i * ld, kDeep); }, FirstIndices<w>{});
      } else {
        transpose_block<X>(
            block,
            [&](int i) { return i < n ? load_operands<X>(row + i * ld, left) : Operands<X>{}; },
            FirstIndices<w>{});
      }
      for (int p = 0; p < kPlanes<X>; p++)
        for (int64_t i = 0; i < w && i < operands<X>(left) / kPlanes<X>; i++, out += width)
          store(out, block[p][i]);
    }
  }
}

}  // namespace
