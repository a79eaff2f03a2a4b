// Vectors of the instruction set this file is compiled for, on GCC's vector extensions: loads and
// stores that convert between storage and compute types, whole or the first n lanes.
//
// Everything here is in an anonymous namespace and nothing uses the standard library's inline
// templates: code compiled for AVX-512 must not be picked by the linker for another variant.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__F16C__) || defined(__AVX512F__)
#pragma GCC diagnostic push
#if !defined(__clang__)  // GCC's header begins from undefined vectors
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define FUSEDRNN_INLINE inline __attribute__((always_inline))

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

// Whether a vector of them is loaded by one or two instructions.
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

// The type in which a product takes its factors: the compute type, or two neighbours along the sum
// where the processor multiplies pairs of bfloat16 and adds them to a float32. With tiles a float32
// is such pairs too, in three planes: a bfloat16, what that leaves of it, and what is left then, 24
// bits together.
struct Pair {
  BFloat16 first, second;
};
struct PlanePair {
  BFloat16 first, second;
};
template <class S>
struct OperandOf {
  using type = Compute<S>;
};
#if defined(__AVX512BF16__)
template <>
struct OperandOf<BFloat16> {
  using type = Pair;
};
#endif
#if defined(__AMX_BF16__)
template <>
struct OperandOf<float> {
  using type = PlanePair;
};
#endif
template <class S>
using Operand = typename OperandOf<S>::type;
template <class X>
struct ElementOf {
  using type = X;
  using kept = X;
};
template <>
struct ElementOf<Pair> {
  using type = BFloat16;
  using kept = BFloat16;
};
template <>
struct ElementOf<PlanePair> {
  using type = BFloat16;
  using kept = float;
};
template <class X>
using Element = typename ElementOf<X>::type;
template <class X>
constexpr int kDepth = sizeof(X) / sizeof(Element<X>);  // values in one operand
template <class X>
constexpr int kPlanes = 1;
template <>
constexpr int kPlanes<PlanePair> = 3;
// What is kept of a factor for later products.
template <class X>
using Kept = typename ElementOf<X>::kept;
// Whether products of X use tiles (tiles.h), and how many values along the sum they take at a time.
#if defined(__AMX_BF16__)
template <class X>
constexpr bool kTiled = kDepth<X> == 2;
#else
template <class X>
constexpr bool kTiled = false;
#endif
template <class X>
constexpr int kStep = kTiled<X> ? 32 : kDepth<X>;
// Rows behind the last one of a matrix A that products read.
template <class X>
constexpr int kSpareRows = kTiled<X> ? 15 : 0;
// Operands that n values take, in all planes; behind the last value stand zeros.
template <class X>
constexpr int64_t operands(int64_t n) {
  return (n + kStep<X> - 1) / kStep<X> * (kStep<X> / kDepth<X>)*kPlanes<X>;
}

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
template <>
struct Lanes<Pair> {
  static constexpr int kWidth = kVectorBytes / 4;
  typedef uint32_t Vec __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Lanes<PlanePair> : Lanes<Pair> {};
template <class C>
using Vec = typename Lanes<C>::Vec;

template <class To, class From>
FUSEDRNN_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
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

// Lane i of the result is lane I[i] of a and b, one behind the other.
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

// ---- the first n lanes; the others read as 0 and are not written ----

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
  return x - Vec<C>{};  // not x + 0: -0 must stay -0
}
template <>
FUSEDRNN_INLINE Vec<Pair> broadcast<Pair>(Pair x) {
  return bit_cast<uint32_t>(x) + Vec<Pair>{};
}

// Rows of n values, converted; the compute type's own rows are copied. A function of its own, for
// the sake of building time.
template <class To, class From>
__attribute__((noinline)) void convert_row(To* to, const From* from, int64_t n) {
  constexpr int w = Lanes<Compute<From>>::kWidth;
  int64_t j = 0;
  for (; j + w <= n; j += w) store(to + j, load(from + j));
  if (j < n) store(to + j, load(from + j, n - j), n - j);
}

// ---- operands ----

// A vector of operands in each plane.
template <class X>
struct Operands {
  Vec<X> plane[kPlanes<X>];
};

#if defined(__AVX512BF16__)
// Of values in plane p what that plane takes: all, but what would round to infinity only as much as
// bfloat16 can hold. Infinity itself goes to the second plane.
template <int kPlane>
FUSEDRNN_INLINE Vec<float> for_plane(Vec<float> v) {
  constexpr int kSmallerSize = 2;  // of two numbers, with the sign of the first
  if constexpr (kPlane > 0) return v;
  return bit_cast<Vec<float>>(
      _mm512_range_ps(bit_cast<__m512>(v), _mm512_set1_ps(0x1.fep127f), kSmallerSize));
}
// What is left of v when `taken` is rounded to bfloat16. Of infinity that is NaN in the end.
FUSEDRNN_INLINE Vec<float> rest(Vec<float> v, Vec<float> taken) {
  const __m512i wide =
      _mm512_cvtepu16_epi32(bit_cast<__m256i>(_mm512_cvtneps_pbh(bit_cast<__m512>(taken))));
  return v - bit_cast<Vec<float>>(_mm512_slli_epi32(wide, 16));
}
// The same of two vectors, 32 values in the order of their memory: those of plane p as pairs.
template <class X, int kPlane>
FUSEDRNN_INLINE void round_to_pairs(Vec<float> low, Vec<float> high, Operands<X>* o) {
  const Vec<float> l = kPlanes<X> > 1 ? for_plane<kPlane>(low) : low,
                   h = kPlanes<X> > 1 ? for_plane<kPlane>(high) : high;
  o->plane[kPlane] =
      bit_cast<Vec<X>>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(h), bit_cast<__m512>(l)));
  if constexpr (kPlane + 1 < kPlanes<X>)
    round_to_pairs<X, kPlane + 1>(rest(low, l), rest(high, h), o);
}
#endif

// Lane j of the operands of a row, or of the two rows next to each other in the sum.
template <class X>
FUSEDRNN_INLINE Operands<X> operand(Vec<Compute<X>> first, Vec<Compute<X>> second) {
#if defined(__AVX512BF16__)
  if constexpr (kDepth<X> == 2) {
    typedef uint16_t Halves __attribute__((vector_size(kVectorBytes)));
    Operands<X> o;
    round_to_pairs<X, 0>(first, second, &o);
    for (Vec<X>& v : o.plane) {
      const Halves h = bit_cast<Halves>(v);
      v = bit_cast<Vec<X>>(shuffle<0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9,
                                   25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31>(h, h));
    }
    return o;
  } else
#endif
  {
    (void)second;
    return {{first}};
  }
}

// The operands of n values that lie together, as many as a vector holds.
template <class X, class S>
FUSEDRNN_INLINE Operands<X> load_operands(const S* p, int64_t n) {
  if constexpr (kDepth<X> == 1) {
    return {{load(p, n)}};
#if defined(__AVX512BF16__)
  } else if constexpr (sizeof(S) == sizeof(float)) {
    constexpr int w = Lanes<float>::kWidth;
    Operands<X> o;
    round_to_pairs<X, 0>(load(p, n), n > w ? load(p + w, n - w) : Vec<float>{}, &o);
    return o;
#endif
  } else {
    constexpr int64_t most = Lanes<X>::kWidth * kDepth<X>;
    Operands<X> o{};
    std::memcpy(&o.plane[0], p, (n < most ? n : most) * sizeof(S));
    return o;
  }
}

// Stores n values, one vector or fewer, from the j-th on of a row whose planes are `plane` operands
// apart.
template <class X, int kPlane = 0>
FUSEDRNN_INLINE void store_operands(X* row, int64_t plane, int64_t j, Vec<Compute<X>> v,
                                    int64_t n) {
  (void)plane;
  auto put = [&](Vec<Compute<X>> part) { store(reinterpret_cast<Element<X>*>(row) + j, part, n); };
#if defined(__AVX512BF16__)
  if constexpr (kPlanes<X> > 1) {
    const Vec<float> taken = for_plane<kPlane>(v);
    put(taken);
    if constexpr (kPlane + 1 < kPlanes<X>)
      store_operands<X, kPlane + 1>(row + plane, plane, j, rest(v, taken), n);
    return;
  }
#endif
  put(v);
}

// Rounds a row of n values to operands: value(j, lanes) are those from j on.
template <class X, class Value>
FUSEDRNN_INLINE void make_operands(X* to, int64_t plane, int64_t n, Value value) {
  constexpr int w = Lanes<Compute<X>>::kWidth;
  int64_t j = 0;
  for (; j + w <= n; j += w) store_operands(to, plane, j, value(j, w), w);
  if (j < n) store_operands(to, plane, j, value(j, n - j), n - j);
  for (int p = 0; p < kPlanes<X>; p++) {
    Element<X>* elements = reinterpret_cast<Element<X>*>(to + p * plane);
    for (j = n; j < operands<X>(n) / kPlanes<X> * kDepth<X>; j++) elements[j] = Element<X>{};
  }
}
template <class X, class From>
FUSEDRNN_INLINE void to_operands(X* to, int64_t plane, const From* from, int64_t n) {
  make_operands(to, plane, n, [from](int64_t j, int64_t lanes) { return load(from + j, lanes); });
}

template <class X>
FUSEDRNN_INLINE Vec<Compute<X>> multiply_add(Vec<X> a, Vec<X> b, Vec<Compute<X>> sum) {
#if defined(__AVX512BF16__)
  if constexpr (kDepth<X> == 2)
    return bit_cast<Vec<float>>(
        _mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(a), bit_cast<__m512bh>(b)));
  else
#endif
    return sum + a * b;
}

}  // namespace
