// What forward, backward and weight gradients share: where packed weights lie, how they are packed,
// and how a layer's input is read.
#pragma once
#include "cpu/gemm.h"
#include "cpu/stack.h"

namespace {

using namespace fusedrnn;

// Rows of A are this much longer than K so that rows of a power of two do not share cache sets.
constexpr int64_t kRowPad = 16;
// Tokens whose input products are computed together: enough rows to pay for reading W_ih, few
// enough that their gates are still in the second cache when their steps come.
constexpr int64_t kChunkTokens = 64;

FUSEDRNN_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
FUSEDRNN_INLINE int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }
FUSEDRNN_INLINE int64_t chunk_steps(int64_t rows) { return max(1, kChunkTokens / rows); }

template <class C>
PackedOffsets forward_offsets(const Problem& p, int64_t layer) {
  PackedOffsets o{};
  o.w_ih = Panels<C>::padded(p.slot_columns());
  o.w_hh = o.w_ih + Panels<C>::size(p.layer_input(layer), p.gate_rows());
  // Every run of gates is a matrix of its own, padded by itself.
  o.w_hr = o.w_hh + Panels<C>::size(p.out_size(), Panels<C>::padded(p.hidden_size) * traits(p.cell).gates);
  o.total = o.w_hr + Panels<C>::size(p.hidden_size, p.proj_size);
  return o;
}

template <class C>
PackedOffsets backward_offsets(const Problem& p, int64_t layer) {
  PackedOffsets o{};
  o.w_ih = Panels<C>::size(p.gate_rows(), p.out_size());
  o.w_hr = o.w_ih + Panels<C>::size(p.gate_rows(), p.layer_input(layer));
  o.total = o.w_hr + Panels<C>::size(p.proj_size, p.hidden_size);
  return o;
}

// Columns [begin, end) of N that fall to a share of the packing, whole panels each.
template <class C>
FUSEDRNN_INLINE void share(int64_t N, int64_t part, int64_t parts, int64_t* begin, int64_t* end) {
  const int64_t panels = (N + Panels<C>::kColumns - 1) / Panels<C>::kColumns;
  *begin = min(N, panels * part / parts * Panels<C>::kColumns);
  *end = min(N, panels * (part + 1) / parts * Panels<C>::kColumns);
}

// B[k, n] = w[n, k] for rows [row0, row0 + N) of w: a product with the transpose of w.
template <class C, class S>
void pack_transposed(C* dst, const S* w, int64_t row0, int64_t N, int64_t K, int64_t part, int64_t parts) {
  int64_t begin, end;
  share<C>(N, part, parts, &begin, &end);
  pack_panels_transposed(dst, w + row0 * K, K, K, begin, end);
}
// B[k, n] = w[row0 + k, n]
template <class C, class S>
void pack_plain(C* dst, const S* w, int64_t row0, int64_t N, int64_t K, int64_t part, int64_t parts) {
  int64_t begin, end;
  share<C>(N, part, parts, &begin, &end);
  pack_panels(dst, w + row0 * N, K, N, begin, end);
}

template <class Cell, class S>
void pack_forward(const Problem& p, const Weights& w, int64_t layer, void* packed, int64_t part,
                  int64_t parts) {
  using C = Compute<S>;
  const PackedOffsets o = forward_offsets<C>(p, layer);
  C* to = static_cast<C*>(packed);
  const int64_t H = p.hidden_size, P = p.out_size();
  constexpr auto x_runs = Cell::x_runs();
  constexpr auto h_runs = Cell::h_runs();
  if (part == 0) {
    C* bias = to + o.bias;
    for (int64_t j = 0; j < Panels<C>::padded(p.slot_columns()); j++) bias[j] = 0;
    auto add = [&](const void* b, const Run& run) {
      if (!b) return;
      const S* from = static_cast<const S*>(b) + run.gate * H;
      for (int64_t j = 0; j < run.count * H; j++) bias[run.slot * H + j] += to_compute(from[j]);
    };
    for (const Run& run : x_runs.run) add(w.b_ih, run);
    for (const Run& run : h_runs.run) add(w.b_hh, run);
  }
  C* w_ih = to + o.w_ih;
  pack_transposed(w_ih, static_cast<const S*>(w.w_ih), 0, p.gate_rows(), p.layer_input(layer), part, parts);
  C* w_hh = to + o.w_hh;
  for (const Run& run : h_runs.run) {
    pack_transposed(w_hh, static_cast<const S*>(w.w_hh), run.gate * H, run.count * H, P, part, parts);
    w_hh += Panels<C>::size(P, run.count * H);
  }
  if (p.proj_size) pack_transposed(to + o.w_hr, static_cast<const S*>(w.w_hr), 0, P, H, part, parts);
}

template <class Cell, class S>
void pack_backward(const Problem& p, const Weights& w, int64_t layer, void* packed, int64_t part,
                   int64_t parts) {
  using C = Compute<S>;
  const PackedOffsets o = backward_offsets<C>(p, layer);
  C* to = static_cast<C*>(packed);
  const int64_t H = p.hidden_size, P = p.out_size();
  C* w_hh = to + o.w_hh;
  for (const Run& run : Cell::h_runs().run) {
    pack_plain(w_hh, static_cast<const S*>(w.w_hh), run.gate * H, P, run.count * H, part, parts);
    w_hh += Panels<C>::size(run.count * H, P);
  }
  pack_plain(to + o.w_ih, static_cast<const S*>(w.w_ih), 0, p.layer_input(layer), p.gate_rows(), part, parts);
  if (p.proj_size) pack_plain(to + o.w_hr, static_cast<const S*>(w.w_hr), 0, H, P, part, parts);
}

// The input of a layer: rows of x, or of the layer below through the dropout mask.
template <class S>
struct LayerInput {
  using C = Compute<S>;
  const S* base;
  const int64_t* offset;  // elements, by step
  int64_t row, width;     // elements from row to row of the batch; elements of a row
  const uint8_t* mask;    // of this layer's input, null: none
  C scale;
  const Sequence& seq;

  LayerInput(const Common& a, int64_t layer, const void* below)
      : width(a.problem.layer_input(layer)), mask(nullptr), scale(C(a.mask_scale)), seq(a.seq) {
    if (layer == 0) {
      base = static_cast<const S*>(a.x), offset = a.x_offset, row = a.x_row;
    } else {
      base = static_cast<const S*>(below), offset = nullptr, row = width;
      if (a.mask) mask = a.mask + (layer - 1) * a.seq.tokens * width;
    }
  }
  FUSEDRNN_INLINE const S* at(int64_t t, int64_t b) const {
    return offset ? base + offset[t] + b * row : base + seq.token(t, b) * row;
  }
  FUSEDRNN_INLINE void read(C* to, int64_t t, int64_t b) const {
    convert_row(to, at(t, b), width);
    if (mask) drop(to, t, b);
  }
  // Multiplies a row by its mask: the input on the way up, its gradient on the way down.
  void drop(C* values, int64_t t, int64_t b) const {
    const uint8_t* m = mask + seq.token(t, b) * width;
    for (int64_t j = 0; j < width; j++) values[j] *= m[j] * scale;
  }
};

// Hands out consecutive arrays of a scratch buffer; with null it only adds up their size.
struct Scratch {
  char* base;
  int64_t used = 0;

  template <class C>
  FUSEDRNN_INLINE C* take(int64_t elements) {
    C* at = reinterpret_cast<C*>(base + used);
    used += (elements * int64_t(sizeof(C)) + 63) / 64 * 64;
    return at;
  }
};

// Rows of places [first, end) in seq.order that are still running at step t.
FUSEDRNN_INLINE int64_t active_rows(const Sequence& seq, int64_t first, int64_t end, int64_t t) {
  int64_t n = end - first;
  while (n > 0 && seq.length[seq.order[first + n - 1]] <= t) n--;
  return n;
}

}  // namespace
