// A step of the cells with layer normalisation, whose means and variances are sums over all units
// of a row: a block takes a row of the batch, and a thread of it the units j, j + kThreads, ...
// What a thread writes for the next pass over its units, nobody else reads.
#pragma once
#include "cuda/dispatch.h"
#include "cuda/stepwise/step.h"

namespace fusedrnn {
namespace normed {

constexpr int kThreads = 128;

// Replaces each value by its sum over the threads of the block, in a fixed order. All threads.
template <int N, class C>
__device__ inline void add_up(C (&values)[N]) {
  FUSEDRNN_STATIC_SHARED(C, sums, N * kThreads);
  const int i = threadIdx.x;
  __syncthreads();  // the last ones have been read
#pragma unroll
  for (int k = 0; k < N; k++) sums[k * kThreads + i] = values[k];
  for (int n = kThreads / 2; n > 0; n /= 2) {
    __syncthreads();
    if (i < n)
#pragma unroll
      for (int k = 0; k < N; k++) sums[k * kThreads + i] += sums[k * kThreads + i + n];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < N; k++) values[k] = sums[k * kThreads];
}

template <int N, class C>
__device__ inline void add_up(Dual<C> (&values)[N]) {
  C all[2 * N];
#pragma unroll
  for (int k = 0; k < N; k++) all[2 * k] = values[k].value, all[2 * k + 1] = values[k].tangent;
  add_up(all);
#pragma unroll
  for (int k = 0; k < N; k++) values[k] = {all[2 * k], all[2 * k + 1]};
}

// An element of an array that is not null.
template <class T>
__device__ inline Compute<T> load(const void* array, int64_t at) {
  return to_compute(static_cast<const T*>(array)[at]);
}

// f(unit) for the units of this thread. f has loads of all gates, which are on their way together;
// unrolled, the kernels would be several times as large.
template <class F>
__device__ inline void each_unit(int64_t H, F f) {
#pragma unroll 1
  for (int64_t j = threadIdx.x; j < H; j += kThreads) f(j);
}

// f(b, anew, unit0) for the rows of this block that have this step, whose weights are those of the
// units from unit0 on, among all members'. The other rows' output is zero.
template <class S, class P, class F>
__device__ inline void each_row(const P& p, F f) {
  for (int64_t b = blockIdx.x; b < p.batch; b += gridDim.x) {
    if (runs_at(p, b, p.step))
      f(b, begins_anew(p, p.resets, b, p.step), member_of(p, b) * p.hidden_size);
    else
      each_unit(p.hidden_size, [&](int64_t j) { write<S>(p.y, b * p.y_stride + j, 0); });
  }
}

// The range whose gates `gate` is normalised with.
template <int N>
FUSEDRNN_HD constexpr int range_of(const GateRanges<N>& ranges, int gate) {
  for (int r = 0; r < N; r++)
    if (gate >= ranges.range[r].gate && gate < ranges.range[r].gate + ranges.range[r].count)
      return r;
  return -1;
}

// The gradient through n(a) = value, whose own gradient is d; the means are of d and d * value. The
// derivative of n is symmetric, so this is the tangent of the value too, where that of a is d.
template <class V>
__device__ inline V through_norm(V d, V value, V mean_d, V mean_dv, V scale) {
  return scale * (d - mean_d - value * mean_dv);
}

// The kernel of `select`, a function of a cell and a value of the storage type, on all of p.
template <class P, class F>
int run(const CellStep& step, const P& p, void* stream, F select) {
  if (step.batch == 0 || step.hidden_size == 0) return 0;
  const Grid grid{dim3(unsigned(step.batch < 1 << 20 ? step.batch : 1 << 20)), dim3(kThreads)};
  auto on = [&](auto cell) {
    return with_dtype(step.dtype, [&](auto s) { return launch(select(cell, s), grid, stream, p); });
  };
  switch (step.cell) {
    case Cell::kGru:
      return on(Gru{});
    case Cell::kLstm:
      return on(Lstm{});
    default:
      return kInvalidValue;
  }
}

}  // namespace normed
}  // namespace fusedrnn
