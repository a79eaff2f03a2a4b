// Elman RNN, torch.nn.RNN:
//
//   h_t = act(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh),   act = tanh or relu
//
// Elman, "Finding structure in time", Cognitive Science 14(2), 1990; backward by the chain rule:
//   tanh: da = dh (1 - h^2)        relu: da = dh where h > 0
#pragma once
#include "cells/dual.h"

namespace fusedrnn {

struct RnnBase {
  static constexpr int kGates = 1, kSlots = 1, kSaved = 0;
  static constexpr bool kHasCell = false, kUsesHPrev = false;
  static FUSEDRNN_HD constexpr GateRanges<1> x_ranges() { return {{{0, 0, 1}}}; }
  static FUSEDRNN_HD constexpr GateRanges<1> h_ranges() { return {{{0, 0, 1}}}; }
};

struct RnnTanh : RnnBase {
  template <class M, class V>
  static FUSEDRNN_HD V forward(V (&s)[1], V, V&) {
    return M::tanh(s[0]);
  }
  template <class M, class V>
  static FUSEDRNN_HD V backward(V (&s)[1], V, V h, V, V, V dh, V&) {
    s[0] = dh * (1 - h * h);
    return V{};
  }
  template <class M, class V>
  static FUSEDRNN_HD V tangent(Dual<V> (&s)[1], Dual<V>, V h, Dual<V>, Dual<V>&) {
    return s[0].tangent * (1 - h * h);
  }
};

struct RnnRelu : RnnBase {
  // Written so that NaN passes, as in torch.relu.
  template <class M, class V>
  static FUSEDRNN_HD V forward(V (&s)[1], V, V&) {
    return s[0] < 0 ? V{} : s[0];
  }
  template <class M, class V>
  static FUSEDRNN_HD V backward(V (&s)[1], V, V h, V, V, V dh, V&) {
    s[0] = select(h <= 0, V{}, dh);
    return V{};
  }
  template <class M, class V>
  static FUSEDRNN_HD V tangent(Dual<V> (&s)[1], Dual<V>, V h, Dual<V>, Dual<V>&) {
    return select(h <= 0, V{}, s[0].tangent);
  }
};

}  // namespace fusedrnn
