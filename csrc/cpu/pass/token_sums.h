// Sums over tokens, for the gradients of biases, gains and integer inputs.
//
// Their error does not grow with the number of tokens: what additions round away is summed too.
#pragma once
#include "cpu/call.h"
#include "cpu/vector/simd.h"

namespace {

using namespace fusedrnn;

constexpr int64_t kBiasTile = 64;    // columns that are summed together
constexpr int64_t kTotalTokens = 8;  // summed before they are added to a total

// A sum of any number of terms with about the rounding error of one addition. Knuth, The Art of
// Computer Programming 2, 4.2.2, theorem B.
template <class C>
struct Total {
  Vec<C> sum{}, lost{};

  FUSEDRNN_INLINE void add(Vec<C> x) {
    const Vec<C> next = sum + x, added = next - sum;
    lost += (sum - (next - added)) + (x - added);
    sum = next;
  }
  // Where the sum is not finite, `lost` is NaN.
  FUSEDRNN_INLINE Vec<C> value() const { return sum - sum == 0 ? sum + lost : sum; }
};

// The product over tokens with one-hot rows: dst[m, value] is the sum of a[token, m] over the
// tokens of that value.
template <class D, class A>
void scatter_add(const OneHot& x, int64_t M, int64_t N, const A* a, int64_t lda, D* dst) {
  using C = Compute<D>;
  constexpr int w = Lanes<C>::kWidth;
  std::memset(dst, 0, M * N * sizeof(D));
  for (int64_t i = 0; i < x.distinct; i++) {
    for (int64_t m = 0; m < M; m += w) {
      const int64_t lanes = min(w, M - m);
      Total<C> total;
      for (int64_t k0 = x.begin[i]; k0 < x.begin[i + 1]; k0 += kTotalTokens) {
        Vec<C> block{};
        for (int64_t k = k0; k < min(x.begin[i + 1], k0 + kTotalTokens); k++)
          block += load(a + x.token[k] * lda + m, lanes);
        total.add(block);
      }
      const Vec<C> sum = total.value();
      for (int64_t j = 0; j < lanes; j++) dst[(m + j) * N + x.value[i]] = from_compute<D>(sum[j]);
    }
  }
}

// total[j] = sum over tokens of lane j of value(token, j, lanes), j < cols <= kBiasTile. Later
// lanes of the last vector are undefined.
template <class C, class Value>
FUSEDRNN_INLINE void sum_tokens(const Sequence& seq, int64_t cols, C* total, Value value) {
  constexpr int w = Lanes<C>::kWidth;
  Total<C> totals[kBiasTile / w];
  for (int64_t k0 = 0; k0 < seq.valid; k0 += kTotalTokens) {
    Vec<C> block[kBiasTile / w] = {};
    for (int64_t k = k0; k < min(seq.valid, k0 + kTotalTokens); k++) {
      const int64_t token = seq.token(seq.valid_step[k], seq.valid_row[k]);
      for (int64_t j = 0; j < cols; j += w) block[j / w] += value(token, j, cols - j);
    }
    for (int64_t j = 0; j < cols; j += w) totals[j / w].add(block[j / w]);
  }
  for (int64_t j = 0; j < cols; j += w) store(total + j, totals[j / w].value());
}

}  // namespace
