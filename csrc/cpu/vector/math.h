// tanh and sigmoid on vectors, for float and double, within 1.5 ulp (2 without fused
// multiply-add). Free of branches; NaN gives NaN.
//
// Both start from  x = n ln2 + r, |r| <= ln2/2, and the polynomial of expm1(r):
//   sigmoid(x) = 1/(1+e) for x >= 0 and e/(1+e) below,   e = exp(-|x|)
//   tanh(x)    = -m/(2+m) with the sign of x,            m = expm1(-2|x|)
// The argument is never positive, so nothing overflows, and with expm1 tanh has a small relative
// error near 0. Sums carry their rounding error, and the quotient is corrected by its remainder:
// torch's functions are within 1 ulp, and at most twice their error is allowed here.
// Cody and Waite, Software Manual for the Elementary Functions, 1980, for the reduction; Dekker,
// Numerische Mathematik 18, 1971, for the sums.
#pragma once
#include "cpu/vector/simd.h"

namespace {

template <class C>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer
  static constexpr float kLog2e = 0x1.715476p0f, kLn2Hi = 0x1.62e4p-1f, kLn2Lo = 0x1.7f7d1cp-20f;
  static constexpr float kSmallest = -104.f, kSaturated = -40.f;
  static constexpr int kMantissa = 23, kBias = 127;
  // (expm1(r) - r) / r^2, minimax for the relative error of expm1 on |r| <= ln2/2: 1.3e-8.
  static constexpr int kTerms = 5;
  static constexpr float kSeries[kTerms] = {0.500000006f, 0.166665430f, 0.0416662821f,
                                            0.00836658238f, 0.00139464479f};
};
template <>
struct ExpConstants<double> {
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLog2e = 0x1.71547652b82fep0;
  static constexpr double kLn2Hi = 0x1.62e42fee00000p-1, kLn2Lo = 0x1.a39ef35793c76p-33;
  static constexpr double kSmallest = -746., kSaturated = -80.;
  static constexpr int kMantissa = 52, kBias = 1023;
  static constexpr int kTerms = 12;
  static constexpr double kSeries[kTerms] = {
      0.5,        1. / 6,      1. / 24,      1. / 120,      1. / 720,       1. / 5040,
      1. / 40320, 1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
};

// expm1(r) and n of x = n ln2 + r.
template <class C>
struct Reduced {
  Vec<C> expm1_r;
  typename Lanes<C>::Int n;
};

template <class C>
FUSEDRNN_INLINE Reduced<C> reduce(Vec<C> x) {
  using K = ExpConstants<C>;
  using Int = typename Lanes<C>::Int;
  const Vec<C> shifted = x * K::kLog2e + K::kRound;
  const Vec<C> n = shifted - K::kRound;
  const Vec<C> r = (x - n * K::kLn2Hi) - n * K::kLn2Lo;
  Vec<C> q = broadcast<C>(K::kSeries[K::kTerms - 1]);
  for (int k = K::kTerms - 2; k >= 0; k--) q = q * r + K::kSeries[k];
  return {r + r * r * q, bit_cast<Int>(shifted) - bit_cast<Int>(broadcast<C>(K::kRound))};
}

// 2^n, a normal number.
template <class C>
FUSEDRNN_INLINE Vec<C> power_of_two(typename Lanes<C>::Int n) {
  return bit_cast<Vec<C>>((n + ExpConstants<C>::kBias) << ExpConstants<C>::kMantissa);
}

template <class C>
FUSEDRNN_INLINE typename Lanes<C>::Int sign_bit(Vec<C> x) {
  return bit_cast<typename Lanes<C>::Int>(x) &
         bit_cast<typename Lanes<C>::Int>(broadcast<C>(C(-0.)));
}
template <class C>
FUSEDRNN_INLINE Vec<C> flip_sign(Vec<C> x, typename Lanes<C>::Int sign) {
  return bit_cast<Vec<C>>(bit_cast<typename Lanes<C>::Int>(x) ^ sign);
}

// x 2^n for n in [-1100, 0]; the result may be subnormal.
template <class C>
FUSEDRNN_INLINE Vec<C> scale_down(Vec<C> x, typename Lanes<C>::Int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4)
    return bit_cast<Vec<C>>(
        _mm512_scalef_ps(bit_cast<__m512>(x), _mm512_cvtepi32_ps(bit_cast<__m512i>(n))));
#endif
  const auto half = n >> 1;  // in two steps: 2^n itself may be subnormal
  return x * power_of_two<C>(half) * power_of_two<C>(n - half);
}

// A number as the sum of two, of which the second is below the precision of the first.
template <class C>
struct Sum {
  Vec<C> hi, lo;
};
// a + b for |a| >= |b|, with the rounding error of the sum.
template <class C>
FUSEDRNN_INLINE Sum<C> exact_sum(Vec<C> a, Vec<C> b) {
  const Vec<C> hi = a + b;
  return {hi, b - (hi - a)};
}

// 1/x to at least 14 bits, for normal x. `quotient` corrects the rest.
template <class C>
FUSEDRNN_INLINE Vec<C> reciprocal(Vec<C> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == 4) {
    const Vec<C> y = bit_cast<Vec<C>>(_mm512_rcp14_ps(bit_cast<__m512>(x)));
    return y;
  }
#endif
  return 1 / x;
}

// a / b for b in [1, 2], with an error little above 0.5 ulp.
template <class C>
FUSEDRNN_INLINE Vec<C> quotient(Sum<C> a, Sum<C> b) {
  const Vec<C> inverse = reciprocal<C>(b.hi);
  const Vec<C> q = a.hi * inverse;
  const Vec<C> remainder = (a.hi - q * b.hi) + (a.lo - q * b.lo);
  return q + remainder * inverse;
}

struct VectorMath {
  template <class V>
  static FUSEDRNN_INLINE V sigmoid(V x) {
    using C = __decltype(x[0] + x[0]);
    using K = ExpConstants<C>;
    V y = -flip_sign<C>(x, sign_bit<C>(x));
    y = y < K::kSmallest ? broadcast<C>(K::kSmallest) : y;
    const Reduced<C> e = reduce<C>(y);
    const Sum<C> u = exact_sum<C>(broadcast<C>(1), e.expm1_r);
    const Sum<C> exp_y{scale_down<C>(u.hi, e.n), scale_down<C>(u.lo, e.n)};
    Sum<C> below = exact_sum<C>(broadcast<C>(1), exp_y.hi);
    below.lo += exp_y.lo;
    const auto negative = x < 0;
    return quotient<C>({negative ? exp_y.hi : broadcast<C>(1), negative ? exp_y.lo : V{}}, below);
  }

  template <class V>
  static FUSEDRNN_INLINE V tanh(V x) {
    using C = __decltype(x[0] + x[0]);
    using K = ExpConstants<C>;
    const auto sign = sign_bit<C>(x);
    V y = -2 * flip_sign<C>(x, sign);
    y = y < K::kSaturated ? broadcast<C>(K::kSaturated) : y;
    const Reduced<C> e = reduce<C>(y);
    const V two_n = power_of_two<C>(e.n);
    const Sum<C> m = exact_sum<C>(two_n - 1, e.expm1_r * two_n);
    Sum<C> below = exact_sum<C>(broadcast<C>(2), m.hi);
    below.lo += m.lo;
    const V t = quotient<C>(m, below);  // in (-1, 0]
    return flip_sign<C>(t, sign_bit<C>(t) ^ sign);
  }
};

// The same for types of 16 bits, at half the cost or less. Near 0 the error of tanh is still
// relative.
#if defined(__AVX512DQ__)
// tanh within 1e-4 of the value, a fifth of the rounding error of float16: its reciprocal of 14
// bits is not corrected. sigmoid within 5e-6, because a gate near 1 multiplies a state at every
// step, and its errors accumulate. AVX-512 has instructions that split and scale by exponents.
struct ShortMath {
  static constexpr float kLog2e = ExpConstants<float>::kLog2e;

  // t less the integer below (kDown) or nearest to it.
  enum Round { kNearest = 0x8, kDown = 0x9 };
  template <Round kRound, class V>
  static FUSEDRNN_INLINE V fraction(V t) {
    return bit_cast<V>(_mm512_reduce_ps(bit_cast<__m512>(t), kRound));
  }
  // x 2^n, for the integer below n.
  template <class V>
  static FUSEDRNN_INLINE V scale(V x, V n) {
    return bit_cast<V>(_mm512_scalef_ps(bit_cast<__m512>(x), bit_cast<__m512>(n)));
  }

  template <class V>
  static FUSEDRNN_INLINE V sigmoid(V x) {
    V t = -kLog2e * x;
    t = t > 126 ? broadcast<float>(126) : t;  // the reciprocal of infinity cannot be corrected
    const V f = fraction<kDown>(t);
    // 2^f, minimax on [0, 1): 2.6e-6
    V p = 0.0520114623f + f * 0.0135341680f;
    p = 0.241442754f + f * p;
    p = 0.693003835f + f * p;
    p = 1.00000259f + f * p;
    const V below = 1 + scale(p, t), y = reciprocal<float>(below);
    return y + y * (1 - below * y);
  }

  template <class V>
  static FUSEDRNN_INLINE V tanh(V x) {
    const auto sign = sign_bit<float>(x);
    const V t = -2 * kLog2e * flip_sign<float>(x, sign), f = fraction<kNearest>(t);
    // (2^f - 1) / f, minimax on [-1/2, 1/2] for the relative error: 1.5e-5
    V p = 0.0558372895f + f * 0.00961811081f;
    p = 0.240232522f + f * p;
    p = 0.693136858f + f * p;
    const V two_n = scale(broadcast<float>(1), t - f), m = two_n - 1 + f * p * two_n;
    return flip_sign<float>((0 - m) * reciprocal<float>(2 + m), sign);  // not -m: +0 stays +0
  }
};
#else
// Within 3 ulp of float32: sums do not carry their rounding error, and quotients are not corrected.
struct ShortMath {
  template <class V>
  static FUSEDRNN_INLINE V clamp(V x, float most) {
    x = x > most ? broadcast<float>(most) : x;
    return x < -most ? broadcast<float>(-most) : x;
  }
  template <class V>
  static FUSEDRNN_INLINE V inverse(V x) {
    const V y = reciprocal<float>(x);
    return y + y * (1 - x * y);
  }

  template <class V>
  static FUSEDRNN_INLINE V sigmoid(V x) {
    const Reduced<float> e = reduce<float>(clamp(-x, 87));
    const V two_n = power_of_two<float>(e.n);
    return inverse(1 + two_n + e.expm1_r * two_n);
  }

  template <class V>
  static FUSEDRNN_INLINE V tanh(V x) {
    const Reduced<float> e = reduce<float>(2 * clamp(x, 20));
    const V two_n = power_of_two<float>(e.n), m = two_n - 1 + e.expm1_r * two_n;
    return m * inverse(m + 2);
  }
};
#endif

template <class S>
struct MathOf {
  using type = ShortMath;
};
template <>
struct MathOf<float> {
  using type = VectorMath;
};
template <>
struct MathOf<double> {
  using type = VectorMath;
};
template <class S>
using Math = typename MathOf<S>::type;

}  // namespace
