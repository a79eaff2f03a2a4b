// The product of bfloat16 on AMX tiles. One instruction multiplies 16 rows of 32 bfloat16 with
// 32 x 16 of them and adds the products to 16 x 16 float32.
//
// A tile of A is 16 rows of 16 pairs in place; a tile of B is 16 rows of one vector of a packed
// panel. Two tiles of A are multiplied with up to two of B, or one of A with up to four, and the
// sums stay in their tiles for a part of the depth. They start from the addend, so every element is
// one chain of additions however rows are divided. Tiles are full, or as high as StepTiles says: up
// to kSpareRows rows after the last one of A are read, and their sums are not stored.
#pragma once
#include "cpu/product/interface.h"
#include "cpu/product/operand.h"

namespace {

#if defined(__AMX_BF16__)

// Counts the steps of a product over all its blocks, and calls the overlapped work.
struct Progress {
  OverlappedWork work;
  int64_t steps, done = 0;

  template <int kEvery>
  FUSEDRNN_INLINE void next() {
    if (work.run && ++done % kEvery == 0) work.run(work.context, done, steps);
  }
};

// This thread's configuration: the last full_tiles tiles have 16 rows, the others tile_rows.
// 0: tiles are released.
thread_local int tile_rows = 0, full_tiles = 0;

// Configures tiles of 64 bytes a row. Their contents are lost where that changes anything.
FUSEDRNN_INLINE void configure_tiles(int rows, int full) {
  if (rows == tile_rows && full == full_tiles) return;
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; i++)
    config.row_bytes[i] = 64, config.rows[i] = i < 8 - full ? rows : kTileRows;
  asm volatile("ldtilecfg %0" ::"m"(config));
  tile_rows = rows, full_tiles = full;
}

// Its lifetime is that of the thread's tiles, full ones at first. They are released after a call,
// because a thread with tiles in use is expensive to switch.
struct TileSetup {
  TileSetup() { configure_tiles(kTileRows, 8); }
  ~TileSetup() {
    asm volatile("tilerelease");
    tile_rows = full_tiles = 0;
  }
  TileSetup(const TileSetup&) = delete;
};

// The height of tiles in the recurrent products of a step, and during its lifetime the thread's
// configuration for it. Products of pairs take tiles of as many rows as there are, in equal parts:
// for fewer rows these are faster, and no tile is stored through memory. More than one part is an
// even number of them, which are multiplied two at a time.
template <class X>
struct StepTiles {
  static constexpr int64_t height = kTileRows;
  explicit StepTiles(int64_t) {}
};
template <>
struct StepTiles<Pair> {
  int64_t height = kTileRows;

  explicit StepTiles(int64_t rows) {
    if (rows % kTileRows == 0 || rows > 4 * kTileRows) return;
    const int64_t tiles = rows < kTileRows ? 1 : (rows + 2 * kTileRows) / (2 * kTileRows) * 2;
    height = (rows + tiles - 1) / tiles;
    configure_tiles(int(height), rows < kTileRows ? 3 : 2);
  }
  ~StepTiles() {
    if (height < kTileRows) configure_tiles(kTileRows, 8);
  }
  StepTiles(const StepTiles&) = delete;
};

// An instruction encodes the numbers of its tiles, so they are template arguments.
template <int kTile>
FUSEDRNN_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
FUSEDRNN_INLINE void tile_load(const void* source, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(source), "r"(row_bytes), "i"(kTile)
               : "memory");
}
template <int kTile>
FUSEDRNN_INLINE void tile_store(void* target, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(target), "r"(row_bytes), "i"(kTile)
               : "memory");
}
template <int kSum, int kA, int kB>
FUSEDRNN_INLINE void tile_multiply_add() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}

// C = A B + D for R tiles of `height` rows of A, which has `rows` rows, and V panels that hold
// `depth` operands each. K of them, a multiple of 16, are multiplied; rows of C hold `cols`.
template <int R, int V, bool kFull>
__attribute__((noinline)) void multiply_tiles(int64_t K, int64_t depth, int64_t tile_height,
                                              const Pair* a, int64_t lda, const Pair* panels,
                                              int64_t rows, float* c, int64_t ldc, int64_t cols,
                                              Addend<float> d, Progress& progress) {
  const int64_t height = kFull ? kTileRows : tile_height;
  constexpr int kFirstA = 4, kFirstB = kFirstA + R, kBs = 8 - kFirstB;  // used in rotation
  constexpr auto each_row = FirstIndices<R>{};
  constexpr auto each_vector = FirstIndices<V>{};
  constexpr int64_t kSize = sizeof(float);
  float part[kTileRows * kTileRows];
  // f(tile, row, column) for every tile of sums
  auto each_sum = [&](auto f) __attribute__((always_inline)) {
    each_constant(each_row, [&](auto r) __attribute__((always_inline)) {
      each_constant(each_vector, [&](auto v) __attribute__((always_inline)) {
        f(Constant<r.value * V + v.value>{}, r.value * height, v.value * kTileRows);
      });
    });
  };
  auto is_full = [&](int64_t m, int64_t n) __attribute__((always_inline)) {
    return m + height <= rows && n + kTileRows <= cols;
  };

  each_sum([&](auto tile, int64_t m, int64_t n) __attribute__((always_inline)) {
    if (!d.data) {
      tile_zero<tile.value>();
    } else if (is_full(m, n)) {
      tile_load<tile.value>(d.data + m * d.ld + n, d.ld * kSize);
    } else {
      for (int64_t i = 0; i < height && m + i < rows; i++)
        store(part + i * kTileRows, load(d.data + (m + i) * d.ld + n, cols - n));
      tile_load<tile.value>(part, kTileRows * kSize);
    }
  });
  for (int64_t k = 0; k < K; k += kTileRows) {
    each_constant(each_vector, [&](auto v) __attribute__((always_inline)) {
      constexpr int kB = kFirstB + v.value % kBs;
      tile_load<kB>(panels + (v.value * depth + k) * kTileRows, kTileRows * sizeof(Pair));
      each_constant(each_row, [&](auto r) __attribute__((always_inline)) {
        constexpr int kA = kFirstA + r.value;
        if (v.value == 0) tile_load<kA>(a + r.value * height * lda + k, lda * sizeof(Pair));
        tile_multiply_add<r.value * V + v.value, kA, kB>();
      });
    });
    progress.next<4>();
  }
  each_sum([&](auto tile, int64_t m, int64_t n) __attribute__((always_inline)) {
    if (is_full(m, n)) return tile_store<tile.value>(c + m * ldc + n, ldc * kSize);
    tile_store<tile.value>(part, kTileRows * kSize);
    for (int64_t i = 0; i < height && m + i < rows; i++)
      store(c + (m + i) * ldc + n, load(part + i * kTileRows), cols - n);
  });
}

// C [M, N] = A [M, K] B + D. K counts operands. It is cut into parts of the shape's depth, between
// which the sums are in C.
FUSEDRNN_INLINE void tile_product(int64_t M, int64_t N, int64_t K, const Pair* a, int64_t lda,
                                  const Pair* packed, float* c, int64_t ldc, Addend<float> d,
                                  OverlappedWork work, TileShape shape) {
  constexpr int64_t kTwo = 2 * kTileRows;
  const int64_t height = shape.height, two = 2 * height;
  const int64_t pairs = uint32_t(M + height - 1) / uint32_t(two), rest = M - pairs * two;
  const int64_t blocks =
      pairs * ((N + kTwo - 1) / kTwo) + (rest > 0 ? (N + 2 * kTwo - 1) / (2 * kTwo) : 0);
  Progress progress{work, blocks * K / kTileRows};
  for (int64_t k = 0; k == 0 || k < K; k += shape.depth) {
    const int64_t part = min(K - k, shape.depth);
    auto multiply = [&](auto product, int64_t m, int64_t n) __attribute__((always_inline)) {
      product(part, K, height, a + m * lda + k, lda, packed + n * K + k * kTileRows, M - m,
              c + m * ldc + n, ldc, N - n, {d.data ? d.data + m * d.ld + n : nullptr, d.ld},
              progress);
    };
    for (int64_t m = 0; m < pairs * two; m += two)
      for (int64_t n = 0; n < N; n += kTwo)
        multiply(
            N - n > kTileRows
                ? (height == kTileRows ? multiply_tiles<2, 2, true> : multiply_tiles<2, 2, false>)
                : (height == kTileRows ? multiply_tiles<2, 1, true> : multiply_tiles<2, 1, false>),
            m, n);
    for (int64_t n = 0; rest > 0 && n < N; n += 2 * kTwo)
      multiply(
          N - n > 3 * kTileRows
              ? (height == kTileRows ? multiply_tiles<1, 4, true> : multiply_tiles<1, 4, false>)
          : N - n > 2 * kTileRows
              ? (height == kTileRows ? multiply_tiles<1, 3, true> : multiply_tiles<1, 3, false>)
          : N - n > kTileRows
              ? (height == kTileRows ? multiply_tiles<1, 2, true> : multiply_tiles<1, 2, false>)
              : (height == kTileRows ? multiply_tiles<1, 1, true> : multiply_tiles<1, 1, false>),
          pairs * two, n);
    d = {c, ldc};
  }
}

#else

struct TileSetup {
  TileSetup() {}  // so that a variable of it counts as used
};
template <class X>
struct StepTiles {
  static constexpr int64_t height = kTileRows;
  explicit StepTiles(int64_t) {}
};

#endif

}  // namespace
