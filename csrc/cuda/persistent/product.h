// The product at the heart of a persistent step: weights that stay in shared memory, times the
// rows of the batch that a block works on.
//
// An engine is a struct that says how a warp multiplies one tile. Weights lie tile by tile, in the
// order in which lanes take them: each lane reads its 16 bytes of a tile at once, side by side with
// the others. x has one padded row for each row of the batch.
#pragma once
#include <type_traits>

#include "cuda/primitives.h"
#include "plan/persistent.h"

namespace fusedrnn {

// Multiply-adds of float32: a lane owns a row of the tile.
template <Engine kEngine>
struct Ffma {
  using Operand = float;
  static constexpr bool kTensorCores = false;
  static constexpr EngineTile kTile = tile_of(kEngine);
  static constexpr int kSums = kTile.columns;  // of a lane

  static __device__ inline int row(int lane, int) { return lane; }
  static __device__ inline int depth(int, int element) { return element; }
  static __device__ inline Operand operand(float x) { return x; }
  static __device__ inline Operand rounded(Operand x) { return x; }

  // sums[i] += tile i times x, for the rows x, x + x_row, ...
  template <int N>
  static __device__ inline void multiply(float (&sums)[N][kSums], const Words (&tile)[N],
                                         const Operand* x, int x_row, int) {
#pragma unroll
    for (int n = 0; n < kSums; n++) {
      const Words part = *reinterpret_cast<const Words*>(x + n * x_row);
#pragma unroll
      for (int i = 0; i < N; i++)
#pragma unroll
        for (int k = 0; k < 4; k++)
          sums[i][n] += bits_to_float(tile[i].word[k]) * bits_to_float(part.word[k]);
    }
  }
  // Which row and column a lane's sum belongs to.
  static __device__ inline int sum_row(int lane, int) { return lane; }
  static __device__ inline int sum_column(int, int sum) { return sum; }
};

// What tensor cores have in common: the layout of mma's accumulators.
struct MmaSums {
  static constexpr bool kTensorCores = true;
  static constexpr int kSums = 4;
  static __device__ inline int sum_row(int lane, int sum) { return lane / 4 + sum / 2 * 8; }
  static __device__ inline int sum_column(int lane, int sum) { return lane % 4 * 2 + sum % 2; }
};

struct Tf32 : MmaSums {
  using Operand = float;
  static constexpr EngineTile kTile = tile_of(Engine::kTf32);
  static __device__ inline int row(int lane, int element) { return lane / 4 + element % 2 * 8; }
  static __device__ inline int depth(int lane, int element) { return lane % 4 + element / 2 * 4; }
  static __device__ inline Operand operand(float x) { return bits_to_float(to_tf32(x)); }
  static __device__ inline Operand rounded(Operand x) { return operand(x); }

  template <int N>
  static __device__ inline void multiply(float (&sums)[N][kSums], const Words (&tile)[N],
                                         const Operand* x, int x_row, int lane) {
    const Operand* mine = x + lane / 4 * x_row + lane % 4;
    const uint32_t b[2] = {float_to_bits(mine[0]), float_to_bits(mine[4])};
#pragma unroll
    for (int i = 0; i < N; i++) mma_tf32(sums[i], tile[i].word, b);
  }
};

template <class S>
struct Half : MmaSums {
  using Operand = S;
  static constexpr EngineTile kTile = tile_of(Engine::kHalf);
  static __device__ inline int row(int lane, int element) { return lane / 4 + element / 2 % 2 * 8; }
  static __device__ inline int depth(int lane, int element) {
    return lane % 4 * 2 + element % 2 + element / 4 * 8;
  }
  static __device__ inline Operand operand(float x) { return from_compute<S>(x); }
  static __device__ inline Operand rounded(Operand x) { return x; }

  template <int N>
  static __device__ inline void multiply(float (&sums)[N][kSums], const Words (&tile)[N],
                                         const Operand* x, int x_row, int lane) {
    const Operand* mine = x + lane / 4 * x_row + lane % 4 * 2;
    const uint32_t b[2] = {*reinterpret_cast<const uint32_t*>(mine),
                           *reinterpret_cast<const uint32_t*>(mine + 8)};
#pragma unroll
    for (int i = 0; i < N; i++) mma(S{}, sums[i], tile[i].word, b);
  }
};

// Whether this pass of the compiler is for a GPU that can run a kernel.
template <class E, bool kCluster>
constexpr bool kCanRun =
    (FUSEDRNN_HAS_CLUSTERS || !kCluster) && (FUSEDRNN_HAS_TENSOR_CORES || !E::kTensorCores);

// A row of a matrix of weights: where it begins, in elements. One that the layer lacks counts as
// zeros, and begins where another one does.
struct WeightRow {
  int64_t begin;
  bool exists;
};

// Fills the tiles with row(0), row(1), ... of the matrix w, `rows` rows of `columns` elements side
// by side, which become the rows of the tiles or, transposed, their columns. The rest of the tiles
// is zero. Loads have no condition, so that all of a lane are on their way together: outside the
// matrix the nearest element is read. All threads of the block.
template <class E, bool kTransposed, class F>
__device__ inline void load_weights(char* shared, const ProductShape& s, const void* w, int rows,
                                    int columns, F row) {
  using Operand = typename E::Operand;
  constexpr int kElements = 16 / sizeof(Operand), kAtOnce = 4;  // tiles of a warp
  const Operand* const matrix = static_cast<const Operand*>(w);
  Words* const tiles = reinterpret_cast<Words*>(shared + s.weights);
  const int lane = threadIdx.x % 32, count = s.row_tiles * s.depth_tiles;
  for (int first = threadIdx.x / 32; first < count; first += kAtOnce * kPersistentWarps) {
    Operand elements[kAtOnce][kElements];
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
      const int tile = first + i * kPersistentWarps, depth_tile = tile / s.row_tiles;
      const int row_tile = tile - depth_tile * s.row_tiles;
#pragma unroll
      for (int e = 0; e < kElements; e++) {
        const int tile_row = row_tile * E::kTile.rows + E::row(lane, e);
        const int depth = depth_tile * E::kTile.depth + E::depth(lane, e);
        const int outer = kTransposed ? depth : tile_row, inner = kTransposed ? tile_row : depth;
        const WeightRow from = row(outer < rows ? outer : rows - 1);
        const Operand value = matrix[from.begin + (inner < columns ? inner : columns - 1)];
        const bool inside = from.exists && outer < rows && inner < columns;
        elements[i][e] = inside ? value : Operand(from_compute<Operand>(0));
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; i++) {
#pragma unroll
      for (int e = 0; e < kElements; e++) elements[i][e] = E::rounded(elements[i][e]);
      Words words;
      memcpy(&words, elements[i], sizeof words);
      const int tile = first + i * kPersistentWarps;
      if (tile < count) tiles[tile * 32 + lane] = words;
    }
  }
}

template <int N>
struct Count {
  static constexpr int kValue = N;
};

// sums += N rows of tiles, which begin at `from` one after the other, times the first
// E::kTile.columns rows of x.
template <class E, int N>
__device__ inline void multiply_tiles(float (&sums)[N][E::kSums], const Words* from, int next,
                                      int count, const typename E::Operand* x, int x_row,
                                      int lane) {
#pragma unroll 4
  for (int k = 0; k < count; k++, from += next, x += E::kTile.depth) {
    Words tile[N];
#pragma unroll
    for (int i = 0; i < N; i++) tile[i] = from[i * 32];
    E::multiply(sums, tile, x, x_row, lane);
  }
}

// Which tiles of a product are a warp's: of rows `first`, first + every, ... and as many more as
// kTilesAtOnce, the depth from `begin` to `end`.
struct WarpTiles {
  int part, first, every, begin, end;

  __device__ explicit WarpTiles(const ProductShape& s) {
    const int warp = int(threadIdx.x / 32);
    part = warp & (s.split - 1);
    first = (warp >> s.split_bits) * kTilesAtOnce;
    every = (kPersistentWarps >> s.split_bits) * kTilesAtOnce;
    begin = s.depth_tiles * part >> s.split_bits;
    end = s.depth_tiles * (part + 1) >> s.split_bits;
  }
};

// The first tiles of a warp, s.kept deep, which its threads keep in registers: every index is known
// when the kernel is compiled.
template <class E>
struct KeptWeights {
  static constexpr int kMost = E::kTile.kept;
  static_assert(kMost == 8);
  Words tile[kMost][kTilesAtOnce];

  __device__ KeptWeights(const char* shared, const ProductShape& s) {
    const WarpTiles mine(s);
    const Words* const from = reinterpret_cast<const Words*>(shared + s.weights) +
                              (mine.begin * s.row_tiles + mine.first) * 32 + threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < kMost; k++)
#pragma unroll
      for (int i = 0; i < kTilesAtOnce; i++)
        tile[k][i] =
            k < s.kept && mine.first + i < s.row_tiles ? from[(k * s.row_tiles + i) * 32] : Words{};
  }

  // As multiply_tiles, of the first N rows of tiles and the depth that is kept.
  template <int N>
  __device__ void multiply(float (&sums)[N][E::kSums], int depth, const typename E::Operand* x,
                           int x_row, int lane) const {
    auto first = [&](auto count) {
#pragma unroll
      for (int k = 0; k < decltype(count)::kValue; k++) {
        Words some[N];
#pragma unroll
        for (int i = 0; i < N; i++) some[i] = tile[k][i];
        E::multiply(sums, some, x + k * E::kTile.depth, x_row, lane);
      }
    };
    switch (depth) {
      case 1:
        return first(Count<1>{});
      case 2:
        return first(Count<2>{});
      case 4:
        return first(Count<4>{});
      default:
        return first(Count<8>{});
    }
  }
};
struct NoneKept {
  NoneKept() = default;
  __device__ NoneKept(const char*, const ProductShape&) {}
};
template <class E>
using Kept = std::conditional_t<(E::kTile.kept > 0), KeptWeights<E>, NoneKept>;

// partial[part][row of the batch][row of weights] = weights x, for all `rows` rows of the batch.
// What it reads and what it writes is the caller's to order, by barriers before and after.
template <class E, class K>
__device__ inline void multiply(char* shared, const ProductShape& s, const K& kept, int rows,
                                const typename E::Operand* x, int x_row) {
  const Words* tiles = reinterpret_cast<const Words*>(shared + s.weights);
  float* partial = reinterpret_cast<float*>(shared + s.partial);
  const int lane = threadIdx.x % 32;
  const WarpTiles mine(s);
  for (int n = 0; n < rows; n += E::kTile.columns) {
    float* to = partial + (mine.part * rows + n) * s.partial_row;
    const typename E::Operand* xs = x + n * x_row + mine.begin * E::kTile.depth;
    auto multiply_from = [&](int r, auto at_once) {
      constexpr int kRows = decltype(at_once)::kValue;
      float sums[kRows][E::kSums] = {};
      int done = 0;
      if constexpr (std::is_same_v<K, KeptWeights<E>>)
        if (r == mine.first) kept.multiply(sums, done = s.kept, xs, x_row, lane);
      multiply_tiles<E>(sums, tiles + ((mine.begin + done) * s.row_tiles + r) * 32 + lane,
                        s.row_tiles * 32, mine.end - mine.begin - done, xs + done * E::kTile.depth,
                        x_row, lane);
#pragma unroll
      for (int i = 0; i < kRows; i++)
#pragma unroll
        for (int j = 0; j < E::kSums; j++)
          to[E::sum_column(lane, j) * s.partial_row + (r + i) * E::kTile.rows +
             E::sum_row(lane, j)] = sums[i][j];
    };
    for (int r = mine.first; r < s.row_tiles; r += mine.every)
      if (r + 1 < s.row_tiles)
        multiply_from(r, Count<kTilesAtOnce>{});
      else
        multiply_from(r, Count<1>{});
  }
}

// Calls f with the number of parts as a constant: with it, loads come before additions.
template <class F>
__device__ inline void with_split(const ProductShape& s, F f) {
  static_assert(kPersistentWarps == 8);
  switch (s.split_bits) {
    case 0:
      return f(Count<1>{});
    case 1:
      return f(Count<2>{});
    case 2:
      return f(Count<4>{});
    default:
      return f(Count<8>{});
  }
}

// sums[k]: of all parts, in their order, element offset[k] of row n of the batch.
template <int N>
__device__ inline void totals(float (&sums)[N], const char* shared, const ProductShape& s, int rows,
                              int n, const int (&offset)[N]) {
  const float* at = reinterpret_cast<const float*>(shared + s.partial) + n * s.partial_row;
  const int from_part = rows * s.partial_row;
  with_split(s, [&](auto split) {
    constexpr int kSplit = decltype(split)::kValue;
    float parts[kSplit][N];
#pragma unroll
    for (int i = 0; i < kSplit; i++)
#pragma unroll
      for (int k = 0; k < N; k++) parts[i][k] = at[i * from_part + offset[k]];
#pragma unroll
    for (int k = 0; k < N; k++) {
      sums[k] = parts[0][k];
#pragma unroll
      for (int i = 1; i < kSplit; i++) sums[k] += parts[i][k];
    }
  });
}

}  // namespace fusedrnn
