// The forward pass of a whole stack for some rows of the batch.
//
// A thread runs its rows through all layers and steps alone; nothing is shared but the packed
// weights, so there is no barrier. Per layer and direction, time goes in chunks: the input products
// of a chunk's tokens are one matrix product, then each step adds h W_hh^T and applies the cell.
#pragma once
#include "cpu/layer.h"
#include "cpu/vmath.h"

namespace {

template <class S>
struct ForwardBuffers {
  using C = Compute<S>;
  int64_t tokens, ld_input, ld_gates, ld_h, ld_hidden;
  C *input, *gates, *h, *c, *hidden;

  ForwardBuffers(const Problem& p, int64_t rows, Scratch& s)
      : tokens(max(rows, kChunkTokens)),
        ld_input(max(p.input_size, p.num_directions * p.out_size()) + kRowPad),
        ld_gates(p.slot_columns()),
        ld_h(p.out_size() + kRowPad),
        ld_hidden(p.hidden_size + kRowPad) {
    input = s.take<C>(tokens * ld_input);
    gates = s.take<C>(tokens * ld_gates);
    h = s.take<C>(rows * ld_h);
    c = s.take<C>(traits(p.cell).has_cell ? rows * p.hidden_size : 0);
    hidden = s.take<C>(p.proj_size ? rows * ld_hidden : 0);
  }
};

// One row of one step: slots hold the pre-activations. `h` is read (h_{t-1}) and written; with a
// projection the caller passes another row to write and no y. y, saved and saved_c may be null.
template <class Cell, class S>
void cell_forward_row(int64_t H, Compute<S>* slots, Compute<S>* h, Compute<S>* c, S* y, S* saved,
                      Compute<S>* saved_c) {
  using C = Compute<S>;
  constexpr int w = Lanes<C>::kWidth;
  auto units = [&](int64_t j, int64_t n) __attribute__((always_inline)) {
    Vec<C> s[Cell::kSlots];
    for (int k = 0; k < Cell::kSlots; k++) s[k] = load(slots + k * H + j, n);
    Vec<C> h_prev = Cell::kUsesHPrev ? load(h + j, n) : Vec<C>{};
    Vec<C> cell = Cell::kHasCell ? load(c + j, n) : Vec<C>{};
    const Vec<C> out = Cell::template forward<VectorMath>(s, h_prev, cell);
    store(h + j, out, n);
    if (y) store(y + j, out, n);
    if (Cell::kHasCell) store(c + j, cell, n);
    if (Cell::kHasCell && saved_c) store(saved_c + j, cell, n);
    if (saved)
      for (int k = 0; k < Cell::kSaved; k++) store(saved + k * H + j, s[k], n);
  };
  int64_t j = 0;
  for (; j + w <= H; j += w) units(j, w);
  if (j < H) units(j, H - j);
}

template <class Cell, class S>
void forward_rows(const Forward& a, int64_t first, int64_t end, void* scratch) {
  using C = Compute<S>;
  const Problem& p = a.problem;
  const Sequence& seq = a.seq;
  const int64_t H = p.hidden_size, P = p.out_size(), D = p.num_directions, rows = end - first;
  const int64_t longest = seq.length[seq.order[first]];
  constexpr Run x_run = Cell::x_runs().run[0];
  static_assert(Cell::x_runs().kCount == 1 && x_run.gate == 0 && x_run.slot == 0, "the first slots are W_ih's");
  const Reserve reserve(p);
  Scratch s{static_cast<char*>(scratch)};
  const ForwardBuffers<S> buf(p, rows, s);
  const C* packed = static_cast<const C*>(a.packed);
  const void* below = nullptr;

  for (int64_t layer = 0; layer < p.num_layers; layer++) {
    const PackedOffsets at = forward_offsets<C>(p, layer);
    const LayerInput<S> input(a, layer, below);
    void* out = layer == p.num_layers - 1 ? a.y
                : a.reserve               ? a.reserve + reserve.output_offset(layer, seq.tokens)
                                          : a.inner[layer % 2];
    for (int64_t dir = 0; dir < D; dir++, packed += at.total) {
      const int64_t state = (layer * D + dir) * seq.batch;
      S* const saved = a.reserve ? reinterpret_cast<S*>(a.reserve + reserve.slots_offset(layer, dir, seq.tokens)) : nullptr;
      C* const saved_c = a.reserve ? reinterpret_cast<C*>(a.reserve + reserve.cell_offset(layer, dir, seq.tokens)) : nullptr;

      for (int64_t r = 0; r < rows; r++) {
        const int64_t b = seq.order[first + r];
        C* h = buf.h + r * buf.ld_h;
        for (int64_t j = 0; j < P; j++) h[j] = 0;
        if (a.hx) convert_row(h, static_cast<const S*>(a.hx) + (state + b) * P, P);
        if (!Cell::kHasCell) continue;
        C* c = buf.c + r * H;
        for (int64_t j = 0; j < H; j++) c[j] = 0;
        if (a.cx) convert_row(c, static_cast<const S*>(a.cx) + (state + b) * H, H);
      }

      const int64_t steps = chunk_steps(rows);
      for (int64_t chunk = 0; chunk < longest; chunk += steps) {
        const int64_t chunk_end = min(longest, chunk + steps);
        int64_t q = 0;
        for (int64_t i = chunk; i < chunk_end; i++) {
          const int64_t t = dir == 0 ? i : longest - 1 - i;
          const int64_t n = active_rows(seq, first, end, t);
          for (int64_t r = 0; r < n; r++, q++)
            input.read(buf.input + q * buf.ld_input, t, seq.order[first + r]);
        }
        gemm(q, x_run.count * H, input.width, buf.input, buf.ld_input, packed + at.w_ih, buf.gates,
             buf.ld_gates, {packed + at.bias, 0});

        C* gates = buf.gates;
        for (int64_t i = chunk; i < chunk_end; i++) {
          const int64_t t = dir == 0 ? i : longest - 1 - i;
          const int64_t n = active_rows(seq, first, end, t);
          const C* w_hh = packed + at.w_hh;
          for (const Run& run : Cell::h_runs().run) {
            // Onto the input's product, or, where there is none in these slots, onto the bias.
            C* to = gates + run.slot * H;
            const bool fresh = run.slot >= x_run.count;
            gemm(n, run.count * H, P, buf.h, buf.ld_h, w_hh, to, buf.ld_gates,
                 fresh ? Addend<C>{packed + at.bias + run.slot * H, 0} : Addend<C>{to, buf.ld_gates});
            w_hh += Panels<C>::size(P, run.count * H);
          }
          for (int64_t r = 0; r < n; r++) {
            const int64_t token = seq.token(t, seq.order[first + r]);
            S* y = static_cast<S*>(out) + (token * D + dir) * P;
            C* h = p.proj_size ? buf.hidden + r * buf.ld_hidden : buf.h + r * buf.ld_h;
            cell_forward_row<Cell, S>(H, gates + r * buf.ld_gates, h, buf.c + r * H,
                                      p.proj_size ? nullptr : y,
                                      saved ? saved + token * Cell::kSaved * H : nullptr,
                                      saved_c ? saved_c + token * H : nullptr);
          }
          if (p.proj_size) {
            gemm(n, P, H, buf.hidden, buf.ld_hidden, packed + at.w_hr, buf.h, buf.ld_h, {});
            for (int64_t r = 0; r < n; r++) {
              const int64_t token = seq.token(t, seq.order[first + r]);
              convert_row(static_cast<S*>(out) + (token * D + dir) * P, buf.h + r * buf.ld_h, P);
            }
          }
          gates += n * buf.ld_gates;
        }
      }

      for (int64_t r = 0; r < rows; r++) {
        const int64_t b = seq.order[first + r];
        convert_row(static_cast<S*>(a.hn) + (state + b) * P, buf.h + r * buf.ld_h, P);
        if (Cell::kHasCell) convert_row(static_cast<S*>(a.cn) + (state + b) * H, buf.c + r * H, H);
      }
    }
    below = out;
  }
}

}  // namespace
