// Matrix product C = A B + D on packed panels, the one product that everything here is made of.
//
// B [K, N] is packed into panels of kPanel columns: panel after panel, each [K][its columns rounded
// up to a vector], zeros behind the last column. K counts operands (simd.h); where these have
// planes, the planes of as many as a tile takes lie one behind the other. In rows of A they lie at
// equal parts of the stride. One panel and kRows rows of A are multiplied in registers: kRows *
// kPanelVectors accumulators, one row of the panel and one element of A at a time. Every element of
// C is the same chains of multiply-adds whatever the tiling of rows: results do not depend on how
// rows are split over threads.
#pragma once
#include "cpu/tiles.h"

namespace {

template <class X>
struct Panels {
  static constexpr int kWidth = Lanes<X>::kWidth;
  static constexpr int kVectors = kTiled<X> ? 1 : kVectorRegisters == 32 ? 4 : 2;
  static constexpr int kColumns = kVectors * kWidth;

  static constexpr int64_t padded(int64_t n) { return (n + kWidth - 1) / kWidth * kWidth; }
  static constexpr int64_t size(int64_t k, int64_t n) { return operands<X>(k) * padded(n); }
  // The place of the k-th operand in a panel, in rows of it.
  static constexpr int64_t row(int64_t k, int plane) {
    constexpr int kOfTile = kStep<X> / kDepth<X>;
    return kPlanes<X> == 1 ? k : (k / kOfTile * kPlanes<X> + plane) * kOfTile + k % kOfTile;
  }
};
constexpr int kRows = 6, kFewRows = 3;
constexpr int kCacheLine = 64;

// A w x w block of rows, turned: lane j of out[i] is lane i of rows[j], which are overwritten.
// log2(w) rounds of interleaving row i with row i + w/2.
template <class X, int... I>
FUSEDRNN_INLINE void turn_rows(Vec<X>* out, Vec<X>* rows, Indices<I...>) {
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
// The same of operands: row(i) has all planes.
template <class X, class Row, int... I>
FUSEDRNN_INLINE void turn_block(Vec<X> (*out)[sizeof...(I)], Row row, Indices<I...> all) {
  constexpr int w = sizeof...(I);
  Vec<X> rows[kPlanes<X>][w];
#pragma GCC unroll 16
  for (int i = 0; i < w; i++) {
    const Operands<X> of_row = row(i);
    for (int p = 0; p < kPlanes<X>; p++) rows[p][i] = of_row.plane[p];
  }
  for (int p = 0; p < kPlanes<X>; p++) turn_rows<X>(out[p], rows[p], all);
}

// Packs columns [n0, n1) (n0 a multiple of a panel) of B[k, n] = src[k * ld + n].
template <class X, class S>
void pack_panels(X* dst, const S* src, int64_t K, int64_t ld, int64_t n0, int64_t n1) {
  using P = Panels<X>;
  for (int64_t n = n0; n < n1; n += P::kColumns) {
    const int64_t cols = n1 - n < P::kColumns ? n1 - n : P::kColumns, width = P::padded(cols);
    X* to = dst + n * operands<X>(K);
    auto row = [&](int64_t k, int64_t j) {
      return k < K ? load(src + k * ld + n + j, cols - j) : Vec<Compute<X>>{};
    };
    for (int64_t k = 0; k < operands<X>(K) / kPlanes<X>; k++)
      for (int64_t j = 0; j < cols; j += P::kWidth) {
        const int64_t at = k * kDepth<X>;
        const Operands<X> both =
            operand<X>(row(at, j), kDepth<X> > 1 ? row(at + 1, j) : Vec<Compute<X>>{});
        for (int p = 0; p < kPlanes<X>; p++) store(to + P::row(k, p) * width + j, both.plane[p]);
      }
  }
}

// Packs `vectors` vectors of columns: lane j of vector v is row first_row(v) + j of src, whose rows
// have stride ld and hold K values, for j below lanes(v), and 0 behind.
template <class X, class S, class FirstRow, class Lanes_>
void pack_vectors(X* dst, const S* src, int64_t K, int64_t ld, int64_t vectors, FirstRow first_row,
                  Lanes_ lanes) {
  using P = Panels<X>;
  constexpr int w = P::kWidth;
  for (int64_t v = 0; v < vectors; v++) {
    const int64_t in_panel = v % P::kVectors, panel = v - in_panel;
    const int64_t width = (vectors - panel < P::kVectors ? vectors - panel : P::kVectors) * w;
    X* to = dst + panel * w * operands<X>(K) + in_panel * w;
    const S* from = src + first_row(v) * ld;
    const int64_t n = lanes(v);
    Vec<X> block[kPlanes<X>][w];
    for (int64_t left = K; left > 0; left -= w * kDepth<X>, from += w * kDepth<X>) {
      if (n >= w && left >= w * kDepth<X>) {
        turn_block<X>(
            block, [&](int i) { return load_operands<X>(from + i * ld, w * kDepth<X>); },
            FirstIndices<w>{});
      } else {
        turn_block<X>(
            block,
            [&](int i) { return i < n ? load_operands<X>(from + i * ld, left) : Operands<X>{}; },
            FirstIndices<w>{});
      }
      for (int p = 0; p < kPlanes<X>; p++)
        for (int64_t i = 0; i < w && i < operands<X>(left) / kPlanes<X>; i++, to += width)
          store(to, block[p][i]);
    }
  }
}

// R rows of A times one panel of V vectors, K operands deep. A[r, k] = a[r * ar + k * ak]; rows of
// C hold `cols`. What is read after this, from `ahead` on, is fetched into the second cache on the
// way, a line for each k.
// A narrow panel leaves registers free: they take every second (fourth) k, which hides the latency
// of the additions and halves the rounding.
template <class X, int R, int V>
__attribute__((noinline)) void multiply(int64_t K, const X* a, int64_t ar, int64_t ak,
                                        const X* panel, Compute<X>* c, int64_t ldc, int64_t cols,
                                        Addend<Compute<X>> d, const void* ahead) {
  using C = Compute<X>;
  constexpr int w = Lanes<X>::kWidth, kChains = Panels<X>::kVectors / V;
  Vec<C> acc[kChains][R][V];
#pragma GCC unroll 8
  for (int chain = 0; chain < kChains; chain++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) acc[chain][r][v] = Vec<C>{};
  auto add = [&](int chain) __attribute__((always_inline)) {
    Vec<X> b[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) b[v] = load(panel + v * w);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Vec<X> x = broadcast<X>(a[r * ar]);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) acc[chain][r][v] = multiply_add<X>(x, b[v], acc[chain][r][v]);
    }
    panel += V * w;
    a += ak;
    if constexpr (R >= 4) {  // with fewer rows the loads are what takes time
      __builtin_prefetch(ahead, 0, 2);
      ahead = static_cast<const char*>(ahead) + kCacheLine;
    }
  };
  int64_t k = 0;
  for (; k + kChains <= K; k += kChains)
#pragma GCC unroll 8
    for (int chain = 0; chain < kChains; chain++) add(chain);
  for (; k < K; k++) add(0);
#pragma GCC unroll 8
  for (int chain = 1; chain < kChains; chain++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) acc[0][r][v] += acc[chain][r][v];
  if (cols == V * w) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++)
        store(c + r * ldc + v * w,
              d.at ? load(d.at + r * d.ld + v * w) + acc[0][r][v] : acc[0][r][v]);
  } else {
    Vec<C> sums[R][V];  // in memory, for the loop below: without it all of acc would be
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) sums[r][v] = acc[0][r][v];
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V && v * w < cols; v++) {
        const int64_t n = cols - v * w;
        store(c + r * ldc + v * w,
              d.at ? load(d.at + r * d.ld + v * w, n) + sums[r][v] : sums[r][v], n);
      }
  }
}

// Of few rows all K operands, in parts of `part` as gemm cuts them, two parts at a time: there are
// registers for both, and the latency of additions would be what takes time. Sums are those of
// multiply, part by part.
template <class X, int R, int V>
__attribute__((noinline)) void multiply_few(int64_t K, int64_t part, const X* a, int64_t lda,
                                            const X* panel, Compute<X>* c, int64_t ldc,
                                            int64_t cols, Addend<Compute<X>> d) {
  using C = Compute<X>;
  constexpr int w = Lanes<X>::kWidth, kChains = Panels<X>::kVectors / V;
  Vec<C> sums[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++)
      sums[r][v] = d.at && v * w < cols ? load(d.at + r * d.ld + v * w, cols - v * w)
                                        : broadcast<C>(C(-0.));  // keeps the sign of zero
  auto multiply_parts = [&](auto parts, int64_t k0) __attribute__((always_inline)) {
    constexpr int P = parts.value;
    Vec<C> acc[P][kChains][R][V];
#pragma GCC unroll 8
    for (int p = 0; p < P; p++)
#pragma GCC unroll 8
      for (int chain = 0; chain < kChains; chain++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
          for (int v = 0; v < V; v++) acc[p][chain][r][v] = Vec<C>{};
    auto add = [&](int p, int chain, int64_t k) __attribute__((always_inline)) {
      k += k0 + p * part;
      Vec<X> b[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) b[v] = load(panel + (k * V + v) * w);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const Vec<X> x = broadcast<X>(a[r * lda + k]);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++)
          acc[p][chain][r][v] = multiply_add<X>(x, b[v], acc[p][chain][r][v]);
      }
    };
    // The last part may be the shorter one.
    const int64_t last = K - k0 - (P - 1) * part < part ? K - k0 - (P - 1) * part : part;
    const int64_t first = P > 1 ? part : last;
    int64_t k = 0;
    for (; k + kChains <= last; k += kChains)
#pragma GCC unroll 8
      for (int chain = 0; chain < kChains; chain++)
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) add(p, chain, k + chain);
    for (int64_t rest = k; rest < last; rest++) add(P - 1, 0, rest);
    if constexpr (P > 1) {
      for (; k + kChains <= first; k += kChains)
#pragma GCC unroll 8
        for (int chain = 0; chain < kChains; chain++) add(0, chain, k + chain);
      for (; k < first; k++) add(0, 0, k);
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; p++)
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
#pragma GCC unroll 8
          for (int chain = 1; chain < kChains; chain++) acc[p][0][r][v] += acc[p][chain][r][v];
          sums[r][v] += acc[p][0][r][v];
        }
  };
  int64_t k = 0;
  for (; k + part < K; k += 2 * part) multiply_parts(Constant<2>{}, k);
  if (k < K) multiply_parts(Constant<1>{}, k);
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V && v * w < cols; v++)
      store(c + r * ldc + v * w, sums[r][v], cols - v * w);
}

template <class X>
using Multiply = void (*)(int64_t, const X*, int64_t, int64_t, const X*, Compute<X>*, int64_t,
                          int64_t, Addend<Compute<X>>, const void*);

template <class X, int V>
FUSEDRNN_INLINE Multiply<X> multiply_for(int64_t rows) {
  switch (rows) {
    case 1:
      return multiply<X, 1, V>;
    case 2:
      return multiply<X, 2, V>;
    case 3:
      return multiply<X, 3, V>;
    case 4:
      return multiply<X, 4, V>;
    case 5:
      return multiply<X, 5, V>;
    default:
      return multiply<X, 6, V>;
  }
}

template <class X>
FUSEDRNN_INLINE Multiply<X> multiply_for(int64_t rows, int64_t columns) {
  const int64_t vectors = Panels<X>::padded(columns) / Panels<X>::kWidth;
  if constexpr (Panels<X>::kVectors == 4) {
    if (vectors == 3) return multiply_for<X, 3>(rows);
    if (vectors >= 4) return multiply_for<X, 4>(rows);
  }
  return vectors == 1 ? multiply_for<X, 1>(rows) : multiply_for<X, 2>(rows);
}

template <class X, int V>
FUSEDRNN_INLINE auto multiply_few_for(int64_t rows) {
  return rows == 1   ? multiply_few<X, 1, V>
         : rows == 2 ? multiply_few<X, 2, V>
                     : multiply_few<X, 3, V>;
}
template <class X>
FUSEDRNN_INLINE auto multiply_few_for(int64_t rows, int64_t columns) {
  const int64_t vectors = Panels<X>::padded(columns) / Panels<X>::kWidth;
  if constexpr (Panels<X>::kVectors == 4) {
    if (vectors == 3) return multiply_few_for<X, 3>(rows);
    if (vectors >= 4) return multiply_few_for<X, 4>(rows);
  }
  return vectors == 1 ? multiply_few_for<X, 1>(rows) : multiply_few_for<X, 2>(rows);
}

// Cuts M rows into blocks of at most kRows and nearly equal height: f(first, rows) for each.
template <class F>
FUSEDRNN_INLINE void each_block(int64_t M, F f) {
  if (M == 0) return;
  const int64_t blocks = (M + kRows - 1) / kRows, rows = M / blocks, higher = M % blocks;
  for (int64_t m = 0, i = 0; i < blocks; i++) {
    const int64_t height = rows + (i < higher);
    f(m, height);
    m += height;
  }
}

// Operands that are added before they join the sum of an element: longer sums lose too much to
// rounding, and of a panel no more stays in the first cache beside what it is multiplied with.
constexpr int64_t kLongestSum = 64;

// C [M, N] = A [M, K] B + D, K values deep, A in rows of lda operands, C of stride ldc.
template <class X>
void gemm(int64_t M, int64_t N, int64_t K, const X* a, int64_t lda, const X* packed, Compute<X>* c,
          int64_t ldc, Addend<Compute<X>> d, Meanwhile meanwhile = {}) {
  using P = Panels<X>;
  const int64_t depth = operands<X>(K);
  if constexpr (kTiled<X>) {
    tile_product(M, N, depth, a, lda, packed, c, ldc, d, meanwhile);
  } else {
    for (int64_t n = 0; n < N; n += P::kColumns) {
      const int64_t cols = N - n < P::kColumns ? N - n : P::kColumns;
      const X* const panel = packed + n * depth;
      Addend<Compute<X>> onto{d.at ? d.at + n : nullptr, d.ld};
      const int64_t parts = (depth + kLongestSum - 1) / kLongestSum;
      const int64_t longest = parts ? (depth + parts - 1) / parts : 1;  // of no depth: D alone
      if (M <= kFewRows) {
        if (M > 0)
          multiply_few_for<X>(M, cols)(depth, longest, a, lda, panel, c + n, ldc, cols, onto);
        continue;
      }
      for (int64_t k = 0; k == 0 || k < depth; k += longest) {
        const int64_t part = depth - k < longest ? depth - k : longest;
        each_block(M, [&](int64_t m, int64_t rows) __attribute__((always_inline)) {
          // Each block of rows fetches a share of the next part.
          const int64_t share = m / rows % P::kVectors * part;
          multiply_for<X>(rows, cols)(
              part, a + m * lda + k, lda, 1, panel + k * P::padded(cols), c + m * ldc + n, ldc,
              cols, {onto.at ? onto.at + m * onto.ld : nullptr, onto.ld},
              panel + (k + part) * P::padded(cols) + share * kCacheLine / sizeof(X));
        });
        onto = {c + n, ldc};
      }
    }
  }
}

}  // namespace
