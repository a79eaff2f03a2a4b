// What the kernels of a step have in common.
#pragma once
#include "cuda/primitives.h"
#include "cuda/stepwise/cell_step.h"

namespace fusedrnn {

__device__ inline bool runs_at(const CellStep& p, int64_t b, int64_t step) {
  return step >= 0 && step < (p.lengths ? p.lengths[b] : p.steps);
}
// Whether row b starts `step`, which it runs at, from zeros.
__device__ inline bool begins_anew(const CellStep& p, const uint8_t* resets, int64_t b,
                                   int64_t step) {
  return resets && runs_at(p, b, p.reverse ? step + 1 : step) && resets[b];
}
// Which of the weights that differ row b has.
__device__ inline int64_t member_of(const CellStep& p, int64_t b) {
  return p.members > 1 ? b % p.members : 0;
}
// What part of the old value stays of element `at`.
template <class C>
__device__ inline C rate_of(const Zoneout& z, int64_t at) {
  return z.mask ? C(z.mask[at]) : C(z.rate);
}

// Element (b, j) of rows of type T; null reads as zero and is not written.
template <class T>
__device__ inline Compute<T> read(const void* array, int64_t at) {
  return array ? to_compute(static_cast<const T*>(array)[at]) : Compute<T>(0);
}
template <class T>
__device__ inline void write(void* array, int64_t at, Compute<T> value) {
  if (array) static_cast<T*>(array)[at] = from_compute<T>(value);
}

// The new h of unit j of row b, to all who want it.
template <class S>
__device__ inline void write_h(const CellForward& p, int64_t b, int64_t j, Compute<S> h) {
  using C = Compute<S>;
  const int64_t at = b * p.hidden_size + j;
  write<C>(p.h, at, h);
  write<S>(p.operand, at, p.h_mask ? h * read<C>(p.h_mask, at) : h);
  write<S>(p.y, b * p.y_stride + j, h);
}
// dL/dh of this step as later ones left it, of unit j of row b.
template <class C>
__device__ inline C later_gradient(const CellBackward& p, int64_t b, int64_t j) {
  const int64_t later = p.reverse ? p.step - 1 : p.step + 1;  // the step of the launch before
  const int64_t at = b * p.hidden_size + j;
  const C dh = read<C>(p.dh, at);
  if (!runs_at(p, b, later) || begins_anew(p, p.later_resets, b, later)) return dh;
  const C product = read<C>(p.dh_product, at);
  return dh + (p.h_mask ? product * read<C>(p.h_mask, at) : product);
}
// h or c of the step before, of unit j of row b: `before` of that step, or the initial state.
template <class S, class T>
__device__ inline Compute<S> state_before(const CellStep& p, const void* initial,
                                          const void* before, int64_t stride, int64_t b,
                                          int64_t j) {
  if (begins_anew(p, p.resets, b, p.step)) return 0;
  const int64_t earlier = p.reverse ? p.step + 1 : p.step - 1;
  return runs_at(p, b, earlier) ? read<T>(before, b * stride + j)
                                : read<S>(initial, b * p.hidden_size + j);
}

}  // namespace fusedrnn
