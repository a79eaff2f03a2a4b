// Matrix product C (+)= A B on packed panels, the one product that everything here is made of.
//
// B [K, N] is packed into panels of kPanel columns: panel after panel, each [K][its columns rounded
// up to a vector], zeros behind the last column. One panel and kRows rows of A are multiplied in
// registers: kRows * kPanelVectors accumulators, one row of the panel and one element of A at a time.
// Every element of C is the same chains of multiply-adds whatever the tiling of rows: results do
// not depend on how rows are split over threads.
#pragma once
#include "cpu/simd.h"

namespace {

template <class C>
struct Panels {
  static constexpr int kWidth = Lanes<C>::kWidth;
  static constexpr int kVectors = kVectorRegisters == 32 ? 4 : 2;
  static constexpr int kColumns = kVectors * kWidth;

  static constexpr int64_t padded(int64_t n) { return (n + kWidth - 1) / kWidth * kWidth; }
  static constexpr int64_t size(int64_t k, int64_t n) { return k * padded(n); }
};
constexpr int kRows = 6;

// Packs columns [n0, n1) (n0 a multiple of a panel) of B[k, n] = src[k * sk + n * sn], one stride 1.
template <class C, class S>
void pack_panels(C* dst, const S* src, int64_t K, int64_t sk, int64_t sn, int64_t n0, int64_t n1) {
  using P = Panels<C>;
  for (int64_t n = n0; n < n1; n += P::kColumns) {
    const int64_t cols = n1 - n < P::kColumns ? n1 - n : P::kColumns, width = P::padded(cols);
    C* panel = dst + n * K;
    if (sn == 1) {
      for (int64_t k = 0; k < K; k++) {
        const S* row = src + k * sk + n;
        for (int64_t j = 0; j < width; j += P::kWidth)
          store(panel + k * width + j, load(row + j, cols - j));
      }
    } else {
      constexpr int64_t kBlock = 16;  // a block's lines stay in the first cache while it is turned
      for (int64_t k0 = 0; k0 < K; k0 += kBlock) {
        const int64_t k1 = k0 + kBlock < K ? k0 + kBlock : K;
        for (int64_t j = 0; j < cols; j++) {
          const S* column = src + (n + j) * sn;
          for (int64_t k = k0; k < k1; k++) panel[k * width + j] = to_compute(column[k * sk]);
        }
        for (int64_t j = cols; j < width; j++)
          for (int64_t k = k0; k < k1; k++) panel[k * width + j] = 0;
      }
    }
  }
}

// R rows of A times one panel of V vectors. A[r, k] = a[r * ar + k * ak]; rows of C hold `cols`.
// A narrow panel leaves registers free: they take every second (fourth) k, which hides the latency
// of the additions and halves the rounding.
template <class C, int R, int V>
__attribute__((noinline)) void multiply(int64_t K, const C* a, int64_t ar, int64_t ak, const C* panel,
                                        C* c, int64_t ldc, int64_t cols, bool accumulate) {
  constexpr int w = Lanes<C>::kWidth, kChains = Panels<C>::kVectors / V;
  Vec<C> acc[R][V] = {}, more[kChains][R][V] = {};  // more[0] is not used
  auto add = [&](Vec<C>(&to)[R][V]) __attribute__((always_inline)) {
    Vec<C> b[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) b[v] = load(panel + v * w);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Vec<C> x = broadcast<C>(a[r * ar]);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) to[r][v] += x * b[v];
    }
    panel += V * w;
    a += ak;
  };
  int64_t k = 0;
  for (; k + kChains <= K; k += kChains) {
    add(acc);
#pragma GCC unroll 8
    for (int chain = 1; chain < kChains; chain++) add(more[chain]);
  }
  for (; k < K; k++) add(acc);
#pragma GCC unroll 8
  for (int chain = 1; chain < kChains; chain++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) acc[r][v] += more[chain][r][v];
  if (cols == V * w) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) {
        C* out = c + r * ldc + v * w;
        store(out, accumulate ? load(out) + acc[r][v] : acc[r][v]);
      }
  } else {
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V && v * w < cols; v++) {
        C* out = c + r * ldc + v * w;
        const int64_t n = cols - v * w;
        store(out, accumulate ? load(out, n) + acc[r][v] : acc[r][v], n);
      }
  }
}

template <class C>
using Multiply = void (*)(int64_t, const C*, int64_t, int64_t, const C*, C*, int64_t, int64_t, bool);

template <class C, int V>
FUSEDRNN_INLINE Multiply<C> multiply_for(int64_t rows) {
  switch (rows) {
    case 1: return multiply<C, 1, V>;
    case 2: return multiply<C, 2, V>;
    case 3: return multiply<C, 3, V>;
    case 4: return multiply<C, 4, V>;
    case 5: return multiply<C, 5, V>;
    default: return multiply<C, 6, V>;
  }
}

template <class C>
FUSEDRNN_INLINE Multiply<C> multiply_for(int64_t rows, int64_t columns) {
  const int64_t vectors = Panels<C>::padded(columns) / Panels<C>::kWidth;
  if constexpr (Panels<C>::kVectors == 4) {
    if (vectors == 3) return multiply_for<C, 3>(rows);
    if (vectors >= 4) return multiply_for<C, 4>(rows);
  }
  return vectors == 1 ? multiply_for<C, 1>(rows) : multiply_for<C, 2>(rows);
}

// Rows of a block so that M rows fall into blocks of nearly equal height.
FUSEDRNN_INLINE int64_t balanced(int64_t M, int64_t most) {
  const int64_t blocks = (M + most - 1) / most;
  return blocks ? (M + blocks - 1) / blocks : 1;
}

// C [M, N] (+)= A [M, K] B, A in rows of stride lda.
template <class C>
void gemm(int64_t M, int64_t N, int64_t K, const C* a, int64_t lda, const C* packed, C* c, int64_t ldc,
          bool accumulate) {
  using P = Panels<C>;
  const int64_t step = balanced(M, kRows);
  for (int64_t n = 0; n < N; n += P::kColumns) {
    const int64_t cols = N - n < P::kColumns ? N - n : P::kColumns;
    for (int64_t m = 0; m < M; m += step) {
      const int64_t rows = M - m < step ? M - m : step;
      multiply_for<C>(rows, cols)(K, a + m * lda, lda, 1, packed + n * K, c + m * ldc + n, ldc, cols,
                                  accumulate);
    }
  }
}

}  // namespace
