// A value with its derivative in one direction (a dual number). A cell's functions that are given
// dual numbers compute the derivatives of what they compute.
#pragma once
#include "cells/common.h"

namespace fusedrnn {

template <class V>
struct Dual {
  V value, tangent;

  FUSEDRNN_HD Dual& operator+=(Dual other) {
    value += other.value, tangent += other.tangent;
    return *this;
  }
};

// V and W: the same, or a vector and a number.
template <class V, class W>
FUSEDRNN_HD auto operator+(Dual<V> a, Dual<W> b) -> Dual<decltype(a.value + b.value)> {
  return {a.value + b.value, a.tangent + b.tangent};
}
template <class V, class W>
FUSEDRNN_HD auto operator-(Dual<V> a, Dual<W> b) -> Dual<decltype(a.value - b.value)> {
  return {a.value - b.value, a.tangent - b.tangent};
}
template <class V, class W>
FUSEDRNN_HD auto operator*(Dual<V> a, Dual<W> b) -> Dual<decltype(a.value * b.value)> {
  return {a.value * b.value, a.tangent * b.value + a.value * b.tangent};
}
template <class V>
FUSEDRNN_HD Dual<V> operator/(Dual<V> a, V b) {
  return {a.value / b, a.tangent / b};
}
template <class V>
FUSEDRNN_HD Dual<V> operator-(float a, Dual<V> b) {
  return {a - b.value, 0 - b.tangent};
}
template <class V>
FUSEDRNN_HD auto operator<=(Dual<V> a, float b) {
  return a.value <= b;
}
template <class Mask, class V>
FUSEDRNN_HD Dual<V> select(Mask mask, Dual<V> a, Dual<V> b) {
  return {select(mask, a.value, b.value), select(mask, a.tangent, b.tangent)};
}

// The functions of M on dual numbers.
template <class M>
struct DualMath {
  template <class V>
  static FUSEDRNN_HD Dual<V> tanh(Dual<V> x) {
    const V y = M::tanh(x.value);
    return {y, x.tangent * (1 - y * y)};
  }
  template <class V>
  static FUSEDRNN_HD Dual<V> sigmoid(Dual<V> x) {
    const V y = M::sigmoid(x.value);
    return {y, x.tangent * (y * (1 - y))};
  }
};

// From the tangent of a pre-activation to that of its activation, which is the value.
template <class V>
FUSEDRNN_HD void through_sigmoid(Dual<V>& y) {
  y.tangent = y.tangent * (y.value * (1 - y.value));
}
template <class V>
FUSEDRNN_HD void through_tanh(Dual<V>& y) {
  y.tangent = y.tangent * (1 - y.value * y.value);
}

}  // namespace fusedrnn
