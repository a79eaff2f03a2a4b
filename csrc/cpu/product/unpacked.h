// Products with unpacked weights, for calls of few rows, in which packing would take longer than
// the product.
#pragma once
#include "cpu/product/gemm.h"
#include "plan/problem.h"

namespace {

using fusedrnn::kDotRows, fusedrnn::kFewTokensBack;

// Adds up the lanes of w vectors: each holds w / kPart partial sums of kPart lanes. Two vectors are
// merged into one with parts half as long, until lane i of v[0] is the sum of v[i].
template <int kPart, class C, int... I>
FUSEDRNN_INLINE void add_lanes(Vec<C>* v, Indices<I...> all) {
  constexpr int w = sizeof...(I), kHalf = kPart / 2;
#pragma GCC unroll 8
  for (int i = 0; i < kHalf; i++)
    v[i] = shuffle<(I / kPart * kPart + I % kHalf + (I % kPart < kHalf ? 0 : w))...>(v[i],
                                                                                     v[i + kHalf]) +
           shuffle<(I / kPart * kPart + kHalf + I % kHalf + (I % kPart < kHalf ? 0 : w))...>(
               v[i], v[i + kHalf]);
  if constexpr (kPart > 2) add_lanes<kHalf, C>(v, all);
}

// Lane i of the result is the sum of v[i].
template <class C>
FUSEDRNN_INLINE Vec<C> lane_sums(Vec<C> (&v)[Lanes<C>::kWidth]) {
  constexpr int w = Lanes<C>::kWidth;
  add_lanes<w, C>(v, FirstIndices<w>{});
  return v[0];
}

// What dot products of unpacked weights multiply: pairs of bfloat16 where the processor multiplies
// them, else values of the compute type.
template <class S>
using DotOperand = std::conditional_t<kPlanes<Operand<S>> == 1, Operand<S>, Compute<S>>;

// How many rows of weights are read at a time. Several share what is loaded of x. The hardware
// prefetcher follows a single row best; its sum has several parts, which hide the latency of
// additions.
enum class RowTile { kSome, kSomePrefetched, kOne };
struct RowReading {
  bool one_at_a_time;  // for x of one row
  int64_t ahead;       // the rows that lie so many rows further are prefetched; 0: none
};

// Lane i of out[r] is the dot product of row i of w, which has `rows` rows, and row r of x, both of
// K elements. Lanes from `rows` on are undefined. With kSomePrefetched, the elements that lie
// `ahead` of those that are read are prefetched to L2.
template <int kRows, RowTile kReading, class C, class S>
__attribute__((noinline)) void dot_rows(Vec<C>* out, const S* w, int64_t rows, const C* x,
                                        int64_t ldx, int64_t K, int64_t ahead) {
  using X = DotOperand<S>;
  constexpr bool kAlone = kReading == RowTile::kOne;
  constexpr int width = Lanes<C>::kWidth, kAtOnce = width * kDepth<X>, kParts = kAlone ? 4 : 1;
  // Few rows of w at a time: rows whose length is a power of two share cache sets.
  constexpr int kMost = kAlone ? 1 : kRows == 1 ? 8 : 4, kTile = width < kMost ? width : kMost;
  Vec<C> all[kRows][width];
  for (int first = 0; first < width; first += kTile) {
    const S* row[kTile];
#pragma GCC unroll 8
    for (int i = 0; i < kTile; i++) row[i] = w + min(first + i, rows - 1) * K;
    Vec<C> sums[kParts][kRows][kTile] = {};
    auto step = [&](auto& sum, int64_t k, int64_t n) __attribute__((always_inline)) {
      auto read = [&](auto* p) { return load_operands<X>(p + k, n).plane[0]; };
      Vec<X> part[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) part[r] = read(x + r * ldx);
#pragma GCC unroll 8
      for (int i = 0; i < kTile; i++) {
        if constexpr (kReading == RowTile::kSomePrefetched)
          __builtin_prefetch(row[i] + k + ahead, 0, 2);
        const Vec<X> weights = read(row[i]);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; r++) sum[r][i] = multiply_add<X>(weights, part[r], sum[r][i]);
      }
    };
    int64_t k = 0;
    for (; kParts > 1 && k + kParts * kAtOnce <= K; k += kParts * kAtOnce)
#pragma GCC unroll 4
      for (int p = 0; p < kParts; p++) step(sums[p], k + p * kAtOnce, kAtOnce);
    for (; k + kAtOnce <= K; k += kAtOnce) step(sums[0], k, kAtOnce);
    if (k < K) step(sums[0], k, K - k);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 8
      for (int i = 0; i < kTile; i++) {
        Vec<C> sum = sums[0][r][i];
#pragma GCC unroll 4
        for (int p = 1; p < kParts; p++) sum += sums[p][r][i];
        all[r][first + i] = sum;
      }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; r++) out[r] = lane_sums<C>(all[r]);
}

template <RowTile kReading, class C, class S>
FUSEDRNN_INLINE void dot_rows(Vec<C>* out, const S* w, int64_t rows, const C* x, int64_t ldx,
                              int64_t K, int64_t ahead, int64_t count) {
  switch (count) {
    case 1:
      return dot_rows<1, kReading>(out, w, rows, x, ldx, K, ahead);
    case 2:
      return dot_rows<2, kReading>(out, w, rows, x, ldx, K, ahead);
    case 3:
      return dot_rows<3, kReading>(out, w, rows, x, ldx, K, ahead);
    default:
      return dot_rows<kDotRows, kReading>(out, w, rows, x, ldx, K, ahead);
  }
}

// The same for `count` rows of x.
template <class C, class S>
FUSEDRNN_INLINE void dot_rows(Vec<C>* out, const S* w, int64_t rows, const C* x, int64_t ldx,
                              int64_t K, int64_t count, RowReading reading) {
  if (reading.ahead)
    return dot_rows<RowTile::kSomePrefetched>(out, w, rows, x, ldx, K, reading.ahead * K, count);
  if (reading.one_at_a_time) return dot_rows<1, RowTile::kOne>(out, w, rows, x, ldx, K, 0);
  dot_rows<RowTile::kSome>(out, w, rows, x, ldx, K, 0, count);
}

// `columns` of C = A W + D for the row-major weights W [K, N], a few rows of which are read at a
// time. M <= kFewTokensBack.
template <class C, class E, class S>
void multiply_unpacked(int64_t M, int64_t K, int64_t N, const E* a, int64_t lda, const S* weights,
                       Columns columns, C* c, int64_t ldc, Addend<C> d) {
  constexpr int w = Lanes<C>::kWidth, kAtOnce = 8;
  constexpr int64_t kBlock = 512;  // columns whose sums stay in L1
  constexpr int64_t kChain = 32;   // rows that are summed before they are added to C
  C sums[kFewTokensBack * kBlock];
  for (int64_t n0 = columns.begin; n0 < columns.end; n0 += kBlock) {
    const int64_t cols = min(kBlock, columns.end - n0);
    for (int64_t r = 0; r < M; r++)
      for (int64_t n = 0; n < cols; n += w)
        store(c + r * ldc + n0 + n, d.data ? load(d.data + r * d.ld + n0 + n, cols - n) : Vec<C>{},
              cols - n);
    for (int64_t k0 = 0; k0 < K; k0 += kChain) {
      const int64_t k1 = min(K, k0 + kChain);
      for (int64_t k = k0; k < k1; k += kAtOnce) {
        const S* row[kAtOnce];
        for (int i = 0; i < kAtOnce; i++) row[i] = weights + min(k + i, K - 1) * N + n0;
        for (int64_t r = 0; r < M; r++) {
          Vec<C> factor[kAtOnce];
          for (int i = 0; i < kAtOnce; i++)
            factor[i] = broadcast<C>(k + i < k1 ? to_compute(a[r * lda + k + i]) : C(0));
          for (int64_t n = 0; n < cols; n += w) {
            Vec<C> sum = k > k0 ? load(sums + r * kBlock + n) : Vec<C>{};
#pragma GCC unroll 8
            for (int i = 0; i < kAtOnce; i++) sum += factor[i] * load(row[i] + n, cols - n);
            store(sums + r * kBlock + n, sum);
          }
        }
      }
      for (int64_t r = 0; r < M; r++)
        for (int64_t n = 0; n < cols; n += w) {
          C* const total = c + r * ldc + n0 + n;
          store(total, load(total, cols - n) + load(sums + r * kBlock + n), cols - n);
        }
    }
  }
}

}  // namespace
