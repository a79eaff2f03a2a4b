// Products with rows of the weights as they lie, for calls that do not pay for packing them: dot
// products of as many rows at once as a vector has lanes.
#pragma once
#include "cpu/pass/pack.h"

namespace {

// Vectors hold `w / kPart` sums in parts of that many lanes. Two make one with parts half as long,
// until lane i of v[0] is the sum of v[i].
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
FUSEDRNN_INLINE Vec<C> sums_of(Vec<C> (&v)[Lanes<C>::kWidth]) {
  constexpr int w = Lanes<C>::kWidth;
  add_lanes<w, C>(v, FirstIndices<w>{});
  return v[0];
}

// Lane i of out[r]: the product of row i of w, which has `rows` rows, and row r of x; both of K
// elements. Lanes from `rows` on are anything.
template <int kRows, class C, class S>
__attribute__((noinline)) void dot_rows(Vec<C>* out, const S* w, int64_t rows, const C* x,
                                        int64_t ldx, int64_t K) {
  constexpr int width = Lanes<C>::kWidth;
  // Rows of w at a time: few, for rows of a power of two lie in the same places of the cache.
  constexpr int kTile = kRows == 1 ? width < 8 ? width : 8 : width < 4 ? width : 4;
  Vec<C> all[kRows][width];
  for (int first = 0; first < width; first += kTile) {
    const S* row[kTile];
#pragma GCC unroll 8
    for (int i = 0; i < kTile; i++) row[i] = w + min(first + i, rows - 1) * K;
    Vec<C> sums[kRows][kTile] = {};
    auto step = [&](int64_t k, auto read) __attribute__((always_inline)) {
      Vec<C> part[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; r++) part[r] = read(x + r * ldx + k);
#pragma GCC unroll 8
      for (int i = 0; i < kTile; i++) {
        const Vec<C> weights = read(row[i] + k);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; r++) sums[r][i] += weights * part[r];
      }
    };
    int64_t k = 0;
    for (; k + width <= K; k += width)
      step(k, [](auto* p) __attribute__((always_inline)) { return load(p); });
    if (k < K) step(k, [&](auto* p) __attribute__((always_inline)) { return load(p, K - k); });
#pragma GCC unroll 4
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 8
      for (int i = 0; i < kTile; i++) all[r][first + i] = sums[r][i];
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; r++) out[r] = sums_of<C>(all[r]);
}

template <class C, class S>
FUSEDRNN_INLINE void dot_rows(Vec<C>* out, const S* w, int64_t rows, const C* x, int64_t ldx,
                              int64_t K, int64_t count) {
  switch (count) {
    case 1:
      return dot_rows<1>(out, w, rows, x, ldx, K);
    case 2:
      return dot_rows<2>(out, w, rows, x, ldx, K);
    case 3:
      return dot_rows<3>(out, w, rows, x, ldx, K);
    default:
      return dot_rows<kDotRows>(out, w, rows, x, ldx, K);
  }
}

}  // namespace
