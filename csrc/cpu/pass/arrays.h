// The arrays of a layer and direction: its input, output, states and masks, and scratch memory.
#pragma once
#include "cpu/call.h"
#include "cpu/product/panels.h"

namespace {

using namespace fusedrnn;

// The input of a layer: rows of x, or of the output below with dropout applied.
template <class S>
struct LayerInput {
  using C = Compute<S>;
  const S* base;
  const int64_t* offset;  // of each step, in elements; null: tokens are contiguous
  int64_t stride, width;  // elements from row to row of a step, and of a row
  const uint8_t* mask;    // dropout of this layer's input; null: none
  C scale;
  const Sequence& seq;

  LayerInput(const Common& call, int64_t layer, const void* below)
      : width(call.problem.product_input(layer)),
        mask(nullptr),
        scale(C(call.mask_scale)),
        seq(call.seq) {
    if (layer == 0) {
      base = static_cast<const S*>(call.x), offset = call.x_offset, stride = call.x_row;
    } else {
      base = static_cast<const S*>(below), offset = nullptr, stride = width;
      if (call.mask) mask = call.mask + (layer - 1) * call.seq.tokens * width;
    }
  }
  FUSEDRNN_INLINE const S* row(int64_t t, int64_t b) const {
    return offset ? base + offset[t] + b * stride : base + seq.token(t, b) * stride;
  }
  // A row as operands, with planes that are `plane` apart. Not inlined, which saves build time.
  template <class X>
  __attribute__((noinline)) void read(X* dst, int64_t plane, int64_t t, int64_t b) const {
    const S* const src = row(t, b);
    if (!mask) return to_operands(dst, plane, src, width);
    const uint8_t* const m = mask + seq.token(t, b) * width;
    make_operands(dst, plane, width, [&](int64_t j, int64_t n) {
      Vec<C> v = load(src + j, n);
      for (int64_t i = 0; i < n; i++) v[i] *= m[j + i] * scale;
      return v;
    });
  }
  // Applies the mask to the gradient of a row.
  void drop(C* gradient, int64_t t, int64_t b, Columns columns) const {
    const uint8_t* m = mask + seq.token(t, b) * width;
    for (int64_t j = columns.begin; j < columns.end; j++) gradient[j] *= m[j] * scale;
  }
};

// The outputs of a layer but the last for all tokens, where they are saved; else null.
template <class S>
FUSEDRNN_INLINE S* saved_outputs(const Common& call, int64_t layer) {
  const Problem& p = call.problem;
  if (call.hs)
    return static_cast<S*>(call.hs) +
           layer * call.seq.saved_token(call.seq.tokens) * p.num_directions * p.out_size();
  if (!call.reserve) return nullptr;
  return reinterpret_cast<S*>(
      call.reserve + Reserve(p).output_offset(layer, call.seq.saved_token(call.seq.tokens)));
}
// Where forward writes the outputs of a layer.
template <class S>
S* layer_output(const Forward& call, int64_t layer) {
  if (layer == call.problem.num_layers - 1) return static_cast<S*>(call.y);
  S* const saved = saved_outputs<S>(call, layer);
  return saved ? saved : static_cast<S*>(call.inner[layer % 2]);
}
// Where backward reads them.
template <class S>
const S* layer_output(const Backward& call, int64_t layer) {
  return layer == call.problem.num_layers - 1 ? static_cast<const S*>(call.y)
                                              : saved_outputs<S>(call, layer);
}

// The cell states of a layer and direction for all tokens, or of a plain RNN with zoneout the
// outputs before it; row() is null where they are not saved.
template <class C>
struct CellStates {
  C* base;
  int64_t stride;

  CellStates(const Common& call, int64_t layer, int64_t dir) : base(nullptr), stride(0) {
    const Problem& p = call.problem;
    const int64_t H = p.hidden_size, tokens = call.seq.saved_token(call.seq.tokens);
    if (call.cs) {
      stride = p.num_directions * H;
      base = static_cast<C*>(call.cs) + layer * tokens * stride + dir * H;
    } else if (call.reserve) {
      stride = H;
      base = reinterpret_cast<C*>(call.reserve + Reserve(p).cell_offset(layer, dir, tokens));
    }
  }
  FUSEDRNN_INLINE C* row(int64_t token) const { return base ? base + token * stride : nullptr; }
};

// The other arrays of a layer and direction in the reserve.
template <class S>
FUSEDRNN_INLINE S* saved_slots(const Common& call, int64_t layer, int64_t dir) {
  return reinterpret_cast<S*>(
      call.reserve +
      Reserve(call.problem).slots_offset(layer, dir, call.seq.saved_token(call.seq.tokens)));
}
template <class S>
FUSEDRNN_INLINE Compute<S>* saved_scales(const Common& call, int64_t layer, int64_t dir) {
  return reinterpret_cast<Compute<S>*>(
      call.reserve +
      Reserve(call.problem).scales_offset(layer, dir, call.seq.saved_token(call.seq.tokens)));
}

// Zoneout of one row: the part of each old value that stays.
template <class C>
struct ZoneoutMask {
  const uint8_t* mask = nullptr;
  C rate = 0;

  ZoneoutMask() = default;
  // `index` counts rows of all layers, directions and tokens.
  ZoneoutMask(const Zoneout& z, int64_t index, int64_t width)
      : mask(z.mask ? z.mask + index * width : nullptr), rate(C(z.rate)) {}
  FUSEDRNN_INLINE explicit operator bool() const { return mask || rate > 0; }
  FUSEDRNN_INLINE Vec<C> load(int64_t j, int64_t n) const {
    if (!mask) return broadcast<C>(rate);
    Vec<C> v{};
    for (int64_t i = 0; i < n; i++) v[i] = mask[j + i];
    return v;
  }
};

// Copies the initial states of a layer and direction for the rows at places first .. of
// Sequence::order. c is not touched where a cell has none.
template <class S>
void read_states(const Forward& call, int64_t layer, int64_t dir, int64_t first, int64_t rows,
                 Compute<S>* h, int64_t ld_h, Compute<S>* c) {
  const Problem& p = call.problem;
  const Sequence& seq = call.seq;
  const int64_t P = p.out_size(), H = p.hidden_size;
  for (int64_t r = 0; r < rows; r++, h += ld_h, c += H) {
    const int64_t state = (layer * p.num_directions + dir) * seq.batch + seq.order[first + r];
    for (int64_t j = 0; j < P; j++) h[j] = 0;
    if (call.hx) convert_row(h, static_cast<const S*>(call.hx) + state * P, P);
    if (!traits(p.cell).has_cell) continue;
    for (int64_t j = 0; j < H; j++) c[j] = 0;
    if (call.cx) convert_row(c, static_cast<const S*>(call.cx) + state * H, H);
  }
}
// Copies their final states to the results.
template <class S>
void write_states(const Forward& call, int64_t layer, int64_t dir, int64_t first, int64_t rows,
                  const Compute<S>* h, int64_t ld_h, const Compute<S>* c) {
  const Problem& p = call.problem;
  const Sequence& seq = call.seq;
  const int64_t P = p.out_size(), H = p.hidden_size;
  for (int64_t r = 0; r < rows; r++, h += ld_h, c += H) {
    const int64_t state = (layer * p.num_directions + dir) * seq.batch + seq.order[first + r];
    convert_row(static_cast<S*>(call.hn) + state * P, h, P);
    if (traits(p.cell).has_cell) convert_row(static_cast<S*>(call.cn) + state * H, c, H);
  }
}

// Hands out consecutive arrays of a buffer; with null it only adds up their size.
struct Scratch {
  char* base;
  int64_t used = 0;

  template <class C>
  FUSEDRNN_INLINE C* take(int64_t elements) {
    C* const array = reinterpret_cast<C*>(base + used);
    used += (elements * int64_t(sizeof(C)) + 63) / 64 * 64;
    return array;
  }
};

}  // namespace
