// Long short-term memory, torch.nn.LSTM (gate order i f g o):
//
//   i, f, o = sigmoid(W_i* x + b_i* + W_h* h' + b_h*)      g = tanh(same with its own rows)
//   c = f c' + i g        h = o tanh(c)                    h' = h_{t-1}, c' = c_{t-1}
//
// Hochreiter and Schmidhuber 1997 with the forget gate of Gers et al. 2000. With proj_size the
// caller multiplies h by W_hr afterwards (Sak et al., arXiv:1402.1128).
#pragma once
#include "cells/dual.h"

namespace fusedrnn {

struct Lstm {
  static constexpr int kGates = 4, kSlots = 4, kSaved = 4;
  static constexpr bool kHasCell = true, kUsesHPrev = false;
  static FUSEDRNN_HD constexpr GateRanges<1> x_ranges() { return {{{0, 0, 4}}}; }
  static FUSEDRNN_HD constexpr GateRanges<1> h_ranges() { return {{{0, 0, 4}}}; }

  // c of the activated gates
  template <class V>
  static FUSEDRNN_HD V cell_state(const V (&s)[4], V c_prev) {
    return s[1] * c_prev + s[0] * s[2];
  }

  // Activates the gates and updates c.
  template <class M, class V>
  static FUSEDRNN_HD void forward_cell(V (&s)[4], V& c) {
    s[0] = M::sigmoid(s[0]);
    s[1] = M::sigmoid(s[1]);
    s[2] = M::tanh(s[2]);
    s[3] = M::sigmoid(s[3]);
    c = cell_state(s, c);
  }
  // h of the activated gates and of c, or of what stands in its place.
  template <class M, class V>
  static FUSEDRNN_HD V output(const V (&s)[4], V c) {
    return s[3] * M::tanh(c);
  }
  template <class M, class V>
  static FUSEDRNN_HD V forward(V (&s)[4], V, V& c) {
    forward_cell<M>(s, c);
    return output<M>(s, c);
  }

  // The gradient of what `output` took for c; that of o's pre-activation goes to s[3].
  template <class M, class V>
  static FUSEDRNN_HD V backward_output(V (&s)[4], V c, V dh) {
    V o = s[3], tc = M::tanh(c);
    s[3] = dh * tc * o * (1 - o);
    return dh * o * (1 - tc * tc);
  }
  // The other gates' gradients, from the whole dL/dc_t; s[3] is left alone.
  template <class V>
  static FUSEDRNN_HD void backward_cell(V (&s)[4], V c_prev, V& dc) {
    V i = s[0], f = s[1], g = s[2];
    s[0] = dc * g * i * (1 - i);
    s[1] = dc * c_prev * f * (1 - f);
    s[2] = dc * i * (1 - g * g);
    dc = dc * f;
  }
  template <class M, class V>
  static FUSEDRNN_HD V backward(V (&s)[4], V, V, V c_prev, V c, V dh, V& dc) {
    dc += backward_output<M>(s, c, dh);
    backward_cell(s, c_prev, dc);
    return V{};
  }

  // The derivatives of forward_cell, which returns the tangent of c, and of forward.
  template <class V>
  static FUSEDRNN_HD V tangent_cell(Dual<V> (&s)[4], Dual<V> c_prev) {
    through_sigmoid(s[0]), through_sigmoid(s[1]), through_tanh(s[2]), through_sigmoid(s[3]);
    return cell_state(s, c_prev).tangent;
  }
  template <class M, class V>
  static FUSEDRNN_HD V tangent(Dual<V> (&s)[4], Dual<V>, V, Dual<V> c_prev, Dual<V>& c) {
    c.tangent = tangent_cell(s, c_prev);
    return output<DualMath<M>>(s, c).tangent;
  }
};

}  // namespace fusedrnn
