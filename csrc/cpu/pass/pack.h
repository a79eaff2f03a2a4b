// What forward, backward and weight gradients share: where packed weights lie, how they are packed,
// and how a layer's input is read.
#pragma once
#include "cpu/product/gemm.h"
#include "cpu/stack.h"

namespace {

using namespace fusedrnn;

// Rows of A are this much longer than K so that rows of a power of two do not share cache sets.
template <class X>
constexpr int64_t kRowPad = 16 * kPlanes<X>;
// Tokens whose input products are computed together: enough rows to pay for reading W_ih, few
// enough that their gates are still in the second cache when their steps come.
template <class X>
constexpr int64_t kChunkTokens = kPlanes<X> > 1 ? 128 : 64;

FUSEDRNN_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
FUSEDRNN_INLINE int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }
template <class X>
FUSEDRNN_INLINE int64_t chunk_steps(int64_t rows) {
  return max(1, kChunkTokens<X> / rows);
}

template <class Cell>
constexpr bool kIsNormed = false;
template <class Cell>
constexpr bool kIsNormed<Normed<Cell>> = true;

// Forward works on units in blocks of one vector. Its gate buffers hold, block after block, one
// vector for each slot, so that all gates of a block are together when its cells are computed. The
// recurrent product goes by groups of blocks that fill the registers, each a packed matrix of its
// own.
template <class C>
constexpr int group_blocks(int gates) {
  return gates == 1 ? Panels<C>::kVectors : 1;
}
template <class Cell, class C>
struct Groups {
  static constexpr int kWidth = Panels<C>::kWidth, kBlocks = group_blocks<C>(Cell::kGates);

  static FUSEDRNN_INLINE int64_t blocks(int64_t H) { return (H + kWidth - 1) / kWidth; }
  static FUSEDRNN_INLINE int64_t gate_columns(int64_t H) {
    return blocks(H) * Cell::kSlots * kWidth;
  }
  // f(first block, number of blocks) for every group, or for those of one member of a team; from
  // the last to the first where `falling`
  template <class F>
  static FUSEDRNN_INLINE void each(int64_t H, const Member& me, bool falling, F f) {
    const int64_t groups = (blocks(H) + kBlocks - 1) / kBlocks;
    const int64_t begin = groups * me.index / me.count, end = groups * (me.index + 1) / me.count;
    for (int64_t i = begin; i < end; i++) {
      const int64_t b = (falling ? begin + end - 1 - i : i) * kBlocks;
      f(b, min(kBlocks, blocks(H) - b));
    }
  }
};

template <class X>
PackedOffsets forward_offsets(const Common& a, int64_t layer) {
  const Problem& p = a.problem;
  const int64_t columns = Panels<X>::padded(p.hidden_size), gates = traits(p.cell).gates * columns,
                slots = p.cell_traits().slots * columns;
  PackedOffsets o{};
  o.w_ih = p.layer_norm ? 0 : slots;
  o.w_hh = o.w_ih + (p.indexed(layer) ? a.one_hot.distinct * slots
                                      : operands<X>(p.layer_input(layer)) * gates);
  o.w_hr = o.w_hh + operands<X>(p.out_size()) * gates;
  o.total = o.w_hr + Panels<X>::size(p.hidden_size, p.proj_size);
  return o;
}

template <class X>
PackedOffsets backward_offsets(const Problem& p, int64_t layer) {
  PackedOffsets o{};
  // Each run rounds up, and a cell has at most two.
  const int64_t rows = p.gate_rows() + 2 * (kStep<X> - 1);
  o.w_ih = Panels<X>::size(rows, p.out_size());
  o.w_hr = o.w_ih + Panels<X>::size(rows, p.product_input(layer));
  o.total = o.w_hr + Panels<X>::size(p.proj_size, p.hidden_size);
  return o;
}

// Columns of N that fall to one part, whole panels each.
struct Columns {
  int64_t begin, end;
};
template <class C>
FUSEDRNN_INLINE Columns share(int64_t N, int64_t part, int64_t parts) {
  const int64_t panels = (N + Panels<C>::kColumns - 1) / Panels<C>::kColumns;
  auto start = [&](int64_t i) { return min(N, panels * i / parts * Panels<C>::kColumns); };
  return {start(part), start(part + 1)};
}

// Packs w [gates * H, K] transposed, group by group, for the slots that `runs` fills.
template <class X, class S>
void pack_groups(X* dst, const S* w, int64_t H, int64_t K, const RunList& runs, int gates,
                 int first_slot, int64_t part, int64_t parts) {
  constexpr int width = Panels<X>::kWidth;
  const int64_t all = (H + width - 1) / width, most = group_blocks<X>(gates);
  for (int64_t block = part * most; block < all; block += parts * most) {
    const int64_t vectors = min(most, all - block) * gates;
    pack_vectors(
        dst + block * gates * width * operands<X>(K), w, K, K, vectors,
        [&](int64_t v) {
          return gate_of(runs, first_slot + int(v % gates)) * H + (block + v / gates) * width;
        },
        [&](int64_t v) { return min(width, H - (block + v / gates) * width); });
  }
}
// B[k, n] = w[row0 + k, n]
template <class X, class S>
void pack_plain(X* dst, const S* w, int64_t row0, int64_t N, int64_t K, int64_t part,
                int64_t parts) {
  const Columns columns = share<X>(N, part, parts);
  pack_panels(dst, w + row0 * N, K, N, columns.begin, columns.end);
}

// f(slot, first unit, units, where in a row of gates) for a share of the vectors of gates.
template <class C, class F>
FUSEDRNN_INLINE void each_gate_vector(int64_t H, int slots, int64_t part, int64_t parts, F f) {
  constexpr int w = Panels<C>::kWidth;
  for (int64_t unit = part * w; unit < H; unit += parts * w)
    for (int slot = 0; slot < slots; slot++)
      f(slot, unit, min(w, H - unit), unit * slots + slot * w);
}

template <class S>
void pack_forward(const Forward& a, int64_t which, void* packed, int64_t part, int64_t parts) {
  using C = Compute<S>;
  using X = Operand<S>;
  const Problem& p = a.problem;
  const Weights& w = a.weights[which];
  const int64_t layer = which / p.num_directions;
  const PackedOffsets o = forward_offsets<X>(a, layer);
  const CellRuns runs = cell_runs(p.cell, p.layer_norm);
  const int gates = traits(p.cell).gates, slots = p.cell_traits().slots;
  C* to = static_cast<C*>(packed);
  X* panels = static_cast<X*>(packed);
  const int64_t H = p.hidden_size, P = p.out_size();
  auto bias = [&](int slot, int64_t unit, int64_t n) {
    Vec<C> sum{};
    auto add = [&](const void* b, int gate) {
      if (b && gate >= 0) sum += load(static_cast<const S*>(b) + gate * H + unit, n);
    };
    if (p.layer_norm) return sum;  // behind the norm
    add(w.b_ih, gate_of(runs.x, slot)), add(w.b_hh, gate_of(runs.h, slot));
    return sum;
  };
  if (!p.layer_norm)
    each_gate_vector<C>(H, slots, part, parts, [&](int slot, int64_t unit, int64_t n, int64_t at) {
      store(to + o.bias + at, bias(slot, unit, n));
    });
  if (p.indexed(layer)) {
    // For each distinct value a row of gates, as its one-hot vector makes them.
    const OneHot& x = a.one_hot;
    const int64_t row = Panels<C>::padded(H) * slots;
    each_gate_vector<C>(H, slots, part, parts, [&](int slot, int64_t unit, int64_t n, int64_t at) {
      const int gate = gate_of(runs.x, slot);
      const S* const from =
          static_cast<const S*>(w.w_ih) + (max(0, gate) * H + unit) * p.input_size;
      const Vec<C> b = bias(slot, unit, n);
      for (int64_t i = 0; i < x.distinct; i++) {
        Vec<C> v{};
        for (int64_t j = 0; gate >= 0 && j < n; j++)
          v[j] = to_compute(from[j * p.input_size + x.value[i]]);
        store(to + o.w_ih + i * row + at, b + v);
      }
    });
  } else {
    pack_groups(panels + o.w_ih, static_cast<const S*>(w.w_ih), H, p.layer_input(layer), runs.x,
                gates, 0, part, parts);
  }
  if (kDepth<X> > 1 || !a.unpacked_hh)
    pack_groups(panels + o.w_hh, static_cast<const S*>(w.w_hh), H, P, runs.h, gates, slots - gates,
                part, parts);
  if (p.proj_size && part == parts - 1)
    pack_vectors(
        panels + o.w_hr, static_cast<const S*>(w.w_hr), H, H,
        (P + Panels<X>::kWidth - 1) / Panels<X>::kWidth,
        [](int64_t v) { return v * Panels<X>::kWidth; },
        [&](int64_t v) { return min(Panels<X>::kWidth, P - v * Panels<X>::kWidth); });
}

template <class S>
void pack_backward(const Backward& a, int64_t which, void* packed, int64_t part, int64_t parts) {
  using X = Operand<S>;
  const Problem& p = a.problem;
  const Weights& w = a.weights[which];
  const PackedOffsets o = backward_offsets<X>(p, a.layer);
  X* to = static_cast<X*>(packed);
  const int64_t H = p.hidden_size, P = p.out_size();
  const CellRuns runs = cell_runs(p.cell, p.layer_norm);
  X* w_hh = to + o.w_hh;
  const bool goes_on = a.dhx || a.seq.length[a.seq.order[0]] > 1;  // to a step before
  for (const Run& run : runs.h) {
    if (!goes_on) break;
    pack_plain(w_hh, static_cast<const S*>(w.w_hh), run.gate * H, P, run.count * H, part, parts);
    w_hh += Panels<X>::size(run.count * H, P);
  }
  const int64_t in = p.product_input(a.layer);
  X* w_ih = to + o.w_ih;
  for (const Run& run : runs.x) {
    if (!a.grad_in) break;
    pack_plain(w_ih, static_cast<const S*>(w.w_ih), run.gate * H, in, run.count * H, part, parts);
    w_ih += Panels<X>::size(run.count * H, in);
  }
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
      : width(a.problem.product_input(layer)), mask(nullptr), scale(C(a.mask_scale)), seq(a.seq) {
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
  // A row as operands, with planes that are `plane` apart. A function of its own, for the sake of
  // building time.
  template <class X>
  __attribute__((noinline)) void read(X* to, int64_t plane, int64_t t, int64_t b) const {
    const S* const from = at(t, b);
    if (!mask) return to_operands(to, plane, from, width);
    const uint8_t* const m = mask + seq.token(t, b) * width;
    make_operands(to, plane, width, [&](int64_t j, int64_t n) {
      Vec<C> v = load(from + j, n);
      for (int64_t i = 0; i < n; i++) v[i] *= m[j + i] * scale;
      return v;
    });
  }
  // The gradient of a row on its way down, through the mask.
  void drop(C* values, int64_t t, int64_t b, Columns columns) const {
    const uint8_t* m = mask + seq.token(t, b) * width;
    for (int64_t j = columns.begin; j < columns.end; j++) values[j] *= m[j] * scale;
  }
};

// The outputs of a layer but the last, where they are kept for all tokens; else null.
template <class S>
FUSEDRNN_INLINE S* kept_outputs(const Common& a, int64_t layer) {
  const Problem& p = a.problem;
  if (a.hs) return static_cast<S*>(a.hs) + layer * a.seq.tokens * p.num_directions * p.out_size();
  if (!a.reserve) return nullptr;
  return reinterpret_cast<S*>(a.reserve + Reserve(p).output_offset(layer, a.seq.tokens));
}

// The cell states of a layer and direction: rows of hidden_size, `row` elements apart.
template <class C>
struct KeptCells {
  C* at;
  int64_t row;

  KeptCells(const Common& a, int64_t layer, int64_t dir) : at(nullptr), row(0) {
    const Problem& p = a.problem;
    const int64_t H = p.hidden_size;
    if (a.cs) {
      row = p.num_directions * H;
      at = static_cast<C*>(a.cs) + layer * a.seq.tokens * row + dir * H;
    } else if (a.reserve) {
      row = H;
      at = reinterpret_cast<C*>(a.reserve + Reserve(p).cell_offset(layer, dir, a.seq.tokens));
    }
  }
  FUSEDRNN_INLINE C* of(int64_t token) const { return at ? at + token * row : nullptr; }
};

// Zoneout of one row: how much of its old values stays.
template <class C>
struct Keep {
  const uint8_t* mask = nullptr;
  C rate = 0;

  Keep() = default;
  // `index` of all layers, directions and tokens
  Keep(const Zoneout& z, int64_t index, int64_t width)
      : mask(z.mask ? z.mask + index * width : nullptr), rate(C(z.rate)) {}
  FUSEDRNN_INLINE explicit operator bool() const { return mask || rate > 0; }
  FUSEDRNN_INLINE Vec<C> at(int64_t j, int64_t n) const {
    if (!mask) return broadcast<C>(rate);
    Vec<C> v{};
    for (int64_t i = 0; i < n; i++) v[i] = mask[j + i];
    return v;
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
