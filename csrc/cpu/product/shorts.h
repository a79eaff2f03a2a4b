// Products of 8-bit weights and factors of 16 bits (integers.h), in AVX2.
//
// vpmaddwd multiplies pairs of 16 bits and adds both products. The bytes of even and of odd places
// of a word are a pair each, so four numbers of a row are stored in the order 0 2 1 3. Sums may
// wrap around on the way: that of the whole row is in range.
#pragma once
#include "cpu/product/integers.h"

namespace {

struct Shorts {
  int16_t value[4];
};
template <>
struct OperandOf<IntegerFloat> {
  using type = Shorts;
};
template <>
struct ElementOf<Shorts> {
  using type = int16_t;
  using stored = int16_t;
};
template <>
constexpr int kStep<Shorts> = 16;

// Numbers keep at least 12 bits: the longer the sums, the smaller the numbers.
constexpr int64_t kDeepestIntegers = 8192;
FUSEDRNN_INLINE float largest_short(int64_t depth) {
  return float(min(INT16_MAX, INT32_MAX / 128 / (depth > 1 ? depth : 1)));
}

// What a row has in the padding behind its numbers: -128 times their sum, then s.
FUSEDRNN_INLINE Shorts* row_padding(Shorts* row, int64_t ld) { return row + ld - 16; }
FUSEDRNN_INLINE const Shorts* row_padding(const Shorts* row, int64_t ld) { return row + ld - 16; }
FUSEDRNN_INLINE int32_t first_sum(const Shorts* row, int64_t ld) {
  int32_t sum;
  std::memcpy(&sum, row_padding(row, ld), sizeof sum);
  return sum;
}

template <class Round>
FUSEDRNN_INLINE void fill_shorts(Shorts* dst, int64_t ld, int64_t n, Round round) {
  __m256i sums = _mm256_setzero_si256();
  for (int64_t j = 0; j < n; j += 16) {
    constexpr int kSwapMiddle = 0b11'01'10'00;
    const __m256i packed = _mm256_packs_epi32(round(j), round(j + 8)),
                  in_order = _mm256_permute4x64_epi64(packed, kSwapMiddle),
                  numbers = _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(in_order, kSwapMiddle),
                                                   kSwapMiddle);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + j / 4), numbers);
    sums = _mm256_add_epi32(sums, _mm256_madd_epi16(numbers, _mm256_set1_epi16(-128)));
  }
  int32_t sum = 0;
  for (int lane = 0; lane < 8; lane++) sum += bit_cast<Lanes<float>::Int>(sums)[lane];
  std::memcpy(row_padding(dst, ld), &sum, sizeof sum);
}

// A row of n operands, of the float32 that value(j, lanes) returns.
template <class Value>
FUSEDRNN_INLINE void make_operands(Shorts* dst, int64_t ld, int64_t n, Value value) {
  constexpr uint32_t kInfinity = 0x7f800000;
  constexpr float kSmallest = 0x1p-100f;  // whose reciprocal is finite
  const float limit = largest_short(n);
  auto values = [&](int64_t j) __attribute__((always_inline)) {
    return j < n ? value(j, min(8, n - j)) : Vec<float>{};
  };
  // The largest size, as the bits of a float: above those of infinity with a NaN.
  __m256i most_bits = _mm256_setzero_si256();
  for (int64_t j = 0; j < n; j += 8)
    most_bits = _mm256_max_epu32(
        most_bits, _mm256_and_si256(bit_cast<__m256i>(values(j)), _mm256_set1_epi32(0x7fffffff)));
  uint32_t bits = 0;
  for (int lane = 0; lane < 8; lane++) {
    const uint32_t size = bit_cast<Lanes<float>::UInt>(most_bits)[lane];
    if (size > bits) bits = size;
  }
  const float found = bit_cast<float>(bits), most = found < kSmallest ? kSmallest : found,
              inverse = limit / most, unit = most / limit;
  std::memcpy(row_padding(dst, ld) + 1, &unit, sizeof unit);
  if (__builtin_expect(bits < kInfinity, 1))
    return fill_shorts(dst, ld, n, [&](int64_t j) __attribute__((always_inline)) {
      return _mm256_cvtps_epi32(bit_cast<__m256>(values(j) * inverse));
    });
  fill_shorts(dst, ld, n, [&](int64_t j) {
    const Vec<float> v = values(j);
    const Lanes<float>::Int up = v == most, down = v == -most;
    return bit_cast<__m256i>((up & int32_t(limit)) - (down & int32_t(limit)));
  });
}

// C = A W^T + D for R rows of A and V vectors of rows of W; K words deep.
template <int R, int V>
__attribute__((noinline)) void multiply_shorts(int64_t K, const Shorts* a, int64_t lda,
                                               const IntegerColumn* columns, float* c, int64_t ldc,
                                               Addend<float> d) {
  __m256i sums[R][V];
  const char* words[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; v++) words[v] = columns[v].words;
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) sums[r][v] = _mm256_set1_epi32(first_sum(a + r * lda, lda));
  for (int64_t k = 0; k < K; k++) {
    // One place after the other, for which the words are loaded twice: 16 registers hold no more.
    each_constant(FirstIndices<2>{}, [&](auto place) __attribute__((always_inline)) {
      __m256i weights[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) {
        const char* const p = words[v] + k * 64;
        const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        weights[v] =
            place.value ? _mm256_srli_epi16(w, 8) : _mm256_and_si256(w, _mm256_set1_epi16(0xff));
        // Few rows are bound by these loads.
        if constexpr (R == 1 && place.value) __builtin_prefetch(p + 16 * 64);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        int32_t pair;
        std::memcpy(&pair, a[r * lda + k].value + 2 * place.value, sizeof pair);
        const __m256i factors = _mm256_set1_epi32(pair);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++)
          sums[r][v] = _mm256_add_epi32(sums[r][v], _mm256_madd_epi16(weights[v], factors));
      }
    });
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    float unit;
    std::memcpy(&unit, row_padding(a + r * lda, lda) + 1, sizeof unit);
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      const int64_t column = columns[v].column, n = columns[v].lanes;
      const Vec<float> addend = d.data ? load(d.data + r * d.ld + column, n) : Vec<float>{};
      // Fused by name, for the same bits in every instance.
      const __m256 sum = _mm256_cvtepi32_ps(sums[r][v]);
      store(c + r * ldc + column,
            bit_cast<Vec<float>>(_mm256_fmadd_ps(sum, bit_cast<__m256>(columns[v].scale * unit),
                                                 bit_cast<__m256>(addend))),
            n);
    }
  }
}

// C = A W^T + D for M rows and `count` vectors of rows of W, at most 4; K values deep.
FUSEDRNN_INLINE void integer_product(int64_t M, int64_t K, const Shorts* a, int64_t lda,
                                     const IntegerColumn* columns, int64_t count, float* c,
                                     int64_t ldc, Addend<float> d, OverlappedWork) {
  const int64_t words = (K + 3) / 4;
  auto run = [&](auto multiply, int64_t i, int64_t v) __attribute__((always_inline)) {
    multiply(words, a + i * lda, lda, columns + v, c + i * ldc, ldc,
             Addend<float>{d.data ? d.data + i * d.ld : nullptr, d.ld});
  };
  if (M == 1 && count > 2)
    return count == 3 ? run(multiply_shorts<1, 3>, 0, 0) : run(multiply_shorts<1, 4>, 0, 0);
  for (int64_t v = 0; v < count; v += 2) {
    auto rows = [&](auto vectors) __attribute__((always_inline)) {
      constexpr int V = vectors.value;
      int64_t i = 0;
      for (; i + 4 <= M; i += 4) run(multiply_shorts<4, V>, i, v);
      if (M - i == 3) run(multiply_shorts<3, V>, i, v);
      if (M - i == 2) run(multiply_shorts<2, V>, i, v);
      if (M - i == 1) run(multiply_shorts<1, V>, i, v);
    };
    if (count - v == 1)
      rows(Constant<1>{});
    else
      rows(Constant<2>{});
  }
}

}  // namespace
