// The product of gemm.h on AMX tiles: 16 x 16 sums of float32, to which an instruction adds what 16
// rows of 32 bfloat16 make with 32 x 16 of them.
//
// A tile of A is 16 rows of 16 pairs, as they lie; one of B 16 rows of one vector of a packed
// panel. Up to two of A meet up to two of B, or one of A up to four, and the sums stay in their
// tiles for the whole depth. They begin with what the product is added to, so that every element is
// one chain however rows are divided. Tiles are always whole: rows of A behind the last are read,
// up to kSpareRows of them, and make sums that are not stored.
#pragma once
#include "cpu/simd.h"

namespace {

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

// What a product is added to: rows of stride ld, the same row for all with ld = 0, nothing if null.
template <class C>
struct Addend {
  const C* at;
  int64_t ld;
};

#if defined(__AMX_BF16__)

constexpr int kTileRows = 16;

// While one lives its thread may use tiles, all of 16 rows of 64 bytes. The rest of the time they
// are released: tiles in use make switching threads dear.
class TileSetup {
 public:
  TileSetup() {
    struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = kTileRows;
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileSetup() { asm volatile("tilerelease"); }
  TileSetup(const TileSetup&) = delete;
};

// Tiles are numbers in the instruction, which is why they are template arguments here.
template <int kTile>
FUSEDRNN_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
FUSEDRNN_INLINE void tile_load(const void* at, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(at), "r"(row_bytes), "i"(kTile) : "memory");
}
template <int kTile>
FUSEDRNN_INLINE void tile_store(void* at, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(at), "r"(row_bytes), "i"(kTile) : "memory");
}
template <int kSum, int kA, int kB>
FUSEDRNN_INLINE void tile_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}

template <int I>
struct Constant {
  static constexpr int value = I;
};
template <class F, int... I>
FUSEDRNN_INLINE void each_constant(Indices<I...>, F f) {
  (f(Constant<I>{}), ...);
}

// R tiles of rows of A, `rows` of them present, times V panels; K operands deep, a multiple of 16.
// Rows of C hold `cols`.
template <int R, int V>
__attribute__((noinline)) void multiply_tiles(int64_t K, const Pair* a, int64_t lda,
                                              const Pair* panels, int64_t rows, float* c,
                                              int64_t ldc, int64_t cols, Addend<float> d) {
  constexpr int kFirstA = R * V, kFirstB = kFirstA + R;
  constexpr int kBs = 8 - kFirstB < V ? 8 - kFirstB : V;  // tiles that take turns
  constexpr auto each_row = FirstIndices<R>{};
  constexpr auto each_vector = FirstIndices<V>{};
  constexpr int64_t kSize = sizeof(float);
  float part[kTileRows * kTileRows];
  // f(its tile, its place in C, its rows and columns) of every tile of sums
  auto each_sum = [&](auto f) __attribute__((always_inline)) {
    each_constant(each_row, [&](auto r) __attribute__((always_inline)) {
      each_constant(each_vector, [&](auto v) __attribute__((always_inline)) {
        f(Constant<r.value * V + v.value>{}, r.value * kTileRows, v.value * kTileRows);
      });
    });
  };
  auto whole = [&](int64_t m, int64_t n) __attribute__((always_inline)) {
    return m + kTileRows <= rows && n + kTileRows <= cols;
  };

  each_sum([&](auto tile, int64_t m, int64_t n) __attribute__((always_inline)) {
    if (!d.at) {
      tile_zero<tile.value>();
    } else if (whole(m, n)) {
      tile_load<tile.value>(d.at + m * d.ld + n, d.ld * kSize);
    } else {
      for (int64_t i = 0; i < kTileRows && m + i < rows; i++)
        store(part + i * kTileRows, load(d.at + (m + i) * d.ld + n, cols - n));
      tile_load<tile.value>(part, kTileRows * kSize);
    }
  });
  for (int64_t k = 0; k < K; k += kTileRows) {
    each_constant(each_vector, [&](auto v) __attribute__((always_inline)) {
      constexpr int kB = kFirstB + v.value % kBs;
      tile_load<kB>(panels + (v.value * K + k) * kTileRows, kTileRows * sizeof(Pair));
      each_constant(each_row, [&](auto r) __attribute__((always_inline)) {
        constexpr int kA = kFirstA + r.value;
        if (v.value == 0) tile_load<kA>(a + r.value * kTileRows * lda + k, lda * sizeof(Pair));
        tile_multiply_add<r.value * V + v.value, kA, kB>();
      });
    });
  }
  each_sum([&](auto tile, int64_t m, int64_t n) __attribute__((always_inline)) {
    if (whole(m, n)) return tile_store<tile.value>(c + m * ldc + n, ldc * kSize);
    tile_store<tile.value>(part, kTileRows * kSize);
    for (int64_t i = 0; i < kTileRows && m + i < rows; i++)
      store(c + (m + i) * ldc + n, load(part + i * kTileRows), cols - n);
  });
}

// C [M, N] = A [M, K] B + D as gemm.h's, K operands deep.
FUSEDRNN_INLINE void tile_product(int64_t M, int64_t N, int64_t K, const Pair* a, int64_t lda,
                                  const Pair* packed, float* c, int64_t ldc, Addend<float> d) {
  auto multiply = [&](auto product, int64_t m, int64_t n) __attribute__((always_inline)) {
    product(K, a + m * lda, lda, packed + n * K, M - m, c + m * ldc + n, ldc, N - n,
            {d.at ? d.at + m * d.ld + n : nullptr, d.ld});
  };
  constexpr int64_t kTwo = 2 * kTileRows;
  const int64_t rest = M % kTwo, paired = rest > kTileRows ? M : M - rest;
  for (int64_t n = 0; n < N; n += kTwo)
    for (int64_t m = 0; m < paired; m += kTwo)
      multiply(N - n > kTileRows ? multiply_tiles<2, 2> : multiply_tiles<2, 1>, m, n);
  for (int64_t n = 0; paired < M && n < N; n += 2 * kTwo)
    multiply(N - n > 3 * kTileRows   ? multiply_tiles<1, 4>
             : N - n > 2 * kTileRows ? multiply_tiles<1, 3>
             : N - n > kTileRows     ? multiply_tiles<1, 2>
                                     : multiply_tiles<1, 1>,
             paired, n);
}

#else

struct TileSetup {
  TileSetup() {}
};

#endif

}  // namespace
