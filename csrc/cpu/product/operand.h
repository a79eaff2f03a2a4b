// Operands: the form in which a product takes its factors.
//
// An operand is one value of the compute type, or a pair of bfloat16 that are neighbours along the
// sum, where the processor multiplies pairs and adds both products to a float32 (Pair). With tiles
// a float32 is three such pairs, one in each plane (PlanePair): the nearest bfloat16, the nearest
// to the remainder, and the remainder of that. Three times 8 bits are the 24 of a float32.
#pragma once
#include <type_traits>

#include "cpu/vector/simd.h"

namespace {

struct Pair {
  BFloat16 first, second;
};
struct PlanePair {
  BFloat16 first, second;
};

// The operand type of a storage type.
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
  using stored = X;
};
template <>
struct ElementOf<Pair> {
  using type = BFloat16;
  using stored = BFloat16;
};
template <>
struct ElementOf<PlanePair> {
  using type = BFloat16;
  using stored = float;
};
template <class X>
using Element = typename ElementOf<X>::type;
// The form in which a factor is stored for later products.
template <class X>
using StoredOperand = typename ElementOf<X>::stored;

template <class X>
constexpr int kDepth = sizeof(X) / sizeof(Element<X>);  // values in one operand
template <class X>
constexpr int kPlanes = 1;
template <>
constexpr int kPlanes<PlanePair> = 3;
// Whether products of X use tiles (tiles.h).
#if defined(__AMX_BF16__)
template <class X>
constexpr bool kTiled = kDepth<X> == 2;
#else
template <class X>
constexpr bool kTiled = false;
#endif
// Values along the sum that a product takes at a time.
template <class X>
constexpr int kStep = kTiled<X> ? 32 : kDepth<X>;
// Rows after the last one of A that products read.
template <class X>
constexpr int kSpareRows = kTiled<X> ? 15 : 0;
// The number of operands that hold n values, in all planes. Zeros follow the last value.
template <class X>
constexpr int64_t operands(int64_t n) {
  return (n + kStep<X> - 1) / kStep<X> * (kStep<X> / kDepth<X>)*kPlanes<X>;
}

template <>
struct Lanes<Pair> {
  static constexpr int kWidth = kVectorBytes / 4;
  typedef uint32_t Vec __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Lanes<PlanePair> : Lanes<Pair> {};
template <>
FUSEDRNN_INLINE Vec<Pair> broadcast<Pair>(Pair x) {
  return bit_cast<uint32_t>(x) + Vec<Pair>{};
}

// One vector of operands in each plane.
template <class X>
struct Operands {
  Vec<X> plane[kPlanes<X>];
};

#if defined(__AVX512BF16__)
// The part of v that a plane holds before rounding. Values that would round to infinity are limited
// to the largest bfloat16; infinity itself goes to the second plane.
template <int kPlane>
FUSEDRNN_INLINE Vec<float> plane_part(Vec<float> v) {
  constexpr int kSmallerSize = 2;  // of two numbers, with the sign of the first
  if constexpr (kPlane > 0) return v;
  return bit_cast<Vec<float>>(
      _mm512_range_ps(bit_cast<__m512>(v), _mm512_set1_ps(0x1.fep127f), kSmallerSize));
}
// v less `taken` rounded to bfloat16. For infinity the last plane is NaN.
FUSEDRNN_INLINE Vec<float> remainder(Vec<float> v, Vec<float> taken) {
  const __m512i wide =
      _mm512_cvtepu16_epi32(bit_cast<__m256i>(_mm512_cvtneps_pbh(bit_cast<__m512>(taken))));
  return v - bit_cast<Vec<float>>(_mm512_slli_epi32(wide, 16));
}
// Two vectors, 32 values in memory order, as pairs in the planes from kPlane on.
template <class X, int kPlane>
FUSEDRNN_INLINE void round_to_pairs(Vec<float> low, Vec<float> high, Operands<X>* o) {
  const Vec<float> l = kPlanes<X> > 1 ? plane_part<kPlane>(low) : low,
                   h = kPlanes<X> > 1 ? plane_part<kPlane>(high) : high;
  o->plane[kPlane] =
      bit_cast<Vec<X>>(_mm512_cvtne2ps_pbh(bit_cast<__m512>(h), bit_cast<__m512>(l)));
  if constexpr (kPlane + 1 < kPlanes<X>)
    round_to_pairs<X, kPlane + 1>(remainder(low, l), remainder(high, h), o);
}
#endif

// Operands of one row, or of two rows that are neighbours along the sum: lane j from lane j of
// each.
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

// The operands of n contiguous values, at most a vector of them.
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

// Stores n values, at most a vector, at place j of a row whose planes are `plane` operands apart.
template <class X, int kPlane = 0>
FUSEDRNN_INLINE void store_operands(X* row, int64_t plane, int64_t j, Vec<Compute<X>> v,
                                    int64_t n) {
  (void)plane;
  auto put = [&](Vec<Compute<X>> part) { store(reinterpret_cast<Element<X>*>(row) + j, part, n); };
#if defined(__AVX512BF16__)
  if constexpr (kPlanes<X> > 1) {
    const Vec<float> taken = plane_part<kPlane>(v);
    put(taken);
    if constexpr (kPlane + 1 < kPlanes<X>)
      store_operands<X, kPlane + 1>(row + plane, plane, j, remainder(v, taken), n);
    return;
  }
#endif
  put(v);
}

// Zeros after the last of n values, as far as a product takes them.
template <class X>
FUSEDRNN_INLINE void clear_after(X* dst, int64_t plane, int64_t n) {
  for (int p = 0; p < kPlanes<X>; p++) {
    Element<X>* elements = reinterpret_cast<Element<X>*>(dst + p * plane);
    for (int64_t j = n; j < operands<X>(n) / kPlanes<X> * kDepth<X>; j++)
      elements[j] = Element<X>{};
  }
}

// Fills a row of n operands; value(j, lanes) returns the values from j on.
template <class X, class Value>
FUSEDRNN_INLINE void make_operands(X* dst, int64_t plane, int64_t n, Value value) {
  constexpr int w = Lanes<Compute<X>>::kWidth;
  int64_t j = 0;
  for (; j + w <= n; j += w) store_operands(dst, plane, j, value(j, w), w);
  if (j < n) store_operands(dst, plane, j, value(j, n - j), n - j);
  clear_after(dst, plane, n);
}
template <class X, class From>
FUSEDRNN_INLINE void to_operands(X* dst, int64_t plane, const From* src, int64_t n) {
  if constexpr (kDepth<X> > 1 && kPlanes<X> == 1 && std::is_same_v<From, Element<X>>) {
    std::memcpy(dst, src, n * sizeof(From));
    return clear_after(dst, plane, n);
  }
  make_operands(dst, plane, n, [src](int64_t j, int64_t lanes) { return load(src + j, lanes); });
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
