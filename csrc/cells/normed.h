// A cell with layer normalisation, as Ba, Kiros and Hinton put it into recurrent networks
// (arXiv:1607.06450, supplementary material):
//
//   W_ih x + b_ih  becomes  gain_ih * n(W_ih x) + b_ih,   W_hh h' + b_hh likewise
//   tanh(c)        becomes  tanh(gain_c * n(c) + shift_c) where there is a c; the next step gets c
//
//   n(a) = (a - mean(a)) / sqrt(var(a) + 1e-5)
//
// over the units of all gates of one range of x_ranges(): i f g o of an LSTM together, r z of a GRU
// and its n separately. So the products with W_ih and W_hh have separate slots, those of W_ih
// first. The element-wise part is that of the plain cell.
#pragma once
#include "cells/common.h"

namespace fusedrnn {

template <class Cell>
struct Normed : Cell {
  using Plain = Cell;
  static constexpr int kGates = Cell::kGates, kSlots = 2 * kGates;
  static FUSEDRNN_HD constexpr GateRanges<1> x_ranges() { return {{{0, 0, kGates}}}; }
  static FUSEDRNN_HD constexpr GateRanges<1> h_ranges() { return {{{0, kGates, kGates}}}; }

  // Saved for backward: the slots of the plain cell, the normalised products, the normalised c;
  static constexpr int kSavedProducts = Cell::kSaved, kSavedCell = Cell::kSaved + kSlots;
  static constexpr int kSaved = kSavedCell + Cell::kHasCell;
  // and 1 / sqrt(var + 1e-5), for each range that of x and that of h, then that of c.
  static constexpr int kScales = 2 * decltype(Cell::x_ranges())::kCount + Cell::kHasCell;
};

}  // namespace fusedrnn
