// Weights in fewer bytes, packed once, which calls multiply in place: their layout, and products
// that widen them to float32.
//
// The rows of a gate lie in blocks of 16; after a block come those of the same units in the other
// gates. A block is [K / n][16] words of 32 bits. A word holds n values of a row, neighbours along
// the sum, the first one in its lowest bits: 4 unsigned bytes, which are 128 + weight / scale of
// the row, or 2 bfloat16. K is rounded up to whole cache lines of a row (Problem::stored_columns).
#pragma once
#include "cpu/call.h"
#include "cpu/product/interface.h"
#include "cpu/product/panels.h"

namespace {

using fusedrnn::GateRangeList;

// A storage type: float32, in calls that multiply words in place.
struct WordFloat {
  float value;
};
template <>
struct Lanes<WordFloat> : Lanes<float> {};

#if defined(__AVX512BF16__)
// The same in calls that pack words as pairs of bfloat16.
struct PairFloat {
  float value;
};
template <>
struct Lanes<PairFloat> : Lanes<float> {};
template <>
struct OperandOf<PairFloat> {
  using type = Pair;
};
#endif

// Whether products of S read the weights where the caller keeps them.
template <class S>
constexpr bool kInPlace = false;
template <>
constexpr bool kInPlace<WordFloat> = true;

// Whether S is for such weights, which only forward takes.
template <class S>
constexpr bool kForwardOnly = kInPlace<S>;
#if defined(__AVX512BF16__)
template <>
constexpr bool kForwardOnly<PairFloat> = true;
#endif

constexpr int kWordRows = 16;  // a multiple of every vector of float32

struct WordMatrix {
  const uint32_t* words;
  const float* scales;  // [gates * rows]; null: bfloat16
  int64_t rows, K;      // of a gate
  int gates;

  bool bytes() const { return scales; }
  FUSEDRNN_INLINE int per_word() const { return bytes() ? 4 : 2; }
  FUSEDRNN_INLINE int64_t used_words() const { return (K + per_word() - 1) / per_word(); }
  // Words of a row, with those that fill the last cache line.
  FUSEDRNN_INLINE int64_t row_words() const {
    return (used_words() + kWordRows - 1) / kWordRows * kWordRows;
  }
  // The first words of rows [unit, unit + a vector) of a gate; those that follow are 16 apart.
  FUSEDRNN_INLINE const uint32_t* vector(int gate, int64_t unit) const {
    return words + (unit / kWordRows * gates + gate) * row_words() * kWordRows + unit % kWordRows;
  }
  FUSEDRNN_INLINE Vec<float> scale(int gate, int64_t unit) const {
    return bytes() ? load(scales + gate * rows + unit, rows - unit) : broadcast<float>(1);
  }
  float at(int gate, int64_t unit, int64_t k) const {
    const int n = per_word(), bits = 32 / n;
    const uint32_t word = vector(gate, unit)[k / n * kWordRows] >> k % n * bits;
    if (!bytes()) return bit_cast<float>(word << 16);
    return (int(word & 0xff) - 128) * scales[gate * rows + unit];
  }
};

// Value kPlace of every word, before the row's scale. Bytes are placed in the fraction of 2^23;
// those of odd places come out 256 times as large.
template <bool kBytes, int kPlace>
FUSEDRNN_INLINE Vec<float> widened(Lanes<float>::UInt words) {
  using UInt = Lanes<float>::UInt;
  if constexpr (!kBytes) {
    return bit_cast<Vec<float>>(kPlace == 0 ? words << 16 : words & 0xffff0000u);
  } else {
    constexpr uint32_t kMask = kPlace % 2 ? 0xff00 : 0xff, kFraction = 0x4b000000;  // 2^23
    constexpr float kZero = 0x1p23f + (kPlace % 2 ? 128 * 256 : 128);
    const UInt bytes = ((kPlace < 2 ? words : words >> 16) & kMask) | kFraction;
    return bit_cast<Vec<float>>(bytes) - kZero;
  }
}
template <bool kBytes, int kPlace>
constexpr float kWidenedUnit = kBytes && kPlace % 2 ? 0x1p-8f : 1;

FUSEDRNN_INLINE Lanes<float>::UInt load_words(const uint32_t* p) {
  Lanes<float>::UInt words;
  std::memcpy(&words, p, sizeof words);
  return words;
}

// Packs vectors of columns of such weights for a product of X: those of vector v are a vector of
// rows of matrix.vector(gate(v), unit(v)).
template <class X, class Gate, class Unit>
void pack_words(X* dst, const WordMatrix& m, int64_t vectors, Gate gate, Unit unit) {
  using P = Panels<X>;
  constexpr int w = P::kWidth;
  for (int64_t v = 0; v < vectors; v++) {
    const int64_t in_panel = v % P::kVectors, panel = v - in_panel;
    const int64_t width = min(vectors - panel, P::kVectors) * w;
    X* const out = dst + panel * w * operands<X>(m.K) + in_panel * w;
    const uint32_t* const words = m.vector(gate(v), unit(v));
    const Vec<float> scale = m.scale(gate(v), unit(v));
    auto value = [&](int64_t k) {
      Vec<float> values{};
      if (k >= m.K) return values;
      const int places = m.per_word(), place = int(k % places);
      const auto found = load_words(words + k / places * kWordRows);
      if (!m.bytes()) return place ? widened<false, 1>(found) : widened<false, 0>(found);
      each_constant(FirstIndices<4>{}, [&](auto p) __attribute__((always_inline)) {
        constexpr int kPlace = p.value;
        if (place == kPlace) values = widened<true, kPlace>(found) * kWidenedUnit<true, kPlace>;
      });
      return values * scale;
    };
    for (int64_t k = 0; k < operands<X>(m.K) / kPlanes<X>; k++) {
      const int64_t first = k * kDepth<X>;
      const Operands<X> both =
          operand<X>(value(first), kDepth<X> > 1 ? value(first + 1) : Vec<float>{});
      for (int p = 0; p < kPlanes<X>; p++) store(out + P::row(k, p) * width, both.plane[p]);
    }
  }
}

// C = A W^T + D for R rows of A and a vector of rows of W. Each place of a word has its own sums.
template <bool kBytes, int R>
__attribute__((noinline)) void multiply_words(const WordMatrix& m, int gate, int64_t unit,
                                              const float* a, int64_t lda, float* c, int64_t ldc,
                                              Addend<float> d) {
  constexpr int kPlaces = kBytes ? 4 : 2;
  const uint32_t* const words = m.vector(gate, unit);
  Vec<float> sums[kPlaces][R] = {};
  auto add = [&](auto p, Lanes<float>::UInt word, int64_t k) __attribute__((always_inline)) {
    const Vec<float> weights = widened<kBytes, p.value>(word);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) sums[p.value][r] += weights * a[r * lda + k];
  };
  int64_t k = 0;
  for (; k + kPlaces <= m.K; k += kPlaces) {
    const auto word = load_words(words + k / kPlaces * kWordRows);
    each_constant(FirstIndices<kPlaces>{},
                  [&](auto p) __attribute__((always_inline)) { add(p, word, k + p.value); });
  }
  if (k < m.K) {
    const auto word = load_words(words + k / kPlaces * kWordRows);
    each_constant(FirstIndices<kPlaces>{}, [&](auto p) __attribute__((always_inline)) {
      if (k + p.value < m.K) add(p, word, k + p.value);
    });
  }
  const Vec<float> scale = m.scale(gate, unit);
  const int64_t n = m.rows - unit;
  for (int r = 0; r < R; r++) {
    Vec<float> even = sums[0][r], odd = sums[1][r];
    if constexpr (kBytes) even += sums[2][r], odd += sums[3][r];
    const Vec<float> sum = (even + odd * kWidenedUnit<kBytes, 1>)*scale;
    store(c + r * ldc, d.data ? load(d.data + r * d.ld, n) + sum : sum, n);
  }
}

template <bool kBytes>
FUSEDRNN_INLINE auto multiply_words_for(int64_t rows) {
  return rows == 1   ? multiply_words<kBytes, 1>
         : rows == 2 ? multiply_words<kBytes, 2>
         : rows == 3 ? multiply_words<kBytes, 3>
                     : multiply_words<kBytes, 4>;
}

FUSEDRNN_INLINE void word_product(const WordMatrix& m, int gate, int64_t unit, int64_t M,
                                  const float* a, int64_t lda, float* c, int64_t ldc,
                                  Addend<float> d) {
  for (int64_t i = 0; i < M; i += 4) {
    const auto multiply =
        m.bytes() ? multiply_words_for<true>(M - i) : multiply_words_for<false>(M - i);
    multiply(m, gate, unit, a + i * lda, lda, c + i * ldc, ldc,
             {d.data ? d.data + i * d.ld : nullptr, d.ld});
  }
}

}  // namespace
