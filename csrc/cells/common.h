// What every cell header uses.
//
// A cell is a struct of constants and three functions, written once for a value type V that is a
// SIMD vector on the CPU and a float or double on a GPU. `M` supplies the transcendental functions
// for V (M::sigmoid, M::tanh); everything else is operators, so one text serves every backend.
//
//   kGates   rows of W_ih and W_hh are kGates * hidden_size, in torch.nn's gate order
//   kSlots   values a unit holds per step while its gates are computed
//   kSaved   how many of them forward leaves for backward (slots 0 .. kSaved-1)
//   kHasCell whether there is a cell state c beside h
//            (and functions for the two halves of forward and backward, before and behind c)
//   kUsesHPrev whether the element-wise functions read h_{t-1} itself
//   x_ranges(), h_ranges()  into which slots the rows of W_ih and W_hh are accumulated: each fills
//            kGates slots in a row, those of W_ih from slot 0 and those of W_hh up to the last
//
//   forward:  slots hold pre-activations on entry, what is saved on return; c is updated; returns h
//   backward: slots hold what forward saved on entry and the gradients of the pre-activations on
//             return; dc goes from dL/dc_t to dL/dc_{t-1}; returns the part of dL/dh_{t-1} that
//             does not pass through W_hh
//   tangent:  the derivative of forward in one direction (dual.h): slots hold what forward saved
//   and
//             the tangents of the pre-activations on entry, and the tangents of what it saved on
//             return; likewise h, without its tangent, and c; returns the tangent of h
//
// The derivative of backward is backward itself, on dual numbers.
#pragma once

// Always inlined: the same text is compiled for several instruction sets, and an out-of-line copy
// from one of them must not serve another.
#if defined(__CUDACC__)
#define FUSEDRNN_HD __host__ __device__ __forceinline__
#else
#define FUSEDRNN_HD inline __attribute__((always_inline))
#endif

namespace fusedrnn {

// `count` gates starting at weight row `gate * H` are accumulated into slots starting at `slot`.
struct GateRange {
  int gate, slot, count;
};

template <int N>
struct GateRanges {
  static constexpr int kCount = N;
  GateRange range[N];
};

// Of each lane of a vector, or of a number.
template <class Mask, class V>
FUSEDRNN_HD V select(Mask mask, V a, V b) {
  return mask ? a : b;
}

// The gate whose weight rows are accumulated into `slot`. R: GateRanges, or a list of them.
template <class R>
FUSEDRNN_HD constexpr int gate_of(const R& ranges, int slot) {
  for (const GateRange& range : ranges.range)
    if (slot >= range.slot && slot < range.slot + range.count)
      return range.gate + slot - range.slot;
  return -1;
}
// The slot into which the weight rows of `gate` are accumulated.
template <int N>
FUSEDRNN_HD constexpr int slot_of(const GateRanges<N>& ranges, int gate) {
  for (const GateRange& range : ranges.range)
    if (gate >= range.gate && gate < range.gate + range.count)
      return range.slot + gate - range.gate;
  return -1;
}

}  // namespace fusedrnn
