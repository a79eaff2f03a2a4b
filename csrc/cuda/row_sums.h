// Adds up rows by the integer that each token has: the gradient of a weight whose input is
// integers.
//
// Tokens are sorted by value first, those of a value in the order of time. Blocks then add up
// chunks of the sorted rows. Of a value that goes on from one chunk to the next, each further chunk
// leaves a partial sum, and these are added in order. The cost grows with the tokens, however many
// values there are and however often one occurs. Every run gives the same bits.
#pragma once
#include "cuda/elementwise.h"
#include "cuda/primitives.h"

namespace fusedrnn {
namespace row_sums {

constexpr int kThreads = 256, kColumns = 128;  // of a block: of the sort, of the sums
constexpr int kAtOnce = 8;                     // loads on their way
constexpr int kPiece = 256;                    // tokens of a run that a block looks at
constexpr int kMostBits = 8, kLeastBits = 3;   // of a digit
constexpr int64_t kMostRuns = 256, kMostChunks = 512, kLeastChunk = 32;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Division {
  int bits, passes;       // of a digit; digits of a value
  int64_t run, runs;      // tokens whose digits a group of threads counts, one for each digit
  int64_t chunk, chunks;  // sorted tokens whose rows a block adds up
};
inline Division divide(int64_t tokens, int64_t width) {
  int bits = 1;  // of `width`, which stands for every integer that is no value
  while (width >> bits) bits++;
  Division d;
  d.passes = int(divide_up(bits, kMostBits));
  d.bits = int(divide_up(bits, d.passes));
  if (d.bits < kLeastBits) d.bits = kLeastBits;
  d.run = kPiece * divide_up(tokens, kPiece * kMostRuns);
  d.runs = divide_up(tokens, d.run);
  d.chunk = divide_up(tokens, kMostChunks);
  if (d.chunk < kLeastChunk) d.chunk = kLeastChunk;
  d.chunks = divide_up(tokens, d.chunk);
  return d;
}

__device__ inline int64_t value_of(const int64_t* values, int64_t width, int64_t token) {
  const int64_t value = values[token];
  return value < 0 || value >= width ? width : value;
}

// ---- sorting: one digit after another, the lowest first ----

struct SortStep {
  const int64_t* values;
  int64_t tokens, width, run, runs;
  int bits, shift;
  const uint32_t* from;  // the tokens by their lower digits; null: in their own order
  uint32_t* to;
  uint32_t* counts;  // [runs, digits]
  // What this launch does; one of a single block does all.
  bool count, place, move;
};

// Calls f(i) for every place of a thread's run where its digit stands, in order. `digits` is shared
// memory, for a piece of each of the block's runs.
template <class F>
__device__ inline void for_each_of_digit(const SortStep& p, uint8_t* digits, F f) {
  const int runs = kThreads >> p.bits, run = int(threadIdx.x) >> p.bits;
  const int mask = (1 << p.bits) - 1, digit = int(threadIdx.x) & mask;
  const int64_t first = int64_t(blockIdx.x) * runs;
  for (int64_t piece = 0; piece < p.run; piece += kPiece) {
    static_assert(kPiece == kThreads);
#pragma unroll 4
    for (int i = 0; i < runs; i++) {
      const int64_t at = (first + i) * p.run + piece + threadIdx.x;
      const int64_t place = at < p.tokens ? at : p.tokens - 1;  // no branch before the loads
      const int64_t token = p.from ? p.from[place] : place;
      digits[i * kPiece + threadIdx.x] =
          uint8_t(value_of(p.values, p.width, token) >> p.shift & mask);
    }
    __syncthreads();
    const int64_t begin = (first + run) * p.run + piece;
    const int64_t count = p.tokens - begin < kPiece ? p.tokens - begin : kPiece;
    const uint8_t* const mine = digits + run * kPiece;
    for (int i = 0; i < count; i += kAtOnce) {
      int found[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; k++) found[k] = mine[i + k];
#pragma unroll
      for (int k = 0; k < kAtOnce; k++)
        if (found[k] == digit && i + k < count) f(begin + i + k);
    }
    __syncthreads();
  }
}

// Turns the counts of a block's threads into where each run's tokens of a digit go: after all of
// lower digits, and of the same digit in earlier runs.
__device__ inline void place_digits(const SortStep& p) {
  FUSEDRNN_STATIC_SHARED(uint32_t, sums, kThreads);
  const int sections = kThreads >> p.bits, section = int(threadIdx.x) >> p.bits;
  const int digits = 1 << p.bits, digit = int(threadIdx.x) & (digits - 1);
  const int64_t each = (p.runs + sections - 1) / sections, begin = section * each;
  const int64_t end = begin + each < p.runs ? begin + each : p.runs;
  uint32_t* const counts = p.counts + digit;
  uint32_t sum = 0;
#pragma unroll 8
  for (int64_t run = begin; run < end; run++) sum += counts[run * digits];
  const int index = digit * sections + section;
  sums[index] = sum;
  __syncthreads();
  uint32_t place = 0;
  for (int i = 0; i < kThreads; i++) place += i < index ? sums[i] : 0;
  for (int64_t run = begin; run < end; run += kAtOnce) {
    uint32_t count[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; k++) count[k] = run + k < end ? counts[(run + k) * digits] : 0;
#pragma unroll
    for (int k = 0; k < kAtOnce; k++) {
      if (run + k < end) counts[(run + k) * digits] = place;
      place += count[k];
    }
  }
}

namespace {
__global__ void sort_kernel(const __grid_constant__ SortStep p) {
  FUSEDRNN_STATIC_SHARED(uint8_t, digits, (kThreads >> kLeastBits) * kPiece);
  const int64_t run = int64_t(blockIdx.x) * (kThreads >> p.bits) + (threadIdx.x >> p.bits);
  uint32_t* const mine = p.counts + (run << p.bits) + (threadIdx.x & ((1 << p.bits) - 1));
  if (p.count) {
    uint32_t count = 0;
    for_each_of_digit(p, digits, [&](int64_t) { count++; });
    if (run < p.runs) *mine = count;
    __syncthreads();
  }
  if (p.place) {
    place_digits(p);
    __syncthreads();
  }
  if (p.move) {
    uint32_t place = run < p.runs ? *mine : 0;
    for_each_of_digit(p, digits,
                      [&](int64_t i) { p.to[place++] = p.from ? p.from[i] : uint32_t(i); });
  }
}
}  // namespace

// Leaves the tokens by value in one of two arrays, which it returns in `sorted`.
inline int sort_tokens(const RowSums& p, const Division& d, uint32_t* (&order)[2], uint32_t* counts,
                       const uint32_t** sorted, void* stream) {
  SortStep step{p.values, p.tokens, p.width, d.run, d.runs, d.bits, 0,
                nullptr,  order[0], counts,  false, false,  false};
  const Grid one{dim3(1), dim3(kThreads)},
      all{dim3(unsigned(divide_up(d.runs, kThreads >> d.bits))), dim3(kThreads)};
  int error = 0;
  for (int pass = 0; pass < d.passes && error == 0; pass++) {
    step.shift = pass * d.bits;
    step.from = pass ? order[1 - pass % 2] : nullptr, step.to = order[pass % 2];
    auto run = [&](const Grid& grid, bool count, bool place, bool move) {
      if (error) return;
      step.count = count, step.place = place, step.move = move;
      error = launch(sort_kernel, grid, stream, step);
    };
    if (all.blocks.x == 1) {
      run(one, true, true, true);
    } else {
      run(all, true, false, false);
      run(one, false, true, false);
      run(all, false, false, true);
    }
  }
  *sorted = step.to;
  return error;
}

// ---- adding ----

template <class C>
struct CompensatedSum {  // Kahan's: a value may have very many tokens
  C value = 0, lost = 0;
  __device__ void add(C x) {
    const C term = x - lost, next = value + term;
    lost = next - value - term;
    value = next;
  }
};

template <class C>
struct Chunks {
  RowSums call;
  int64_t chunk;
  const uint32_t* order;
  C* partial;  // [chunks, columns]

  // Of the sorted token i.
  __device__ int64_t value(int64_t i) const { return value_of(call.values, call.width, order[i]); }
  __device__ int64_t end(int64_t begin) const {
    return begin + chunk < call.tokens ? begin + chunk : call.tokens;
  }
  __device__ C& out(int64_t value, int64_t column) const {
    return static_cast<C*>(call.out)[value * call.columns + column];
  }
};

// A block takes a chunk and kColumns columns.
template <class S>
__global__ void add_chunks_kernel(const __grid_constant__ Chunks<Compute<S>> p) {
  using C = Compute<S>;
  const int64_t column = int64_t(blockIdx.x) * kColumns + threadIdx.x;
  if (column >= p.call.columns) return;
  const int64_t begin = blockIdx.y * p.chunk, end = p.end(begin);
  int64_t value = p.value(begin);
  bool goes_on = begin > 0 && p.value(begin - 1) == value;
  CompensatedSum<C> sum;
  auto finish = [&] {
    if (value == p.call.width) return;
    (goes_on ? p.partial[blockIdx.y * p.call.columns + column] : p.out(value, column)) = sum.value;
  };
  for (int64_t i = begin; i < end; i += kAtOnce) {
    C term[kAtOnce];
    int64_t its_value[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; k++) {
      const int64_t token = p.order[i + k < end ? i + k : i];
      its_value[k] = value_of(p.call.values, p.call.width, token);
      term[k] = to_compute(static_cast<const S*>(p.call.rows)[token * p.call.stride + column]);
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; k++) {
      if (i + k >= end) break;
      if (its_value[k] != value) {
        finish();
        value = its_value[k], goes_on = false, sum = {};
      }
      sum.add(term[k]);
    }
  }
  finish();
}

// A block takes the last value of a chunk, where it begins in it and goes on in the next.
template <class C>
__global__ void add_partial_sums_kernel(const __grid_constant__ Chunks<C> p) {
  const int64_t column = int64_t(blockIdx.x) * kColumns + threadIdx.x;
  if (column >= p.call.columns) return;
  const int64_t begin = blockIdx.y * p.chunk, end = p.end(begin);
  if (end == p.call.tokens) return;
  const int64_t value = p.value(end - 1);
  if (value == p.call.width || p.value(end) != value) return;
  if (begin > 0 && p.value(begin - 1) == value) return;
  C& out = p.out(value, column);
  CompensatedSum<C> sum{out};
  bool goes_on = true;
  for (int64_t next = blockIdx.y + 1; goes_on; next += kAtOnce) {
    C term[kAtOnce];
    int count = 0;
#pragma unroll
    for (int k = 0; k < kAtOnce; k++) {
      const int64_t first = (next + k) * p.chunk;
      goes_on = goes_on && first < p.call.tokens && p.value(first) == value;
      term[k] = goes_on ? p.partial[(next + k) * p.call.columns + column] : 0;
      count += goes_on;
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; k++)
      if (k < count) sum.add(term[k]);
  }
  out = sum.value;
}

}  // namespace row_sums
}  // namespace fusedrnn
