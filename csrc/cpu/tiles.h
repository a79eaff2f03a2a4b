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

// What a product is added to: rows of stride ld, the same row for all with ld = 0, nothing if null.
template <class C>
struct Addend {
  const C* at;
  int64_t ld;
};

// Other work for the time that tiles take: f(of, part, parts) is called now and then with a growing
// part of `parts`, which is where it should have come to. What is left after the product is for the
// caller, all of it where there are no tiles.
struct Meanwhile {
  void (*f)(void* of, int64_t part, int64_t parts) = nullptr;
  void* of = nullptr;
};

#if defined(__AMX_BF16__)

constexpr int kTileRows = 16;

// The steps of a product that is cut into blocks, and what is done meanwhile.
struct Steps {
  Meanwhile meanwhile;
  int64_t all, done = 0;

  template <int kEvery>
  FUSEDRNN_INLINE void next() {
    if (meanwhile.f && ++done % kEvery == 0) meanwhile.f(meanwhile.of, done, all);
  }
};

// The rows of this thread's tiles before the last `kWhole` ones, which have 16; 0: tiles are free.
thread_local int tile_rows = 0, whole_tiles = 0;

// Makes tiles of 64 bytes a row, `rows` rows each, but the last `whole` ones of 16. What they hold
// is lost if that changes anything.
FUSEDRNN_INLINE void set_tiles(int rows, int whole) {
  if (rows == tile_rows && whole == whole_tiles) return;
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; i++)
    config.row_bytes[i] = 64, config.rows[i] = i < 8 - whole ? rows : kTileRows;
  asm volatile("ldtilecfg %0" ::"m"(config));
  tile_rows = rows, whole_tiles = whole;
}

// While one lives its thread may use tiles, whole ones at first. The rest of the time they are
// released: tiles in use make switching threads dear.
struct TileSetup {
  TileSetup() { set_tiles(kTileRows, 8); }
  ~TileSetup() {
    asm volatile("tilerelease");
    tile_rows = whole_tiles = 0;
  }
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

template <class F, int... I>
FUSEDRNN_INLINE void each_constant(Indices<I...>, F f) {
  (f(Constant<I>{}), ...);
}

// R tiles of rows of A, `rows` of them present, times V panels; K operands deep, a multiple of 16.
// Rows of C hold `cols`.
template <int R, int V>
__attribute__((noinline)) void multiply_tiles(int64_t K, const Pair* a, int64_t lda,
                                              const Pair* panels, int64_t rows, float* c,
                                              int64_t ldc, int64_t cols, Addend<float> d,
                                              Steps& steps_done) {
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
    steps_done.next<4>();
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
                                  const Pair* packed, float* c, int64_t ldc, Addend<float> d,
                                  Meanwhile meanwhile) {
  constexpr int64_t kTwo = 2 * kTileRows;
  const int64_t rest = M % kTwo, paired = rest > kTileRows ? M : M - rest;
  const int64_t blocks = (paired + kTwo - 1) / kTwo * ((N + kTwo - 1) / kTwo) +
                         (paired < M ? (N + 2 * kTwo - 1) / (2 * kTwo) : 0);
  Steps steps{meanwhile, blocks * K / kTileRows};
  auto multiply = [&](auto product, int64_t m, int64_t n) __attribute__((always_inline)) {
    product(K, a + m * lda, lda, packed + n * K, M - m, c + m * ldc + n, ldc, N - n,
            {d.at ? d.at + m * d.ld + n : nullptr, d.ld}, steps);
  };
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

// ---- float32 in three planes ----
//
// Of the nine products of planes six are added: those left out are less than 2^-25 of the whole.
// Sums begin with zero, and what the product is added to follows, so that what is small is not lost
// in what is large. A product with what is not finite is not finite here where in float32 it may
// be, for one plane's infinity meets another's zeros: then a row's sums with a panel are made anew.

constexpr int kNotFinite = 0x99;  // infinities and NaNs, for the instruction that finds them

// A row of A times one panel, of all planes together.
__attribute__((noinline)) Vec<float> multiply_exactly(int64_t steps, const PlanePair* a,
                                                      int64_t plane, const PlanePair* panel) {
  auto first = [](const PlanePair* at) { return bit_cast<Vec<float>>(load(at) << 16); };
  auto second = [](const PlanePair* at) { return bit_cast<Vec<float>>(load(at) & 0xffff0000u); };
  auto whole = [](auto half, const PlanePair* at, int64_t apart) {
    const Vec<float> two = half(at) + half(at + apart);
    // Of infinity, which is in the second plane, nothing is left for the third.
    return bit_cast<Vec<float>>(
        _mm512_mask_add_ps(bit_cast<__m512>(two),
                           _knot_mask16(_mm512_fpclass_ps_mask(bit_cast<__m512>(two), kNotFinite)),
                           bit_cast<__m512>(two), bit_cast<__m512>(half(at + 2 * apart))));
  };
  constexpr int kTile = kTileRows * kTileRows;
  Vec<float> sum{};
  for (int64_t step = 0; step < steps; step++, a += kTileRows, panel += 3 * kTile) {
    const Vec<float> evens = whole(first, a, plane), odds = whole(second, a, plane);
    for (int i = 0; i < kTileRows; i++) {
      sum += evens[i] * whole(first, panel + i * kTileRows, kTile);
      sum += odds[i] * whole(second, panel + i * kTileRows, kTile);
    }
  }
  return sum;
}

// R tiles of `high` rows of A, of which `rows` are present, times V panels; `steps` times 32 values
// deep. Rows of C hold `cols`. Every addition rounds as much as the sum is large: `apart` adds the
// product of the first planes, which is nearly all of it, after the five small ones, and long sums
// round a sixth as often. It reads these planes twice.
template <int R, int V>
__attribute__((noinline)) void multiply_planes(int64_t steps, const PlanePair* a, int64_t lda,
                                               int64_t high, const PlanePair* panels, int64_t rows,
                                               float* c, int64_t ldc, int64_t cols, Addend<float> d,
                                               Steps& steps_done, bool apart) {
  constexpr int kTile = kTileRows * kTileRows, kFirstA = R * V, kFirstB = 8 - (R == 1 ? 1 : V);
  constexpr auto each_row = FirstIndices<R>{};
  constexpr auto each_vector = FirstIndices<V>{};
  constexpr auto each_plane = FirstIndices<3>{};
  const int64_t plane = lda / 3, row_bytes = lda * sizeof(PlanePair);
  const int64_t second = rows > high ? high * lda : 0;  // a tile without rows reads the first one's
  auto load_b = [&](auto tile, int64_t step, int64_t v, int64_t p) __attribute__((always_inline)) {
    tile_load<tile.value>(panels + ((v * steps + step) * 3 + p) * kTile,
                          kTileRows * sizeof(PlanePair));
  };
  each_constant(FirstIndices<R * V>{},
                [&](auto tile) __attribute__((always_inline)) { tile_zero<tile.value>(); });
  // A plane of B, and `count` planes of A from `pa` down that it is multiplied with.
  auto multiply_plane = [&](int64_t step, auto pb, auto pa,
                            auto count) __attribute__((always_inline)) {
    each_constant(each_vector, [&](auto v) __attribute__((always_inline)) {
      load_b(Constant<kFirstB + (R == 1 ? 0 : v.value)>{}, step, v.value, pb.value);
      if constexpr (R == 1)
        each_constant(FirstIndices<count.value>{}, [&](auto i) __attribute__((always_inline)) {
          tile_multiply_add<v.value, kFirstA + pa.value - i.value, kFirstB>();
        });
    });
    if constexpr (R > 1)  // planes of A take turns
      each_constant(FirstIndices<count.value>{}, [&](auto i) __attribute__((always_inline)) {
        each_constant(each_row, [&](auto r) __attribute__((always_inline)) {
          tile_load<kFirstA + r.value>(
              a + step * kTileRows + r.value * second + (pa.value - i.value) * plane, row_bytes);
        });
        each_constant(each_row, [&](auto r) __attribute__((always_inline)) {
          each_constant(each_vector, [&](auto v) __attribute__((always_inline)) {
            tile_multiply_add<r.value * V + v.value, kFirstA + r.value, kFirstB + v.value>();
          });
        });
      });
  };
  auto load_a = [&](int64_t step, auto planes) __attribute__((always_inline)) {
    if constexpr (R == 1)  // all planes of A stay, panels take turns
      each_constant(planes, [&](auto p) __attribute__((always_inline)) {
        tile_load<kFirstA + p.value>(a + step * kTileRows + p.value * plane, row_bytes);
      });
  };
  for (int64_t step = 0; step < steps; step++) {
    load_a(step, each_plane);
    if (apart)
      multiply_plane(step, Constant<0>{}, Constant<2>{}, Constant<2>{});
    else
      multiply_plane(step, Constant<0>{}, Constant<2>{}, Constant<3>{});
    multiply_plane(step, Constant<1>{}, Constant<1>{}, Constant<2>{});
    multiply_plane(step, Constant<2>{}, Constant<0>{}, Constant<1>{});
    steps_done.next<1>();
  }
  for (int64_t step = 0; apart && step < steps; step++) {
    load_a(step, FirstIndices<1>{});
    multiply_plane(step, Constant<0>{}, Constant<0>{}, Constant<1>{});
  }
  float sums[R * V][kTile];
  each_constant(FirstIndices<R * V>{}, [&](auto tile) __attribute__((always_inline)) {
    tile_store<tile.value>(sums[tile.value], kTileRows * sizeof(float));
  });
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) {
      const int64_t n = v * kTileRows;
      for (int64_t i = 0, m = r * high; i < high && m < rows; i++, m++) {
        Vec<float> sum = load(sums[r * V + v] + i * kTileRows);
        // Of a row and a panel, which are the same however the product is divided.
        if (__builtin_expect(_mm512_fpclass_ps_mask(bit_cast<__m512>(sum), kNotFinite), 0))
          sum = multiply_exactly(steps, a + m * lda, plane, panels + v * steps * 3 * kTile);
        store(c + m * ldc + n, d.at ? load(d.at + m * d.ld + n, cols - n) + sum : sum, cols - n);
      }
    }
}

// C [M, N] = A [M, K] B + D as gemm.h's, K operands deep.
FUSEDRNN_INLINE void tile_product(int64_t M, int64_t N, int64_t K, const PlanePair* a, int64_t lda,
                                  const PlanePair* packed, float* c, int64_t ldc, Addend<float> d,
                                  Meanwhile meanwhile, bool apart = false) {
  if (M == 0) return;
  const int64_t steps = K / (3 * kTileRows);
  const bool single = M <= kTileRows;
  const int64_t tiles = single ? 1 : (M + 2 * kTileRows - 1) / (2 * kTileRows) * 2,
                high = (M + tiles - 1) / tiles, block = single ? M : 2 * high;
  set_tiles(high, single ? 1 : 2);
  const int64_t blocks = single ? (N + 4 * kTileRows - 1) / (4 * kTileRows)
                                : tiles / 2 * ((N + 2 * kTileRows - 1) / (2 * kTileRows));
  Steps steps_done{meanwhile, blocks * steps};
  auto multiply = [&](auto product, int64_t m, int64_t n) __attribute__((always_inline)) {
    product(steps, a + m * lda, lda, high, packed + n * K, M - m, c + m * ldc + n, ldc, N - n,
            {d.at ? d.at + m * d.ld + n : nullptr, d.ld}, steps_done, apart);
  };
  for (int64_t n = 0; single && n < N; n += 4 * kTileRows)
    multiply(N - n > 3 * kTileRows   ? multiply_planes<1, 4>
             : N - n > 2 * kTileRows ? multiply_planes<1, 3>
             : N - n > kTileRows     ? multiply_planes<1, 2>
                                     : multiply_planes<1, 1>,
             0, n);
  for (int64_t n = 0; !single && n < N; n += 2 * kTileRows)
    for (int64_t m = 0; m < M; m += block)
      multiply(N - n > kTileRows ? multiply_planes<2, 2> : multiply_planes<2, 1>, m, n);
}

#else

struct TileSetup {
  TileSetup() {}
};

#endif

}  // namespace
