// The product of float32 on AMX tiles, in three planes of bfloat16 (operand.h).
//
// Six of the nine products of planes are added: the others are below 2^-25 of the result. Sums
// start from zero and the addend is added to them, so that small values are not lost in a large
// addend. An infinity in one plane times a zero in another is NaN where the float32 product may be
// infinite: sums that are not finite are computed again (multiply_exactly).
#pragma once
#include "cpu/product/tiles.h"

#if defined(__AMX_BF16__)
namespace {

constexpr int kNotFinite = 0x99;  // the classes of vfpclassps: infinities and NaNs

// One row of A times one panel, with the planes of each value added up first.
__attribute__((noinline)) Vec<float> multiply_exactly(int64_t steps, const PlanePair* a,
                                                      int64_t plane, const PlanePair* panel) {
  auto first = [](const PlanePair* x) { return bit_cast<Vec<float>>(load(x) << 16); };
  auto second = [](const PlanePair* x) { return bit_cast<Vec<float>>(load(x) & 0xffff0000u); };
  auto sum_planes = [](auto half, const PlanePair* x, int64_t stride) {
    const Vec<float> two = half(x) + half(x + stride);
    // Infinity is in the second plane, and the third is NaN then: it is left out.
    return bit_cast<Vec<float>>(
        _mm512_mask_add_ps(bit_cast<__m512>(two),
                           _knot_mask16(_mm512_fpclass_ps_mask(bit_cast<__m512>(two), kNotFinite)),
                           bit_cast<__m512>(two), bit_cast<__m512>(half(x + 2 * stride))));
  };
  constexpr int kTile = kTileRows * kTileRows;
  Vec<float> sum{};
  for (int64_t step = 0; step < steps; step++, a += kTileRows, panel += 3 * kTile) {
    const Vec<float> evens = sum_planes(first, a, plane), odds = sum_planes(second, a, plane);
    for (int i = 0; i < kTileRows; i++) {
      sum += evens[i] * sum_planes(first, panel + i * kTileRows, kTile);
      sum += odds[i] * sum_planes(second, panel + i * kTileRows, kTile);
    }
  }
  return sum;
}

// Computes sums that are not finite again: exactly(m, v) returns those of row m and vector v, so
// the result does not depend on how the product is divided.
template <int R, int V, class Exactly>
FUSEDRNN_INLINE void mend_sums(float (&sums)[R * V][kTileRows * kTileRows], int64_t tile_height,
                               int64_t rows, Exactly exactly) {
  Vec<float> zeros[R * V]{};  // NaN where a sum is not finite
  for (int64_t i = 0; i < tile_height; i++)
#pragma GCC unroll 4
    for (int t = 0; t < R * V; t++) zeros[t] += load(sums[t] + i * kTileRows) * 0;
  for (int t = 1; t < R * V; t++) zeros[0] += zeros[t];
  const __m512 all = bit_cast<__m512>(zeros[0]);
  if (__builtin_expect(!_mm512_cmp_ps_mask(all, all, _CMP_UNORD_Q), 1)) return;
  for (int64_t r = 0; r < R; r++)
    for (int64_t i = 0, m = r * tile_height; i < tile_height && m < rows; i++, m++)
      for (int v = 0; v < V; v++) {
        float* const sum = sums[r * V + v] + i * kTileRows;
        if (_mm512_fpclass_ps_mask(bit_cast<__m512>(load(sum)), kNotFinite))
          store(sum, exactly(m, v));
      }
}

// Stores the first tile every kEvery steps, for nobody to read. A store that has more than some 130
// multiplications before it costs a fifth of a microsecond, unless another one is between.
template <int kEvery>
FUSEDRNN_INLINE void store_early(int64_t step, float* sums) {
  if (step % kEvery == kEvery - 1) tile_store<0>(sums, kTileRows * sizeof(float));
}

// C = A B + D for R tiles of `tile_height` rows of A, which has `rows` rows, and V panels; 32
// values of the sum a step. Rows of C hold `cols`.
//
// An addition rounds in proportion to the sum. kApart adds the product of the first planes, nearly
// all of the sum, after the five small ones: long sums round a sixth as often. It reads the first
// planes twice.
template <int R, int V, bool kApart>
__attribute__((noinline)) void multiply_planes(int64_t steps, const PlanePair* a, int64_t lda,
                                               int64_t tile_height, const PlanePair* panels,
                                               int64_t rows, float* c, int64_t ldc, int64_t cols,
                                               Addend<float> d, Progress& progress) {
  constexpr int kTile = kTileRows * kTileRows, kFirstA = R * V, kFirstB = 8 - (R == 1 ? 1 : V);
  constexpr auto each_row = FirstIndices<R>{};
  constexpr auto each_vector = FirstIndices<V>{};
  const int64_t plane = lda / 3, row_bytes = lda * sizeof(PlanePair);
  // A second tile without rows reads those of the first.
  const int64_t second = rows > tile_height ? tile_height * lda : 0;
  alignas(64) float sums[R * V][kTile];
  auto load_b = [&](auto tile, int64_t step, int64_t v, int64_t p) __attribute__((always_inline)) {
    tile_load<tile.value>(panels + ((v * steps + step) * 3 + p) * kTile,
                          kTileRows * sizeof(PlanePair));
  };
  auto load_a = [&](auto tile, int64_t step, int64_t r, int64_t p) __attribute__((always_inline)) {
    tile_load<tile.value>(a + step * kTileRows + r * second + p * plane, row_bytes);
  };
  each_constant(FirstIndices<R * V>{},
                [&](auto tile) __attribute__((always_inline)) { tile_zero<tile.value>(); });
  // A plane of B times planes of A. One tile of A has all planes loaded; of two, planes take turns
  // in the same tiles, and `held` says which is there already.
  auto multiply_plane = [&](int64_t step, auto pb, auto planes_of_a,
                            auto held) __attribute__((always_inline)) {
    each_constant(each_vector, [&](auto v) __attribute__((always_inline)) {
      load_b(Constant<kFirstB + (R == 1 ? 0 : v.value)>{}, step, v.value, pb.value);
      if constexpr (R == 1)
        each_constant(planes_of_a, [&](auto pa) __attribute__((always_inline)) {
          tile_multiply_add<v.value, kFirstA + pa.value, kFirstB>();
        });
    });
    if constexpr (R > 1)
      each_constant(planes_of_a, [&](auto pa) __attribute__((always_inline)) {
        each_constant(each_row, [&](auto r) __attribute__((always_inline)) {
          if constexpr (pa.value != held.value)
            load_a(Constant<kFirstA + r.value>{}, step, r.value, pa.value);
        });
        each_constant(each_row, [&](auto r) __attribute__((always_inline)) {
          each_constant(each_vector, [&](auto v) __attribute__((always_inline)) {
            tile_multiply_add<r.value * V + v.value, kFirstA + r.value, kFirstB + v.value>();
          });
        });
      });
  };
  auto load_planes = [&](int64_t step, auto planes) __attribute__((always_inline)) {
    if constexpr (R == 1)
      each_constant(planes, [&](auto p) __attribute__((always_inline)) {
        load_a(Constant<kFirstA + p.value>{}, step, 0, p.value);
      });
  };
  constexpr Constant<-1> kNone{};
  for (int64_t step = 0; step < steps; step++) {
    load_planes(step, FirstIndices<3>{});
    // In an order that adds the planes of one value exactly.
    multiply_plane(step, Constant<2>{}, Indices<0>{}, kNone);
    multiply_plane(step, Constant<1>{}, Indices<0, 1>{}, Constant<0>{});
    if constexpr (kApart)
      multiply_plane(step, Constant<0>{}, Indices<1, 2>{}, Constant<1>{});
    else
      multiply_plane(step, Constant<0>{}, Indices<1, 2, 0>{}, Constant<1>{});
    progress.next<1>();
    store_early<4>(step, sums[0]);
  }
  for (int64_t step = 0; kApart && step < steps; step++) {
    load_planes(step, FirstIndices<1>{});
    multiply_plane(step, Constant<0>{}, Indices<0>{}, kNone);
    store_early<24>(step, sums[0]);
  }
  each_constant(FirstIndices<R * V>{}, [&](auto tile) __attribute__((always_inline)) {
    tile_store<tile.value>(sums[tile.value], kTileRows * sizeof(float));
  });
  mend_sums<R, V>(sums, tile_height, rows, [&](int64_t m, int v) __attribute__((always_inline)) {
    return multiply_exactly(steps, a + m * lda, plane, panels + v * steps * 3 * kTile);
  });
  auto store_sums = [&](auto whole, auto adds) __attribute__((always_inline)) {
    for (int64_t r = 0; r < R; r++)
      for (int64_t i = 0, m = r * tile_height; i < tile_height && m < rows; i++, m++)
#pragma GCC unroll 4
        for (int64_t v = 0; v < V; v++) {
          const int64_t n = v * kTileRows, lanes = whole.value ? kTileRows : cols - n;
          Vec<float> sum = load(sums[r * V + v] + i * kTileRows);
          if constexpr (adds.value) sum = load(d.data + m * d.ld + n, lanes) + sum;
          store(c + m * ldc + n, sum, lanes);
        }
  };
  if (!d.data)
    store_sums(Constant<false>{}, Constant<false>{});
  else if (cols < V * kTileRows)
    store_sums(Constant<false>{}, Constant<true>{});
  else
    store_sums(Constant<true>{}, Constant<true>{});
}

// C [M, N] = A [M, K] B + D. K counts operands.
template <bool kApart = false>
FUSEDRNN_INLINE void tile_product(int64_t M, int64_t N, int64_t K, const PlanePair* a, int64_t lda,
                                  const PlanePair* packed, float* c, int64_t ldc, Addend<float> d,
                                  OverlappedWork work, TileShape = {}) {
  if (M == 0) return;
  const int64_t steps = K / (3 * kTileRows);
  const bool single = M <= kTileRows;
  const int64_t tiles = single ? 1 : (M + 2 * kTileRows - 1) / (2 * kTileRows) * 2,
                tile_height = (M + tiles - 1) / tiles, block = single ? M : 2 * tile_height;
  configure_tiles(tile_height, single ? 1 : 2);
  const int64_t blocks = single ? (N + 4 * kTileRows - 1) / (4 * kTileRows)
                                : tiles / 2 * ((N + 2 * kTileRows - 1) / (2 * kTileRows));
  Progress progress{work, blocks * steps};
  auto multiply = [&](auto product, int64_t m, int64_t n) __attribute__((always_inline)) {
    product(steps, a + m * lda, lda, tile_height, packed + n * K, M - m, c + m * ldc + n, ldc,
            N - n, {d.data ? d.data + m * d.ld + n : nullptr, d.ld}, progress);
  };
  for (int64_t n = 0; single && n < N; n += 4 * kTileRows)
    multiply(N - n > 3 * kTileRows   ? multiply_planes<1, 4, kApart>
             : N - n > 2 * kTileRows ? multiply_planes<1, 3, kApart>
             : N - n > kTileRows     ? multiply_planes<1, 2, kApart>
                                     : multiply_planes<1, 1, kApart>,
             0, n);
  for (int64_t n = 0; !single && n < N; n += 2 * kTileRows)
    for (int64_t m = 0; m < M; m += block)
      multiply(N - n > kTileRows ? multiply_planes<2, 2, kApart> : multiply_planes<2, 1, kApart>, m,
               n);
}

}  // namespace
#endif
