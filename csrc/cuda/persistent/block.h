// A block of a persistent kernel: what of the problem its threads own, how they share out what is
// read and sent, and how they reach the arrays in global memory.
#pragma once
#include "cuda/persistent/product.h"
#include "cuda/persistent/team.h"
#include "cuda/tokens.h"

namespace fusedrnn {

// The one row of the batch and unit that a thread computes the cell of, for all steps.
struct Element {
  int row, unit;   // within the block
  int64_t b, j;    // in the batch, in the layer
  bool in_block;   // there is such a row and unit in the block
  bool exists;     // and in the problem
  int64_t length;  // steps of row b
  int64_t last;    // steps of the longest row that the team runs

  __device__ Element(const Persistent& p, int rank, int64_t slice, int64_t member) {
    const int units = p.shape.units, rows = p.shape.rows, i = int(threadIdx.x);
    row = i / units, unit = i % units;
    b = p.row_at(slice * rows + row, member), j = int64_t(rank) * units + unit;
    in_block = row < rows;
    exists = in_block && b < p.batch && j < p.hidden_size;
    last = 0;
    for (int r = 0; r < rows; r++) {
      const int64_t other = p.row_at(slice * rows + r, member);
      if (other < p.batch && length_of(p, other) > last) last = length_of(p, other);
    }
    length = exists ? length_of(p, b) : 0;
  }
};

// What a thread copies of a block's part, [rows, units], of what a team exchanges: 16 bytes for
// every block `first`, first + every, ... There are at least four times as many threads as such
// pieces.
struct Piece {
  int row, unit;  // of its first element
  int first, every;

  __device__ Piece(const PersistentShape& s, int elements) {
    const int in_row = s.units / elements, pieces = s.rows * in_row, i = int(threadIdx.x);
    row = i % pieces / in_row, unit = i % in_row * elements;
    every = kPersistentThreads / pieces;
    first = i < every * pieces ? i / pieces : s.team;  // too few are left for another block
  }
};

// How threads share out rows that are read whole: a warp takes every so many, or, where there are
// more warps than rows, a part of one.
struct Share {
  int row, rows, lane, lanes;

  __device__ explicit Share(int all_rows) {
    const int warp = int(threadIdx.x) / 32;
    const int sharing = all_rows < kPersistentWarps ? kPersistentWarps / all_rows : 1;
    row = warp / sharing, rows = kPersistentWarps / sharing;
    lane = warp % sharing * 32 + int(threadIdx.x) % 32, lanes = 32 * sharing;
  }
};

__device__ inline float not_a_number() { return bits_to_float(0x7fffffff); }

// Element `at` of an array of type T; null reads as zero and is not written.
template <class T>
__device__ inline float read(const void* array, int64_t at) {
  return array ? to_compute(static_cast<const T*>(array)[at]) : 0.f;
}
template <class T>
__device__ inline void write(void* array, int64_t at, float value) {
  if (array) static_cast<T*>(array)[at] = from_compute<T>(value);
}

// What part of the old value zoneout keeps of element `at`: all or nothing where there is a mask.
__device__ inline float zone_rate(const uint8_t* mask, float rate, int64_t at) {
  return mask ? float(mask[at]) : rate;
}

// What a block of either kernel has. P is its parameters, S the storage type; `vector` elements are
// exchanged at once.
template <class P, class S, bool kCluster>
struct Block {
  const P& p;
  const PersistentShape& s;
  const Team<kCluster> team;
  const Element me;
  const Piece piece;
  char* const shared;

  __device__ Block(const P& p, char* shared, int vector)
      : p(p),
        s(p.shape),
        team(p),
        me(p, team.rank, team.slice, team.member),
        piece(s, vector),
        shared(shared) {}

  __device__ const auto& stage() const { return p.stage[team.stage]; }
  // Whether step t of the stage begins with states of zeros, in this thread's row.
  __device__ bool begins_anew(int64_t t) const {
    return fusedrnn::begins_anew(p, p.resets, stage().reverse, t, me.b, me.length);
  }
  // The factor of recurrent dropout of this thread's unit.
  __device__ float h_factor() const {
    const void* const mask = stage().masks.h_mask;
    return mask && me.exists ? read<float>(mask, me.b * p.hidden_size + me.j) : 1.f;
  }
  // Whether a stage of the launch comes before, and after, this one.
  __device__ bool follows() const { return p.chained && team.stage > 0; }
  __device__ bool feeds_next() const { return p.chained && team.stage + 1 < p.stages; }

  // The row of a bias, or of W, of this team's member.
  __device__ int64_t gate_row(int gate, int64_t j) const {
    return (team.member * p.layout.gates + gate) * p.hidden_size + j;
  }
  // The row of W [members * gates * hidden, hidden] that is row i of the block's, which follow each
  // other gate by gate: `gates` are their numbers.
  __device__ WeightRow weight_row(const int* gates, int i) const {
    static_assert(kMostSlots == 4);
    const int units = s.units, H = int(p.hidden_size);
    const int k = (i >= units) + (i >= 2 * units) + (i >= 3 * units);  // no division
    const int j = team.rank * units + i - k * units;
    return {gate_row(gates[k], j < H ? j : 0) * H, j < H};
  }
};

// Calls f(cell's type, its slots) on the first of `slots`, which are as many as any cell has.
template <class F>
__device__ inline void with_cell_type(Cell cell, float (&slots)[kMostSlots], F f) {
  auto call = [&](auto type) {
    constexpr int kSlots = decltype(type)::kSlots;
    float own[kSlots];
    for (int k = 0; k < kSlots; k++) own[k] = slots[k];
    f(type, own);
    for (int k = 0; k < kSlots; k++) slots[k] = own[k];
  };
  switch (cell) {
#define CELL(mode, type) \
  case Cell::k##type:    \
    call(type{});        \
    break;
#include "cells/cells.inc"
#undef CELL
    default:
      break;
  }
}

}  // namespace fusedrnn
