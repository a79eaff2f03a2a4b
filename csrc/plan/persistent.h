// How the persistent kernels divide a layer among blocks, and how a block divides its shared
// memory: pure functions of sizes.
//
// A team of `team` blocks runs one layer in one direction for `rows` rows of the batch. Each block
// owns `units` hidden units with all their gates and keeps their weights in shared memory, and part
// of them in registers too, for all steps. A team of one block keeps all else there too: nothing is
// exchanged.
#pragma once
#include <cstdint>

#include "plan/problem.h"

namespace fusedrnn {

// What multiplies: float32 by FFMA, for 8 rows of the batch at a time or for 2, and by tensor cores
// for the rest.
enum class Engine : int { kFfma, kFfmaNarrow, kTf32, kHalf, kCount };

// A tile of weights is 512 bytes, 16 of each lane: `rows` of the matrix, `depth` columns. It is
// multiplied with `columns` rows of the batch. The tiles that a warp multiplies first stay in its
// registers: kTilesAtOnce rows, of a depth of 1, 2, 4 or 8, but at most `kept`. FFMA for 8 rows
// keeps none: it gains little by it, and spills on sm_100.
struct EngineTile {
  int rows, depth, columns, operand_bytes, kept;
};
FUSEDRNN_HD constexpr EngineTile tile_of(Engine e) {
  return e == Engine::kFfma         ? EngineTile{32, 4, 8, 4, 0}
         : e == Engine::kFfmaNarrow ? EngineTile{32, 4, 2, 4, 8}
         : e == Engine::kTf32       ? EngineTile{16, 8, 8, 4, 8}
                                    : EngineTile{16, 16, 8, 2, 8};
}

constexpr int kLargestCluster = 16;
constexpr int kMaxStages = 16;  // layers and directions of a persistent launch
constexpr int kPersistentThreads = 256, kPersistentWarps = kPersistentThreads / 32;
constexpr int kTileBytes = 512;
constexpr int kTilesAtOnce = 2;  // rows of tiles that a warp multiplies with what it loads of x

// Weights [rows, depth] times x [depth, batch rows] in shared memory: warps share out the rows of
// tiles and, `split` ways, the depth; the sums of each part stand in `partial` on their own.
struct ProductShape {
  int row_tiles, depth_tiles, split, split_bits;  // split = 1 << split_bits
  int kept;                                       // tiles of depth that a warp has in registers
  int weights, partial;                           // where they begin, in bytes
  int partial_row;                                // floats from one row of the batch to the next
};

struct PersistentShape {
  int team, units, rows;
  int x_rows;                     // rows, up to as many as the engine takes at a time: zeros
  int x_row;                      // operands from one row of the batch to the next
  int input_row;                  // the same of the input of a chained layer
  ProductShape recurrent, input;  // the second of chained layers only
  int x, input_x;                 // where they begin, in bytes
  int staging;                    // forward, of teams of several blocks
  int inbox;                      // backward, of clusters
  int arrivals;                   // of clusters: two mbarriers
  int shared_bytes;
};

constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }
constexpr int round_up(int a, int b) { return divide_up(a, b) * b; }

// Four words more than a multiple of 32: lanes that read neighbouring rows hit other banks.
constexpr int padded_row(int elements, int bytes) {
  return (round_up(elements * bytes, 128) + 16) / bytes;
}

// Hands out consecutive arrays of a block's shared memory.
struct SharedMemory {
  int used = 0;
  int take(int bytes) {
    const int begin = used;
    used += round_up(bytes, 128);
    return begin;
  }
};

inline ProductShape product_shape(const EngineTile& tile, int rows, int depth, int units) {
  ProductShape s{};
  s.row_tiles = divide_up(rows, tile.rows), s.depth_tiles = divide_up(depth, tile.depth);
  // As few parts of the depth as keep every warp busy: each costs a sum to store and to add.
  int groups = 1;
  while (groups < kPersistentWarps && groups * 2 <= divide_up(s.row_tiles, kTilesAtOnce))
    groups *= 2;
  s.split = kPersistentWarps / groups;
  while (s.split > s.depth_tiles) s.split /= 2;
  while (1 << s.split_bits < s.split) s.split_bits++;
  s.kept = tile.kept;
  while (s.kept * s.split > s.depth_tiles) s.kept /= 2;
  // Other banks for the next row of the batch: as FFMA's threads read it, `units` after `units` of
  // a row, and as tensor cores' lanes store it.
  const int pad = tile.rows == 32 && units < 32 ? units : 4;
  s.partial_row = s.row_tiles * tile.rows + pad;
  return s;
}

// `chained`: the layer's input is the output of the layer below in the same launch, of as many
// features as it has units itself.
inline PersistentShape forward_shape(Cell cell, Engine engine, bool cluster, int hidden_size,
                                     int units, int rows, bool chained) {
  const EngineTile tile = tile_of(engine);
  PersistentShape s{};
  s.team = divide_up(hidden_size, units), s.units = units;
  s.rows = rows, s.x_rows = round_up(rows, tile.columns);
  const int gate_rows = traits(cell).gates * units;
  s.recurrent = product_shape(tile, gate_rows, hidden_size, units);
  s.input = s.recurrent, s.input.kept = 0;
  const int all = s.team * units, read = s.recurrent.depth_tiles * tile.depth;
  s.x_row = s.input_row = padded_row(all > read ? all : read, tile.operand_bytes);
  SharedMemory memory;
  const int weights = s.recurrent.row_tiles * s.recurrent.depth_tiles * kTileBytes;
  s.recurrent.weights = memory.take(weights);
  s.input.weights = chained ? memory.take(weights) : 0;
  s.x = memory.take((cluster ? 2 : 1) * s.x_rows * s.x_row * tile.operand_bytes);
  s.input_x = chained ? memory.take(s.x_rows * s.x_row * tile.operand_bytes) : 0;
  s.recurrent.partial = s.input.partial =
      memory.take(s.recurrent.split * s.x_rows * s.recurrent.partial_row * 4);
  s.staging = memory.take(s.team > 1 ? s.rows * units * tile.operand_bytes : 0);
  s.arrivals = memory.take(cluster ? 16 : 0);
  s.shared_bytes = memory.used;
  return s;
}

// What a block gets in a backward step from all blocks of its team: sums for its own units and,
// where a layer below is chained, for those of that layer.
FUSEDRNN_HD constexpr int inbox_floats(const PersistentShape& s, bool chained) {
  return (chained ? 2 : 1) * s.team * s.rows * s.units;
}

// The transposed products: from the gradients of a block's own gates to partial sums for every unit
// of the layer and, where a layer below is chained, of that layer.
inline PersistentShape backward_shape(Cell cell, Engine engine, bool cluster, int hidden_size,
                                      int units, int rows, bool chained) {
  const EngineTile tile = tile_of(engine);
  PersistentShape s{};
  s.team = divide_up(hidden_size, units), s.units = units;
  s.rows = rows, s.x_rows = round_up(rows, tile.columns);
  s.recurrent = product_shape(tile, s.team * units, traits(cell).gates * units, units);
  s.input = s.recurrent, s.input.kept = 0;
  // Slots before the recurrent ones come on top of a depth that is a whole number of tiles.
  const int first = (traits(cell).slots - traits(cell).gates) * units;
  s.x_row = padded_row(first + s.recurrent.depth_tiles * tile.depth, tile.operand_bytes);
  SharedMemory memory;
  const int weights = s.recurrent.row_tiles * s.recurrent.depth_tiles * kTileBytes;
  const int partial = s.recurrent.split * s.x_rows * s.recurrent.partial_row * 4;
  s.recurrent.weights = memory.take(weights);
  s.input.weights = chained ? memory.take(weights) : 0;
  s.x = memory.take(s.x_rows * s.x_row * tile.operand_bytes);
  s.recurrent.partial = memory.take(partial);
  s.input.partial = chained ? memory.take(partial) : 0;
  s.inbox = memory.take(cluster ? 2 * inbox_floats(s, chained) * 4 : 0);
  s.arrivals = memory.take(cluster ? 16 : 0);
  s.shared_bytes = memory.used;
  return s;
}

}  // namespace fusedrnn
