// Gated recurrent unit, torch.nn.GRU (gate order r z n, and the reset gate after the product):
//
//   r = sigmoid(W_ir x + b_ir + W_hr h' + b_hr)
//   z = sigmoid(W_iz x + b_iz + W_hz h' + b_hz)
//   q = W_hn h' + b_hn
//   n = tanh(W_in x + b_in + r q)
//   h = (1 - z) n + z h'                               h' = h_{t-1}
//
// Cho et al., arXiv:1406.1078, in the variant of cuDNN that torch.nn follows. Slots r z n q: the
// input part of n and its recurrent part q must be kept apart until r is known.
#pragma once
#include "cells/dual.h"

namespace fusedrnn {

struct Gru {
  static constexpr int kGates = 3, kSlots = 4, kSaved = 4;
  static constexpr bool kHasCell = false, kUsesHPrev = true;
  static FUSEDRNN_HD constexpr GateRanges<2> x_ranges() { return {{{2, 0, 1}, {0, 1, 2}}}; }
  static FUSEDRNN_HD constexpr GateRanges<1> h_ranges() { return {{{0, 1, 3}}}; }

  template <class M, class V>
  static FUSEDRNN_HD V forward(V (&s)[4], V h_prev, V&) {
    V r = M::sigmoid(s[1]), z = M::sigmoid(s[2]), q = s[3];
    V n = M::tanh(s[0] + r * q);
    s[0] = n, s[1] = r, s[2] = z;
    return n + z * (h_prev - n);
  }

  template <class M, class V>
  static FUSEDRNN_HD V backward(V (&s)[4], V h_prev, V, V, V, V dh, V&) {
    V n = s[0], r = s[1], z = s[2], q = s[3];
    V dn = dh * (1 - z) * (1 - n * n);
    s[0] = dn;
    s[1] = dn * q * r * (1 - r);
    s[2] = dh * (h_prev - n) * z * (1 - z);
    s[3] = dn * r;
    return dh * z;
  }

  template <class M, class V>
  static FUSEDRNN_HD V tangent(Dual<V> (&s)[4], Dual<V> h_prev, V, Dual<V>, Dual<V>&) {
    Dual<V>&n = s[0], &r = s[1], &z = s[2], &q = s[3];
    through_sigmoid(r), through_sigmoid(z);
    n.tangent += (r * q).tangent;
    through_tanh(n);
    return (n + z * (h_prev - n)).tangent;
  }
};

}  // namespace fusedrnn
