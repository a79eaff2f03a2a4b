// Matrix product C = A B + D on packed panels, the one product that everything here is made of.
//
// B [K, N] is packed into panels of kPanel columns: panel after panel, each [K][its columns rounded
// up to a vector], zeros behind the last column. One panel and kRows rows of A are multiplied in
// registers: kRows * kPanelVectors accumulators, one row of the panel and one element of A at a
// time. Every element of C is the same chains of multiply-adds whatever the tiling of rows: results
// do not depend on how rows are split over threads.
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

// 0, 1, ..., N - 1 as template arguments.
template <int... I>
struct Indices {};
template <int N, int... I>
struct MakeIndices : MakeIndices<N - 1, N - 1, I...> {};
template <int... I>
struct MakeIndices<0, I...> {
  using type = Indices<I...>;
};
template <int N>
using FirstIndices = typename MakeIndices<N>::type;

// The w x w block at src, rows of stride ld, turned: lane j of out[i] is src[j * ld + i].
// log2(w) rounds of interleaving row i with row i + w/2.
template <class C, class S, int... I>
FUSEDRNN_INLINE void turn_block(Vec<C>* out, const S* src, int64_t ld, Indices<I...>) {
  constexpr int w = sizeof...(I);
  Vec<C> rows[w];
#pragma GCC unroll 16
  for (int i = 0; i < w; i++) rows[i] = load(src + i * ld);
#pragma GCC unroll 4
  for (int round = 1; round < w; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < w / 2; i++) {
      out[2 * i] = __builtin_shufflevector(rows[i], rows[i + w / 2], (I / 2 + I % 2 * w)...);
      out[2 * i + 1] =
          __builtin_shufflevector(rows[i], rows[i + w / 2], (I / 2 + w / 2 + I % 2 * w)...);
    }
#pragma GCC unroll 16
    for (int i = 0; i < w; i++) rows[i] = out[i];
  }
}

// Packs columns [n0, n1) (n0 a multiple of a panel) of B[k, n] = src[k * ld + n].
template <class C, class S>
void pack_panels(C* dst, const S* src, int64_t K, int64_t ld, int64_t n0, int64_t n1) {
  using P = Panels<C>;
  for (int64_t n = n0; n < n1; n += P::kColumns) {
    const int64_t cols = n1 - n < P::kColumns ? n1 - n : P::kColumns, width = P::padded(cols);
    C* panel = dst + n * K;
    for (int64_t k = 0; k < K; k++)
      for (int64_t j = 0; j < cols; j += P::kWidth)
        store(panel + k * width + j, load(src + k * ld + n + j, cols - j));
  }
}

// Packs `vectors` vectors of columns: lane j of vector v is row first_row(v) + j of src, whose rows
// have stride ld and hold K values, for j below lanes(v), and 0 behind.
template <class C, class S, class FirstRow, class Lanes_>
void pack_vectors(C* dst, const S* src, int64_t K, int64_t ld, int64_t vectors, FirstRow first_row,
                  Lanes_ lanes) {
  using P = Panels<C>;
  constexpr int w = P::kWidth;
  for (int64_t v = 0; v < vectors; v++) {
    const int64_t in_panel = v % P::kVectors, panel = v - in_panel;
    const int64_t width = (vectors - panel < P::kVectors ? vectors - panel : P::kVectors) * w;
    C* to = dst + panel * w * K + in_panel * w;
    const S* from = src + first_row(v) * ld;
    const int64_t n = lanes(v);
    int64_t k = 0;
    if (n >= w) {
      for (; k + w <= K; k += w) {
        Vec<C> block[w];
        turn_block<C>(block, from + k, ld, FirstIndices<w>{});
        for (int i = 0; i < w; i++) store(to + (k + i) * width, block[i]);
      }
    }
    for (; k < K; k++)
      for (int64_t j = 0; j < w; j++)
        to[k * width + j] = j < n ? to_compute(from[j * ld + k]) : C(0);
  }
}

// What a product is added to: rows of stride ld, the same row for all with ld = 0, nothing if null.
template <class C>
struct Addend {
  const C* at;
  int64_t ld;
};

// R rows of A times one panel of V vectors. A[r, k] = a[r * ar + k * ak]; rows of C hold `cols`.
// A narrow panel leaves registers free: they take every second (fourth) k, which hides the latency
// of the additions and halves the rounding.
template <class C, int R, int V>
__attribute__((noinline)) void multiply(int64_t K, const C* a, int64_t ar, int64_t ak,
                                        const C* panel, C* c, int64_t ldc, int64_t cols,
                                        Addend<C> d) {
  constexpr int w = Lanes<C>::kWidth, kChains = Panels<C>::kVectors / V;
  Vec<C> acc[kChains][R][V];
#pragma GCC unroll 8
  for (int chain = 0; chain < kChains; chain++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) acc[chain][r][v] = Vec<C>{};
  auto add = [&](int chain) __attribute__((always_inline)) {
    Vec<C> b[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) b[v] = load(panel + v * w);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Vec<C> x = broadcast<C>(a[r * ar]);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) acc[chain][r][v] += x * b[v];
    }
    panel += V * w;
    a += ak;
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
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V && v * w < cols; v++) {
        const int64_t n = cols - v * w;
        store(c + r * ldc + v * w,
              d.at ? load(d.at + r * d.ld + v * w, n) + acc[0][r][v] : acc[0][r][v], n);
      }
  }
}

template <class C>
using Multiply = void (*)(int64_t, const C*, int64_t, int64_t, const C*, C*, int64_t, int64_t,
                          Addend<C>);

template <class C, int V>
FUSEDRNN_INLINE Multiply<C> multiply_for(int64_t rows) {
  switch (rows) {
    case 1:
      return multiply<C, 1, V>;
    case 2:
      return multiply<C, 2, V>;
    case 3:
      return multiply<C, 3, V>;
    case 4:
      return multiply<C, 4, V>;
    case 5:
      return multiply<C, 5, V>;
    default:
      return multiply<C, 6, V>;
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

// Cuts M rows into blocks of at most kRows and nearly equal height: f(first, rows) for each.
template <class F>
FUSEDRNN_INLINE void each_block(int64_t M, F f) {
  for (int64_t m = 0, blocks = (M + kRows - 1) / kRows; m < M; blocks--) {
    const int64_t rows = (M - m + blocks - 1) / blocks;
    f(m, rows);
    m += rows;
  }
}

// C [M, N] = A [M, K] B + D, A in rows of stride lda, C of stride ldc.
template <class C>
void gemm(int64_t M, int64_t N, int64_t K, const C* a, int64_t lda, const C* packed, C* c,
          int64_t ldc, Addend<C> d) {
  using P = Panels<C>;
  for (int64_t n = 0; n < N; n += P::kColumns) {
    const int64_t cols = N - n < P::kColumns ? N - n : P::kColumns;
    each_block(M, [&](int64_t m, int64_t rows) __attribute__((always_inline)) {
      const Addend<C> part{d.at ? d.at + m * d.ld + n : nullptr, d.ld};
      multiply_for<C>(rows, cols)(K, a + m * lda, lda, 1, packed + n * K, c + m * ldc + n, ldc,
                                  cols, part);
    });
  }
}

}  // namespace
