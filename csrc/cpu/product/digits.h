// Products of 8-bit weights and digits of 8 bits (integers.h), where the processor multiplies
// bytes.
//
// A row of whole numbers up to 32639 is cut into digits: each is 256 high + low, and both digits
// are in [-128, 127].
#pragma once
#include "cpu/product/integers.h"

namespace {

// Four digits of a row. The low ones are a second plane.
struct Digits {
  int8_t value[4];
};
template <>
struct OperandOf<IntegerFloat> {
  using type = Digits;
};
template <>
struct ElementOf<Digits> {
  using type = int8_t;
  using stored = int8_t;
};
template <>
constexpr int kPlanes<Digits> = 2;
template <>
constexpr int kStep<Digits> = 64;
template <>
constexpr int kSpareRows<Digits> = 15;
template <>
constexpr int64_t kRowPad<Digits> = 64;
#if defined(__AMX_INT8__)
template <>
constexpr bool kTiled<Digits> = true;
#endif

// Sums of more digits could exceed 32 bits.
constexpr int64_t kDeepestIntegers = 32768;

// What a row has in the padding behind each plane: sixteen times the sum of the plane's digits
// times -128, from which sums of products start, then s.
FUSEDRNN_INLINE Digits* first_sums(Digits* row, int64_t plane) { return row + plane - 32; }
FUSEDRNN_INLINE const Digits* first_sums(const Digits* row, int64_t plane) {
  return row + plane - 32;
}
FUSEDRNN_INLINE float unit_of(const Digits* row, int64_t plane) {
  return bit_cast<float>(row[plane - 16]);
}

// The 64 values from j on as numbers of 16 bits: those of each half, interleaved by fours.
struct Numbers {
  __m512i half[2];
};
template <class Round>
FUSEDRNN_INLINE Numbers round_numbers(int64_t j, Round round) {
  return {{_mm512_packs_epi32(round(j), round(j + 16)),
           _mm512_packs_epi32(round(j + 32), round(j + 48))}};
}
// Their digits in order.
FUSEDRNN_INLINE __m512i digits_in_order(__m512i interleaved) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, interleaved);
}
FUSEDRNN_INLINE __m512i low_digits(const Numbers& n) {  // the lowest byte, with its sign
  const __m512i byte = _mm512_set1_epi16(0xff);
  return digits_in_order(
      _mm512_packus_epi16(_mm512_and_si512(n.half[0], byte), _mm512_and_si512(n.half[1], byte)));
}
FUSEDRNN_INLINE __m512i high_digits(const Numbers& n) {
  auto high = [](__m512i v) __attribute__((always_inline)) {
    return _mm512_srai_epi16(_mm512_add_epi16(v, _mm512_set1_epi16(128)), 8);
  };
  return digits_in_order(_mm512_packs_epi16(high(n.half[0]), high(n.half[1])));
}

// Fills a row of n values: round(j) returns the numbers of 16 of them, from j on.
template <class Round>
FUSEDRNN_INLINE void fill_digits(Digits* dst, int64_t plane, int64_t n, Round round) {
  __m512i sums[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int64_t j = 0; j < n; j += 64) {
    const Numbers numbers = round_numbers(j, round);
    const __m512i digits[2] = {high_digits(numbers), low_digits(numbers)};
    for (int p = 0; p < 2; p++) {
      _mm512_storeu_si512(dst + p * plane + j / 4, digits[p]);
      sums[p] = _mm512_dpbusd_epi32(sums[p], _mm512_set1_epi8(1), digits[p]);
    }
  }
  for (int p = 0; p < 2; p++)
    _mm512_storeu_si512(first_sums(dst + p * plane, plane),
                        _mm512_set1_epi32(-128 * _mm512_reduce_add_epi32(sums[p])));
}

// The same of the float32 that value(j, lanes) returns.
template <class Value>
FUSEDRNN_INLINE void make_operands(Digits* dst, int64_t plane, int64_t n, Value value) {
  constexpr uint32_t kInfinity = 0x7f800000;
  constexpr float kMost = 127 * 256 + 127, kSmallest = 0x1p-100f;  // whose reciprocal is finite
  auto values = [&](int64_t j) __attribute__((always_inline)) {
    return j < n ? value(j, min(16, n - j)) : Vec<float>{};
  };
  // The largest size, as the bits of a float: above those of infinity with a NaN.
  __m512i most_bits = _mm512_setzero_si512();
  for (int64_t j = 0; j < n; j += 16)
    most_bits = _mm512_max_epu32(
        most_bits, _mm512_and_si512(bit_cast<__m512i>(values(j)), _mm512_set1_epi32(0x7fffffff)));
  const uint32_t bits = _mm512_reduce_max_epu32(most_bits);
  const float found = bit_cast<float>(bits), most = found < kSmallest ? kSmallest : found,
              inverse = kMost / most, unit = most / kMost;
  std::memcpy(dst + plane - 16, &unit, sizeof unit);
  if (__builtin_expect(bits < kInfinity, 1))
    return fill_digits(dst, plane, n, [&](int64_t j) __attribute__((always_inline)) {
      return _mm512_cvtps_epi32(bit_cast<__m512>(values(j) * inverse));
    });
  fill_digits(dst, plane, n, [&](int64_t j) {
    const Vec<float> v = values(j);
    const Lanes<float>::Int up = v == most, down = v == -most;
    return bit_cast<__m512i>((up & int32_t(kMost)) - (down & int32_t(kMost)));
  });
}

// D plus the product of the sums of its digits; fused alike everywhere, for the same bits.
FUSEDRNN_INLINE Vec<float> add_scaled(__m512i high, __m512i low, Vec<float> factor, Vec<float> d) {
  const __m512 sum =
      _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), _mm512_set1_ps(256), _mm512_cvtepi32_ps(low));
  return bit_cast<Vec<float>>(_mm512_fmadd_ps(sum, bit_cast<__m512>(factor), bit_cast<__m512>(d)));
}

// C = A W^T + D for R rows of A and V vectors of rows of W; K words deep.
template <int R, int V>
__attribute__((noinline)) void multiply_digits(int64_t K, const Digits* a, int64_t lda,
                                               const IntegerColumn* columns, float* c, int64_t ldc,
                                               Addend<float> d) {
  const int64_t plane = lda / 2;
  __m512i high[R][V], low[R][V];
  float unit[R];
  const char* words[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; v++) words[v] = columns[v].words;
#pragma GCC unroll 8
  for (int r = 0; r < R; r++) {
    const Digits* const row = a + r * lda;
    unit[r] = unit_of(row, plane);
#pragma GCC unroll 8
    for (int v = 0; v < V; v++)
      high[r][v] = _mm512_loadu_si512(first_sums(row, plane)),
      low[r][v] = _mm512_loadu_si512(first_sums(row + plane, plane));
  }
  auto broadcast_digits = [](const Digits* four) __attribute__((always_inline)) {
    return _mm512_set1_epi32(bit_cast<int32_t>(*four));
  };
  for (int64_t k = 0; k < K; k++) {
    __m512i w[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      w[v] = _mm512_loadu_si512(words[v] + k * 64);
      // Few rows are bound by these loads.
      if constexpr (R <= 3) __builtin_prefetch(words[v] + (k + 16) * 64);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const __m512i h = broadcast_digits(a + r * lda + k),
                    l = broadcast_digits(a + r * lda + plane + k);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) {
        high[r][v] = _mm512_dpbusd_epi32(high[r][v], w[v], h);
        low[r][v] = _mm512_dpbusd_epi32(low[r][v], w[v], l);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      const int64_t column = columns[v].column, n = columns[v].lanes;
      const Vec<float> addend = d.data ? load(d.data + r * d.ld + column, n) : Vec<float>{};
      store(c + r * ldc + column,
            add_scaled(high[r][v], low[r][v], columns[v].scale * unit[r], addend), n);
    }
}

#if defined(__AMX_INT8__)
template <int kSum, int kA, int kB>
FUSEDRNN_INLINE void tile_multiply_add_digits() {
  asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}

// Up to 16 rows of C, in one or two vectors of columns, whose sums are in memory. They are stored
// while tiles multiply the next ones.
struct TileSums {
  int32_t sums[4][kTileRows * kTileRows];  // of each vector the high and the low digits
  const Digits* a;
  const IntegerColumn* columns;
  float* c;
  const float* d;
  int64_t plane, lda, ldc, ldd, vectors, rows = 0, stored = 0;

  FUSEDRNN_INLINE void store_to(int64_t end) {
    if (stored >= end) return;
    const bool whole = columns[0].lanes >= kTileRows && columns[vectors - 1].lanes >= kTileRows;
    if (vectors == 2 && whole && d)
      store_rows<2, true>(end);
    else if (vectors == 2)
      store_rows<2, false>(end);
    else
      store_rows<1, false>(end);
    stored = end;
  }

 private:
  // kWhole: all lanes, and there is an addend.
  template <int V, bool kWhole>
  FUSEDRNN_INLINE void store_rows(int64_t end) const {
    Vec<float> scale[V];
    int64_t column[V], n[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; v++)
      scale[v] = columns[v].scale, column[v] = columns[v].column, n[v] = columns[v].lanes;
    for (int64_t i = stored; i < end; i++) {
      const float unit = unit_of(a + i * lda, plane);
#pragma GCC unroll 2
      for (int v = 0; v < V; v++) {
        const __m512i high = _mm512_loadu_si512(sums[2 * v] + i * kTileRows),
                      low = _mm512_loadu_si512(sums[2 * v + 1] + i * kTileRows);
        const Vec<float> factor = scale[v] * unit;
        float* const to = c + i * ldc + column[v];
        const float* const from = d + i * ldd + column[v];
        if constexpr (kWhole)
          store(to, add_scaled(high, low, factor, load(from)));
        else
          store(to, add_scaled(high, low, factor, d ? load(from, n[v]) : Vec<float>{}), n[v]);
      }
    }
  }
};

// The sums of `next` on tiles: two of the digits of A, and of each vector its two sums and the
// weights. K, a multiple of 16, counts words.
template <int V>
__attribute__((noinline)) void multiply_digit_tiles(int64_t K, TileSums& next, TileSums& last,
                                                    Progress& progress) {
  constexpr int kHigh = 2 * V, kLow = kHigh + 1, kW = kLow + 1;
  constexpr auto each_vector = FirstIndices<V>{};
  const Digits* const a = next.a;
  const int64_t plane = next.plane, row_bytes = next.lda * sizeof(Digits);
  each_constant(each_vector, [&](auto v) __attribute__((always_inline)) {
    tile_load<2 * v.value>(first_sums(a, plane), row_bytes);
    tile_load<2 * v.value + 1>(first_sums(a + plane, plane), row_bytes);
  });
  for (int64_t k = 0; k < K; k += kTileRows) {
    tile_load<kHigh>(a + k, row_bytes);
    tile_load<kLow>(a + plane + k, row_bytes);
    each_constant(each_vector, [&](auto v) __attribute__((always_inline)) {
      tile_load<kW + v.value>(next.columns[v.value].words + k * 64, 64);
      tile_multiply_add_digits<2 * v.value, kHigh, kW + v.value>();
      tile_multiply_add_digits<2 * v.value + 1, kLow, kW + v.value>();
    });
    last.store_to(last.rows * (k + kTileRows) / K);
    progress.next<1>();
  }
  last.store_to(last.rows);  // without depth
  each_constant(FirstIndices<2 * V>{}, [&](auto tile) __attribute__((always_inline)) {
    tile_store<tile.value>(next.sums[tile.value], 64);
  });
}

FUSEDRNN_INLINE void digit_tile_product(int64_t M, int64_t K, const Digits* a, int64_t lda,
                                        const IntegerColumn* columns, int64_t count, float* c,
                                        int64_t ldc, Addend<float> d, OverlappedWork work) {
  const int64_t words = (K + 63) / 64 * kTileRows;
  const int64_t blocks = (M + kTileRows - 1) / kTileRows * ((count + 1) / 2);
  Progress progress{work, blocks * words / kTileRows};
  TileSums sums[2];
  int which = 0;
  for (int64_t v = 0; v < count; v += 2)
    for (int64_t i = 0; i < M; i += kTileRows, which ^= 1) {
      TileSums& next = sums[which];
      next.a = a + i * lda, next.columns = columns + v, next.c = c + i * ldc;
      next.d = d.data ? d.data + i * d.ld : nullptr;
      next.plane = lda / 2, next.lda = lda, next.ldc = ldc, next.ldd = d.ld;
      next.vectors = min(2, count - v), next.stored = 0;
      const auto multiply = next.vectors == 2 ? multiply_digit_tiles<2> : multiply_digit_tiles<1>;
      multiply(words, next, sums[which ^ 1], progress);
      next.rows = min(kTileRows, M - i);
    }
  sums[which ^ 1].store_to(sums[which ^ 1].rows);
}
#endif

// Of how many rows on tiles are faster.
constexpr int64_t kTileDigits = 7;

// C = A W^T + D for M rows and `count` vectors of rows of W; K values deep.
FUSEDRNN_INLINE void integer_product(int64_t M, int64_t K, const Digits* a, int64_t lda,
                                     const IntegerColumn* columns, int64_t count, float* c,
                                     int64_t ldc, Addend<float> d, OverlappedWork work) {
  (void)work;
  auto addend = [&](int64_t i) __attribute__((always_inline)) {
    return Addend<float>{d.data ? d.data + i * d.ld : nullptr, d.ld};
  };
#if defined(__AMX_INT8__)
  int64_t on_tiles = M / kTileRows * kTileRows;
  if (M - on_tiles >= kTileDigits) on_tiles = M;
  if (on_tiles) digit_tile_product(on_tiles, K, a, lda, columns, count, c, ldc, d, work);
#else
  constexpr int64_t on_tiles = 0;
#endif
  const int64_t words = (K + 3) / 4, rows = M - on_tiles;
  if (rows == 0) return;
  const int64_t each = rows > 3 ? 1 : 4;
  for (int64_t v = 0; v < count; v += each) {
    auto run = [&](auto multiply, int64_t i) __attribute__((always_inline)) {
      multiply(words, a + i * lda, lda, columns + v, c + i * ldc, ldc, addend(i));
    };
    const int64_t vectors = min(each, count - v);
    if (vectors == 1) {
      for (int64_t i = on_tiles; i < M; i += 6) switch (min(6, M - i)) {
          case 1:
            run(multiply_digits<1, 1>, i);
            break;
          case 2:
            run(multiply_digits<2, 1>, i);
            break;
          case 3:
            run(multiply_digits<3, 1>, i);
            break;
          case 4:
            run(multiply_digits<4, 1>, i);
            break;
          case 5:
            run(multiply_digits<5, 1>, i);
            break;
          default:
            run(multiply_digits<6, 1>, i);
        }
    } else {
      auto few = [&](auto vectors_of) __attribute__((always_inline)) {
        constexpr int V = vectors_of.value;
        run(rows == 1   ? multiply_digits<1, V>
            : rows == 2 ? multiply_digits<2, V>
                        : multiply_digits<3, V>,
            on_tiles);
      };
      if (vectors == 2) few(Constant<2>{});
      if (vectors == 3) few(Constant<3>{});
      if (vectors == 4) few(Constant<4>{});
    }
  }
}

}  // namespace
