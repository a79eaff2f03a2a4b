// A team of blocks: who they are, and how they wait for each other.
//
// Blocks of a cluster store into each other's shared memory and count what has come. Those of other
// teams write to global memory and tell each other by flags, one for each block, that count steps.
#pragma once
#include "cuda/persistent/persistent.h"
#include "cuda/primitives.h"

namespace fusedrnn {

// Waits until all `count` flags have reached `value`. All threads of the block; what the flags'
// owners wrote before they raised them is seen by all of them afterwards.
__device__ inline void wait_for(const int* flags, int count, int64_t value) {
  for (int i = threadIdx.x; i < count; i += kPersistentThreads) wait_until(flags + i, int(value));
  __syncthreads();
}

// Says that this block has come to `value`. All threads of the block.
__device__ inline void raise(int* flag, int64_t value) {
  __syncthreads();
  if (threadIdx.x == 0) store_release(flag, int(value));
}

template <bool kCluster>
struct Team {
  int rank, size;
  int64_t index, slice;  // of the team; of its rows of the batch
  int stage;
  int* flags;              // of the team's blocks
  int* own_done;           // this block's: how many steps the stage that follows may read
  const int* before_done;  // the same of the team whose output is read here

  __device__ explicit Team(const Persistent& p) : size(p.shape.team) {
    index = int64_t(blockIdx.x) / size, rank = int(blockIdx.x % size);
    stage = int(index / p.slices), slice = p.first_slice + index % p.slices;
    flags = p.flags + index * size;
    int* done = p.flags + int64_t(p.slices) * p.stages * size;
    own_done = done + blockIdx.x;
    before_done = done + (index - p.slices) * size;  // of stages that have one before them
  }

  // Before the first exchange: every block runs, and has set up its shared memory.
  __device__ void begin() const {
    if constexpr (kCluster) {
      cluster_arrive();
      cluster_wait();
    } else {
      __syncthreads();
    }
  }
  // Of teams that are not clusters: what this block wrote for the others is ready; all have come.
  __device__ void arrive(int64_t step) const { raise(flags + rank, step); }
  __device__ void wait(int64_t step) const { wait_for(flags, size, step); }
};

// How a block of a cluster knows that all others' stores to its shared memory have come: two
// mbarriers in turn, for steps 1, 2, ..., count their bytes. Unlike a cluster's barrier this orders
// nothing else, and needs no fence of all memory.
struct Arrivals {
  Mbarrier* m;
  int bytes;  // of a step

  __device__ Mbarrier* of(int64_t step) const { return m + step % 2; }
  __device__ void begin() const {
    if (threadIdx.x > 0) return;
    for (int i = 0; i < 2; i++) mbarrier_init(m + i, 1);
    mbarrier_init_fence();
    for (int i = 0; i < 2; i++) mbarrier_arrive(m + i, bytes);
  }
  // All threads. The same mbarrier's next step is announced at once: its bytes come when every
  // block has all of the step between, for which this one has to send first.
  __device__ void wait(int64_t step) const {
    mbarrier_wait(of(step), int(step - 1) / 2 % 2);
    if (threadIdx.x == 0) mbarrier_arrive(of(step), bytes);
  }
};

// The one row of the batch and unit that a thread computes the cell of, for all steps.
struct Element {
  int row, unit;   // within the block
  int64_t b, j;    // in the batch, in the layer
  bool in_block;   // there is such a row and unit in the block
  bool exists;     // and in the problem
  int64_t length;  // steps of row b
  int64_t last;    // steps of the longest row that the team runs

  __device__ Element(const Persistent& p, int rank, int64_t slice) {
    const int units = p.shape.units, rows = p.shape.rows, i = int(threadIdx.x);
    row = i / units, unit = i % units;
    b = slice * rows + row, j = int64_t(rank) * units + unit;
    in_block = row < rows;
    exists = in_block && b < p.batch && j < p.hidden_size;
    last = 0;
    for (int r = 0; r < rows; r++) {
      const int64_t other = slice * rows + r;
      if (other < p.batch) last = max(last, length_of(p, other));
    }
    length = exists ? length_of(p, b) : 0;
  }

  static __device__ int64_t length_of(const Persistent& p, int64_t b) {
    return p.lengths ? p.lengths[b] : p.steps;
  }
  static __device__ int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
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
    const int warp = int(threadIdx.x) / 32, sharing = max(1, kPersistentWarps / all_rows);
    row = warp / sharing, rows = kPersistentWarps / sharing;
    lane = warp % sharing * 32 + int(threadIdx.x) % 32, lanes = 32 * sharing;
  }
  static __device__ int max(int a, int b) { return a > b ? a : b; }
};

// The token of row b at step t.
__device__ inline int64_t token_of(const Persistent& p, int64_t t, int64_t b) {
  return (p.offsets ? p.offsets[t] : t * p.batch) + b;
}

// Element `at` of an array of type T; null reads as zero and is not written.
template <class T>
__device__ inline float read(const void* array, int64_t at) {
  return array ? to_compute(static_cast<const T*>(array)[at]) : 0.f;
}
template <class T>
__device__ inline void write(void* array, int64_t at, float value) {
  if (array) static_cast<T*>(array)[at] = from_compute<T>(value);
}

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
