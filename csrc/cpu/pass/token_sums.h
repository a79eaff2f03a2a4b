// Sums over tokens, for the gradients of biases, gains and integer inputs.
//
// They are made in blocks, and blocks of blocks: long sums lose too much to rounding.
#pragma once
#include "cpu/call.h"
#include "cpu/vector/simd.h"

namespace {

using namespace fusedrnn;

constexpr int64_t kBiasTile = 64;  // columns that are summed together
// Tokens that are summed before they are added to the next sum, and these before theirs.
constexpr int64_t kBiasBlock = 16, kSumBlock = 128;

// The product over tokens with one-hot rows: dst[m, value] is the sum of a[token, m] over the
// tokens of that value.
template <class C, class A>
void scatter_add(const OneHot& x, int64_t M, int64_t N, const A* a, int64_t lda, C* dst) {
  constexpr int w = Lanes<C>::kWidth;
  for (int64_t m = 0; m < M; m++)
    for (int64_t n = 0; n < N; n++) dst[m * N + n] = 0;
  for (int64_t i = 0; i < x.distinct; i++) {
    for (int64_t m = 0; m < M; m += w) {
      const int64_t lanes = min(w, M - m);
      Vec<C> total{}, block{}, sum{};
      for (int64_t k = x.begin[i], n = 1; k < x.begin[i + 1]; k++, n++) {
        sum += load(a + x.token[k] * lda + m, lanes);
        if (n % kBiasBlock == 0) block += sum, sum = Vec<C>{};
        if (n % kSumBlock == 0) total += block, block = Vec<C>{};
      }
      total += block + sum;
      for (int64_t j = 0; j < lanes; j++) dst[(m + j) * N + x.value[i]] = total[j];
    }
  }
}

// total[j] = sum over tokens of lane j of value(token, j, lanes), j < cols <= kBiasTile. Later
// lanes of the last vector are undefined.
template <class C, class Value>
FUSEDRNN_INLINE void sum_tokens(const Sequence& seq, int64_t cols, C* total, Value value) {
  constexpr int w = Lanes<C>::kWidth;
  Vec<C> all[kBiasTile / w] = {};
  for (int64_t k0 = 0; k0 < seq.valid; k0 += kSumBlock) {
    const int64_t k2 = min(seq.valid, k0 + kSumBlock);
    Vec<C> block[kBiasTile / w] = {};
    for (int64_t k1 = k0; k1 < k2; k1 += kBiasBlock) {
      Vec<C> sum[kBiasTile / w] = {};
      for (int64_t k = k1; k < min(k2, k1 + kBiasBlock); k++) {
        const int64_t token = seq.token(seq.valid_step[k], seq.valid_row[k]);
        for (int64_t j = 0; j < cols; j += w) sum[j / w] += value(token, j, cols - j);
      }
      for (int64_t j = 0; j < cols; j += w) block[j / w] += sum[j / w];
    }
    for (int64_t j = 0; j < cols; j += w) all[j / w] += block[j / w];
  }
  std::memcpy(total, all, sizeof all);
}

}  // namespace
