// Vectors of the instruction set this file is compiled for, on GCC's vector extensions: loads and
// stores that convert between storage and compute types, whole or the first n lanes.
#pragma once
#include <cstdint>
#include <cstring>

#include "cpu/vector/indices.h"
#if defined(__F16C__) || defined(__AVX512F__)
#pragma GCC diagnostic push
#if !defined(__clang__)  // GCC's header begins from undefined vectors
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kVectorRegisters = 32;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kVectorRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kVectorRegisters = 32;
#else
constexpr int kVectorBytes = 16, kVectorRegisters = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Whether one or two instructions load a vector and convert it.
template <class S>
constexpr bool kLoadsQuickly = true;
template <>
constexpr bool kLoadsQuickly<BFloat16> = false;
#if !defined(__F16C__) && !defined(__AVX512F__)
template <>
constexpr bool kLoadsQuickly<Float16> = false;
#endif

// The type in which a storage type is computed.
template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

template <class C>
struct Lanes;
template <>
struct Lanes<float> {
  static constexpr int kWidth = kVectorBytes / 4;
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
  typedef int32_t Int __attribute__((vector_size(kVectorBytes)));
  typedef uint32_t UInt __attribute__((vector_size(kVectorBytes)));
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
};
template <>
struct Lanes<double> {
  static constexpr int kWidth = kVectorBytes / 8;
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
  typedef int64_t Int __attribute__((vector_size(kVectorBytes)));
};
template <class C>
using Vec = typename Lanes<C>::Vec;

template <class To, class From>
FUSEDRNN_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

FUSEDRNN_INLINE float to_compute(float x) { return x; }
FUSEDRNN_INLINE double to_compute(double x) { return x; }
FUSEDRNN_INLINE float to_compute(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }
FUSEDRNN_INLINE float to_compute(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, rest = x.bits & 0x7fffu;
  if (rest >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest >= 0x0400u) return bit_cast<float>(sign | ((rest << 13) + 0x38000000u));
  const float tiny = float(rest) * 0x1p-24f;  // subnormal: exact in float32
  return bit_cast<float>(sign | bit_cast<uint32_t>(tiny));
}

template <class S>
FUSEDRNN_INLINE S from_compute(Compute<S> x) {
  return x;
}
template <>
FUSEDRNN_INLINE BFloat16 from_compute<BFloat16>(float x) {
  const uint32_t u = bit_cast<uint32_t>(x);
  if (x != x)
    return {uint16_t(u >> 16 | 0x40u)};  // a quiet NaN; rounding could carry into infinity
  return {uint16_t((u + 0x7fffu + (u >> 16 & 1u)) >> 16)};
}
template <>
FUSEDRNN_INLINE Float16 from_compute<Float16>(float x) {
  const uint32_t u = bit_cast<uint32_t>(x), sign = u >> 16 & 0x8000u, rest = u & 0x7fffffffu;
  if (rest > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (rest >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds past 65504
  if (rest >= 0x38800000u) {
    const uint32_t r = rest - 0x38000000u;
    return {uint16_t(sign | (r + 0xfffu + (r >> 13 & 1u)) >> 13)};
  }
  // Subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits.
  const float shifted = bit_cast<float>(rest) + 0.5f;
  return {uint16_t(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000u))};
}

// Lane i of the result is lane I[i] of a followed by b.
template <int... I, class V>
FUSEDRNN_INLINE V shuffle(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, decltype(a < b){I...});
#endif
}

// ---- whole vectors ----

template <class C>
FUSEDRNN_INLINE Vec<C> load(const C* p) {
  Vec<C> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class C>
FUSEDRNN_INLINE void store(C* p, Vec<C> v) {
  std::memcpy(p, &v, sizeof v);
}

FUSEDRNN_INLINE Vec<float> load(const BFloat16* p) {
  Lanes<float>::Half h;
  std::memcpy(&h, p, sizeof h);
  return bit_cast<Vec<float>>(__builtin_convertvector(h, Lanes<float>::UInt) << 16);
}
FUSEDRNN_INLINE void store(BFloat16* p, Vec<float> v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh(bit_cast<__m512>(v));  // subnormals become 0
  std::memcpy(p, &h, sizeof h);
#else
  using UInt = Lanes<float>::UInt;
  const UInt u = bit_cast<UInt>(v);
  UInt r = (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  r = v != v ? (u >> 16 | 0x40u) : r;
  const Lanes<float>::Half h = __builtin_convertvector(r, Lanes<float>::Half);
  std::memcpy(p, &h, sizeof h);
#endif
}

FUSEDRNN_INLINE Vec<float> load(const Float16* p) {
#if defined(__AVX512F__)
  __m256i h;
  std::memcpy(&h, p, sizeof h);
  return bit_cast<Vec<float>>(_mm512_cvtph_ps(h));
#elif defined(__F16C__)
  __m128i h;
  std::memcpy(&h, p, sizeof h);
  return bit_cast<Vec<float>>(_mm256_cvtph_ps(h));
#else
  Vec<float> v;
  for (int i = 0; i < Lanes<float>::kWidth; i++) v[i] = to_compute(p[i]);
  return v;
#endif
}
FUSEDRNN_INLINE void store(Float16* p, Vec<float> v) {
#if defined(__AVX512F__)
  const __m256i h = _mm512_cvtps_ph(bit_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &h, sizeof h);
#elif defined(__F16C__)
  const __m128i h = _mm256_cvtps_ph(bit_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
  std::memcpy(p, &h, sizeof h);
#else
  for (int i = 0; i < Lanes<float>::kWidth; i++) p[i] = from_compute<Float16>(v[i]);
#endif
}

// ---- the first n lanes: the others are loaded as 0 and not stored ----

template <class S>
FUSEDRNN_INLINE Vec<Compute<S>> load(const S* p, int64_t n) {
  if (n >= Lanes<Compute<S>>::kWidth) return load(p);
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4)
    return bit_cast<Vec<float>>(_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p));
  if constexpr (sizeof(S) == 8)
    return bit_cast<Vec<double>>(_mm512_maskz_loadu_pd(__mmask8((1u << n) - 1), p));
  if constexpr (sizeof(S) == 2) {
    const __m256i h = _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p);
    return load(reinterpret_cast<const S*>(&h));
  }
#endif
  S part[Lanes<Compute<S>>::kWidth] = {};
  for (int64_t i = 0; i < n; i++) part[i] = p[i];
  return load(part);
}
template <class S>
FUSEDRNN_INLINE void store(S* p, Vec<Compute<S>> v, int64_t n) {
  if (n >= Lanes<Compute<S>>::kWidth) return store(p, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4)
    return _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), bit_cast<__m512>(v));
  if constexpr (sizeof(S) == 8)
    return _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), bit_cast<__m512d>(v));
#endif
  S part[Lanes<Compute<S>>::kWidth];
  store(part, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 2) {
    __m256i h;
    std::memcpy(&h, part, sizeof h);
    return _mm256_mask_storeu_epi16(p, __mmask16((1u << n) - 1), h);
  }
#endif
  for (int64_t i = 0; i < n; i++) p[i] = part[i];
}

template <class C>
FUSEDRNN_INLINE Vec<C> broadcast(C x) {
  return x - Vec<C>{};  // x + 0 would turn -0 into +0
}

// Converts a row of n values, or copies it. Not inlined, which saves build time.
template <class To, class From>
__attribute__((noinline)) void convert_row(To* dst, const From* src, int64_t n) {
  constexpr int w = Lanes<Compute<From>>::kWidth;
  int64_t j = 0;
  for (; j + w <= n; j += w) store(dst + j, load(src + j));
  if (j < n) store(dst + j, load(src + j, n - j), n - j);
}

}  // namespace
