// Numbers as template arguments, and least and greatest of two.
//
// Everything under csrc/cpu/vector, product and pass is in an anonymous namespace, and nothing uses
// the standard library's inline templates: the linker keeps one copy of an inline function, and
// code compiled for AVX-512 must not serve the other variants.
#pragma once
#include <cstdint>

#define FUSEDRNN_INLINE inline __attribute__((always_inline))

namespace {

FUSEDRNN_INLINE constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
FUSEDRNN_INLINE constexpr int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }

// A number as a type, for functions whose code depends on it.
template <int I>
struct Constant {
  static constexpr int value = I;
};

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

// f(Constant<I>{}) for every index.
template <class F, int... I>
FUSEDRNN_INLINE void each_constant(Indices<I...>, F f) {
  (f(Constant<I>{}), ...);
}

}  // namespace
