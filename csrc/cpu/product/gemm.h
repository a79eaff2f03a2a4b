// The matrix product C = A B + D with a packed B (panels.h), from which every layer is computed.
//
// kRows rows of A and one panel are multiplied in registers: kRows * kVectors accumulators, one row
// of the panel and one element of A at a time. Every element of C is the same chains of
// multiply-adds however rows are cut into blocks, so results do not depend on the threads.
#pragma once
#include "cpu/product/interface.h"
#include "cpu/product/panels.h"
#include "cpu/product/tiles.h"
#include "cpu/product/tiles_float32.h"

namespace {

constexpr int kRows = kVectorRegisters == 32 ? 6 : 4, kFewRows = kRows / 2;
constexpr int kCacheLine = 64;
// Padding of a row of A: rows whose length is a power of two would share cache sets.
template <class X>
constexpr int64_t kRowPad = 16 * kPlanes<X>;
// From one row of A with K values to the next, in operands. Where tiles load 16 rows at a time, a
// plane is an odd number of cache lines.
template <class X>
constexpr int64_t row_stride(int64_t K) {
  const int64_t filled = operands<X>(K);
  const bool odd = kTiled<X> && kDepth<X> == 2 && filled / kRowPad<X> % 2;
  return filled + (odd ? 2 : 1) * kRowPad<X>;
}

// Sums of R rows and V vectors, in chains: narrow panels leave registers free, which sum every
// second (fourth) operand. That hides the latency of additions and halves the rounding error.
template <class X, int V>
constexpr int kChains = Panels<X>::kVectors / V;

template <class V, int N, int R, int W>
FUSEDRNN_INLINE void clear(V (&sums)[N][R][W]) {
#pragma GCC unroll 8
  for (int chain = 0; chain < N; chain++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < W; v++) sums[chain][r][v] = V{};
}
// Adds all chains to the first one.
template <class V, int N, int R, int W>
FUSEDRNN_INLINE void merge(V (&sums)[N][R][W]) {
#pragma GCC unroll 8
  for (int chain = 1; chain < N; chain++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < W; v++) sums[0][r][v] += sums[chain][r][v];
}
// Adds the products of one element of each row of A, `stride` apart, with one row of a panel.
template <class X, int R, int V>
FUSEDRNN_INLINE void add_products(Vec<Compute<X>> (&sums)[R][V], const X* a, int64_t stride,
                                  const X* panel) {
  Vec<X> b[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; v++) b[v] = load(panel + v * Lanes<X>::kWidth);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    const Vec<X> x = broadcast<X>(a[r * stride]);
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) sums[r][v] = multiply_add<X>(x, b[v], sums[r][v]);
  }
}

// A left factor: rows and values of a row are `row` and `k` apart, and blocks of R rows R * block.
template <class X>
struct Left {
  const X* data;
  int64_t row, k, block;
};

// C = A B + D for R rows of A and one panel of V vectors, K operands deep; rows of C hold `cols`.
// The memory from `next` on, which is read after this, is prefetched to L2, a line for each k.
template <class X, int R, int V>
FUSEDRNN_INLINE void multiply_rows(int64_t K, const X* a, int64_t ar, int64_t ak, const X* panel,
                                   Compute<X>* c, int64_t ldc, int64_t cols, Addend<Compute<X>> d,
                                   const void* next) {
  using C = Compute<X>;
  constexpr int w = Lanes<X>::kWidth, kN = kChains<X, V>;
  Vec<C> acc[kN][R][V];
  clear(acc);
  auto add = [&](int chain) __attribute__((always_inline)) {
    add_products<X>(acc[chain], a, ar, panel);
    panel += V * w;
    a += ak;
    if constexpr (R >= 4) {  // fewer rows are bound by loads
      __builtin_prefetch(next, 0, 2);
      next = static_cast<const char*>(next) + kCacheLine;
    }
  };
  int64_t k = 0;
  for (; k + kN <= K; k += kN)
#pragma GCC unroll 8
    for (int chain = 0; chain < kN; chain++) add(chain);
  for (; k < K; k++) add(0);
  merge(acc);
  if (cols == V * w) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++)
        store(c + r * ldc + v * w,
              d.data ? load(d.data + r * d.ld + v * w) + acc[0][r][v] : acc[0][r][v]);
  } else {
    Vec<C> sums[R][V];  // a copy in memory, so that acc itself stays in registers
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) sums[r][v] = acc[0][r][v];
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V && v * w < cols; v++) {
        const int64_t n = cols - v * w;
        store(c + r * ldc + v * w,
              d.data ? load(d.data + r * d.ld + v * w, n) + sums[r][v] : sums[r][v], n);
      }
  }
}

// The same for some blocks of R rows. Each prefetches a share of what follows the panel.
template <class X, int R, int V>
__attribute__((noinline)) void multiply(int64_t blocks, int64_t K, Left<X> a, const X* panel,
                                        Compute<X>* c, int64_t ldc, int64_t cols,
                                        Addend<Compute<X>> d) {
  const X* const next = panel + K * V * Lanes<X>::kWidth;
  for (int64_t i = 0; i < blocks; i++) {
    multiply_rows<X, R, V>(K, a.data, a.row, a.k, panel, c, ldc, cols, d,
                           next + i % V * K * (kCacheLine / sizeof(X)));
    a.data += R * a.block, c += R * ldc;
    if (d.data) d.data += R * d.ld;
  }
}

// The same for few rows and all K operands, in parts of `part` as gemm cuts them. Two parts are
// summed at a time, in the registers that few rows leave free, to hide the latency of additions.
// The sums are those of `multiply`, part by part.
template <class X, int R, int V>
__attribute__((noinline)) void multiply_few(int64_t K, int64_t part, const X* a, int64_t lda,
                                            const X* panel, Compute<X>* c, int64_t ldc,
                                            int64_t cols, Addend<Compute<X>> d) {
  using C = Compute<X>;
  constexpr int w = Lanes<X>::kWidth, kN = kChains<X, V>;
  Vec<C> sums[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++)
      sums[r][v] = d.data && v * w < cols ? load(d.data + r * d.ld + v * w, cols - v * w)
                                          : broadcast<C>(C(-0.));  // keeps the sign of zero
  auto multiply_parts = [&](auto parts, int64_t k0) __attribute__((always_inline)) {
    constexpr int P = parts.value;
    Vec<C> acc[P][kN][R][V];
#pragma GCC unroll 8
    for (int p = 0; p < P; p++) clear(acc[p]);
    auto add = [&](int p, int chain, int64_t k) __attribute__((always_inline)) {
      k += k0 + p * part;
      add_products<X>(acc[p][chain], a + k, lda, panel + k * V * w);
    };
    // The last part may be the shorter one.
    const int64_t last = min(K - k0 - (P - 1) * part, part), first = P > 1 ? part : last;
    int64_t k = 0;
    for (; k + kN <= last; k += kN)
#pragma GCC unroll 8
      for (int chain = 0; chain < kN; chain++)
#pragma GCC unroll 8
        for (int p = 0; p < P; p++) add(p, chain, k + chain);
    for (int64_t rest = k; rest < last; rest++) add(P - 1, 0, rest);
    if constexpr (P > 1) {
      for (; k + kN <= first; k += kN)
#pragma GCC unroll 8
        for (int chain = 0; chain < kN; chain++) add(0, chain, k + chain);
      for (; k < first; k++) add(0, 0, k);
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; p++) {
      merge(acc[p]);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) sums[r][v] += acc[p][0][r][v];
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
using Multiply = void (*)(int64_t, int64_t, Left<X>, const X*, Compute<X>*, int64_t, int64_t,
                          Addend<Compute<X>>);

template <class X, int V, int R = 1>
FUSEDRNN_INLINE Multiply<X> multiply_for(int64_t rows) {
  if constexpr (R < kRows) {
    if (rows > R) return multiply_for<X, V, R + 1>(rows);
  }
  return multiply<X, R, V>;
}
template <class X, int V, int R = 1>
FUSEDRNN_INLINE auto multiply_few_for(int64_t rows) {
  if constexpr (R < kFewRows) {
    if (rows > R) return multiply_few_for<X, V, R + 1>(rows);
  }
  return multiply_few<X, R, V>;
}

// f(Constant<V>) for a panel of V vectors.
template <class X, int V = 1, class F>
FUSEDRNN_INLINE void with_panel(int64_t columns, F f) {
  if constexpr (V < Panels<X>::kVectors) {
    if (columns > V * Panels<X>::kWidth) return with_panel<X, V + 1>(columns, f);
  }
  f(Constant<V>{});
}

// Blocks of nearly equal height, at most kRows: the first `higher` have a row more.
struct RowBlocks {
  int64_t count, rows, higher;

  explicit RowBlocks(int64_t M)
      : count((M + kRows - 1) / kRows), rows(M / max(1, count)), higher(M % max(1, count)) {}
};

// The product of M rows and one panel of V vectors, `part` operands at a time: longer sums lose too
// much to rounding. a(m, rows, k): the blocks of `rows` rows from the m-th row and k-th operand on.
template <class X, int V, class A>
FUSEDRNN_INLINE void multiply_panel(int64_t M, int64_t K, int64_t part, A a, const X* panel,
                                    Compute<X>* c, int64_t ldc, int64_t cols,
                                    Addend<Compute<X>> d) {
  const RowBlocks blocks(M);
  const int64_t m = blocks.higher * (blocks.rows + 1);
  for (int64_t k = 0; k == 0 || k < K; k += part) {
    const int64_t count = min(K - k, part);
    const X* const rows = panel + k * V * Panels<X>::kWidth;
    if (m > 0)
      multiply_for<X, V>(blocks.rows + 1)(blocks.higher, count, a(0, blocks.rows + 1, k), rows, c,
                                          ldc, cols, d);
    multiply_for<X, V>(blocks.rows)(blocks.count - blocks.higher, count, a(m, blocks.rows, k), rows,
                                    c + m * ldc, ldc, cols,
                                    {d.data ? d.data + m * d.ld : nullptr, d.ld});
    d = {c, ldc};
  }
}

// The most operands that are summed before they are added to an element of C. Beside the rounding
// of factors to bfloat16 the error of long sums of pairs is small.
constexpr int64_t kShortSum = 64, kLongSum = 256;
template <class X>
FUSEDRNN_INLINE int64_t longest_sum(bool long_sums) {
  return kDepth<X> == 2 || long_sums ? kLongSum : kShortSum;
}

// C [M, N] = A [M, K] B + D. K counts values; rows of A hold lda operands, those of C ldc values.
// The planes of a row of A lie at equal parts of lda. `longest`: of longest_sum(). The shape's
// height is that of the thread's StepTiles.
template <class X>
void gemm(int64_t M, int64_t N, int64_t K, const X* a, int64_t lda, const X* packed, Compute<X>* c,
          int64_t ldc, Addend<Compute<X>> d, int64_t longest, OverlappedWork work = {},
          TileShape shape = {}) {
  using P = Panels<X>;
  const int64_t depth = operands<X>(K);
  if constexpr (kTiled<X>) {
    tile_product(M, N, depth, a, lda, packed, c, ldc, d, work, shape);
  } else {
    if (M == 0) return;
    const int64_t parts = (depth + longest - 1) / longest;
    const int64_t part = parts ? (depth + parts - 1) / parts : 1;  // without depth C = D
    auto left = [&](int64_t m, int64_t, int64_t k) {
      return Left<X>{a + m * lda + k, lda, 1, lda};
    };
    for (int64_t n = 0; n < N; n += P::kColumns) {
      const int64_t cols = min(N - n, P::kColumns);
      const X* const panel = packed + n * depth;
      const Addend<Compute<X>> addend{d.data ? d.data + n : nullptr, d.ld};
      with_panel<X>(cols, [&](auto vectors) __attribute__((always_inline)) {
        constexpr int V = vectors.value;
        if (M <= kFewRows)
          multiply_few_for<X, V>(M)(depth, part, a, lda, panel, c + n, ldc, cols, addend);
        else
          multiply_panel<X, V>(M, depth, part, left, panel, c + n, ldc, cols, addend);
      });
    }
  }
}

}  // namespace
