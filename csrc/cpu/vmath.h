// exp-based tanh and sigmoid on vectors, for float and double: branch-free, odd/monotone at the
// ends, NaN passes.
//
// Both start from  x = n ln2 + r, |r| <= ln2/2, and the polynomial of expm1(r):
//   sigmoid(x) = 1/(1+e) for x >= 0 and e/(1+e) below,   e = exp(-|x|)
//   tanh(x)    = -m/(m+2) with the sign of x,            m = expm1(-2|x|)
// The argument is never positive, so nothing overflows; expm1 keeps the relative accuracy of tanh
// near 0. Cody and Waite, Software Manual for the Elementary Functions, 1980, for the reduction.
#pragma once
#include "cpu/simd.h"

namespace {

template <class C>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer
  static constexpr float kLog2e = 0x1.715476p0f, kLn2Hi = 0x1.62e4p-1f, kLn2Lo = 0x1.7f7d1cp-20f;
  static constexpr float kSmallest = -104.f, kSaturated = -40.f;
  static constexpr int kMantissa = 23, kBias = 127;
  // 1/k! for k = 2..7: the remainder is 0.1 ulp at |r| = ln2/2.
  static constexpr int kTerms = 6;
  static constexpr float kTaylor[kTerms] = {0.5f,       1.f / 6,   1.f / 24,
                                            1.f / 120, 1.f / 720, 1.f / 5040};
};
template <>
struct ExpConstants<double> {
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLog2e = 0x1.71547652b82fep0;
  static constexpr double kLn2Hi = 0x1.62e42fee00000p-1, kLn2Lo = 0x1.a39ef35793c76p-33;
  static constexpr double kSmallest = -746., kSaturated = -80.;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr int kTerms = 12;
  static constexpr double kTaylor[kTerms] = {
      0.5,          1. / 6,        1. / 24,        1. / 120,        1. / 720,         1. / 5040,
      1. / 40320,   1. / 362880,   1. / 3628800,   1. / 39916800,   1. / 479001600,   1. / 6227020800};
};

// x = n ln2 + r; returns expm1(r) and n, both as a value and as an integer.
template <class C>
struct Reduced {
  Vec<C> expm1_r, n;
  typename Lanes<C>::Int n_int;
};

template <class C>
FUSEDRNN_INLINE Reduced<C> reduce_expm1(Vec<C> x) {
  using K = ExpConstants<C>;
  using Int = typename Lanes<C>::Int;
  const Vec<C> shifted = x * K::kLog2e + K::kRound;
  const Vec<C> n = shifted - K::kRound;
  const Vec<C> r = (x - n * K::kLn2Hi) - n * K::kLn2Lo;
  Vec<C> q = broadcast<C>(K::kTaylor[K::kTerms - 1]);
  for (int k = K::kTerms - 2; k >= 0; k--) q = q * r + K::kTaylor[k];
  const Vec<C> round = broadcast<C>(K::kRound);
  return {r + r * r * q, n, bit_cast<Int>(shifted) - bit_cast<Int>(round)};
}

// 2^n for an n whose power is a normal number.
template <class C>
FUSEDRNN_INLINE Vec<C> power_of_two(typename Lanes<C>::Int n) {
  return bit_cast<Vec<C>>((n + ExpConstants<C>::kBias) << ExpConstants<C>::kMantissa);
}

template <class C>
FUSEDRNN_INLINE typename Lanes<C>::Int sign_bit(Vec<C> x) {
  return bit_cast<typename Lanes<C>::Int>(x) & bit_cast<typename Lanes<C>::Int>(broadcast<C>(C(-0.)));
}
template <class C>
FUSEDRNN_INLINE Vec<C> flip_sign(Vec<C> x, typename Lanes<C>::Int sign) {
  return bit_cast<Vec<C>>(bit_cast<typename Lanes<C>::Int>(x) ^ sign);
}

// exp(x) for x <= 0, into the subnormals.
template <class C>
FUSEDRNN_INLINE Vec<C> exp_negative(Vec<C> x) {
  const Vec<C> clamped = x < ExpConstants<C>::kSmallest ? broadcast<C>(ExpConstants<C>::kSmallest) : x;
  const Reduced<C> e = reduce_expm1<C>(clamped);
  const auto half = e.n_int >> 1;  // two steps: 2^n itself may be subnormal
  return (1 + e.expm1_r) * power_of_two<C>(half) * power_of_two<C>(e.n_int - half);
}

struct VectorMath {
  template <class V>
  static FUSEDRNN_INLINE V sigmoid(V x) {
    using C = __decltype(x[0] + x[0]);
    const V e = exp_negative<C>(-flip_sign<C>(x, sign_bit<C>(x)));
    return (x < 0 ? e : broadcast<C>(1)) / (1 + e);
  }

  template <class V>
  static FUSEDRNN_INLINE V tanh(V x) {
    using C = __decltype(x[0] + x[0]);
    using K = ExpConstants<C>;
    const auto sign = sign_bit<C>(x);
    V y = -2 * flip_sign<C>(x, sign);
    y = y < K::kSaturated ? broadcast<C>(K::kSaturated) : y;
    const Reduced<C> e = reduce_expm1<C>(y);
    const V two_n = power_of_two<C>(e.n_int);
    const V m = e.expm1_r * two_n + (two_n - 1);
    const V t = m / (m + 2);  // in (-1, 0]
    return flip_sign<C>(t, sign_bit<C>(t) ^ sign);
  }
};

}  // namespace
