// The forward pass of a whole stack for some rows of the batch.
//
// A thread takes its rows through all layers and steps alone. Threads share only the packed
// weights, so there is no barrier. Where a row has two threads or more, or the weights are large, a
// team takes rows together: each member computes its groups of units, reads h of all of them, and
// waits at a barrier once h of a step is written. Gates and inputs are a member's own.
//
// Time goes in chunks, for each layer and direction: the input products of a chunk's tokens are one
// matrix product. A step then goes through the groups of units: h W_hh^T is added to a group's
// gates, and its cells are computed while these are in L1. Every second step goes in descending
// order: where weights exceed L2, it finds there what the step before read last.
#pragma once
#include "cpu/pass/factor.h"
#include "cpu/pass/layer_norm.h"
#include "cpu/pass/pack.h"
#include "cpu/pass/rows.h"
#include "cpu/product/unpacked.h"

namespace {

template <class S>
struct ForwardBuffers {
  using C = Compute<S>;
  using X = Operand<S>;
  int64_t ld_input, ld_gates, ld_h, ld_hidden, ld_operand, ld_projected;
  C *gates, *h[2], *c, *hidden;  // h of the last step and of this one alternate
  X* input;
  X *operand, *projected;  // factors: h of the last step after recurrent dropout, and `hidden`
  ForwardRow<S>* step;     // the rows of a step

  ForwardBuffers(const Problem& p, int64_t rows, Scratch& common, Scratch& own)
      : ld_input(row_stride<X>(max(p.product_input(0), p.num_directions * p.out_size()))),
        ld_gates(p.cell_traits().slots * Panels<C>::padded(p.hidden_size) + kRowPad<C>),
        ld_h(p.out_size() + kRowPad<C>),
        ld_hidden(p.hidden_size + kRowPad<C>),
        ld_operand(row_stride<X>(p.out_size())),
        ld_projected(row_stride<X>(p.hidden_size)) {
    const int64_t tokens = max(rows, kChunkTokens<X>);
    input = own.take<X>((tokens + kSpareRows<X>)*ld_input);
    gates = own.take<C>(tokens * ld_gates);
    for (C*& buffer : h) buffer = common.take<C>(rows * ld_h);
    c = common.take<C>(traits(p.cell).has_cell ? rows * p.hidden_size : 0);
    operand = own.take<X>((rows + kSpareRows<X>)*ld_operand);
    hidden = own.take<C>(p.proj_size ? rows * ld_hidden : 0);
    projected = own.take<X>(p.proj_size && kDepth<X> > 1 ? (rows + kSpareRows<X>)*ld_projected : 0);
    step = own.take<ForwardRow<S>>(rows);
  }
};

// The cells of a group of units, in all rows of a step, as work that a product overlaps.
template <class Cell, class S>
struct GroupCells {
  int64_t H;
  const ForwardRow<S>* rows;
  int64_t block, blocks, done, count;

  void compute_to(int64_t end) {
    const GroupCells local = *this;  // no store below can change it
    for (int64_t r = local.done; r < end; r++)
      cell_forward<Cell>(local.H, local.block, local.blocks, local.rows[r]);
    done = end;
  }
  void finish() { compute_to(count); }
  static void run(void* context, int64_t part, int64_t parts) {
    GroupCells& cells = *static_cast<GroupCells*>(context);
    cells.compute_to(cells.count * part / parts);
  }
};

// Adds the products of unpacked W_hh with h of n <= kDotRows rows to the gates of some blocks.
template <class Cell, class S, class C>
void add_unpacked(const S* w_hh, int64_t H, int64_t P, int64_t block, int64_t blocks, int64_t n,
                  const C* h, int64_t ld_h, C* gates, int64_t ld_gates, RowReading reading) {
  constexpr int w = Lanes<C>::kWidth;
  for (int64_t unit = block * w; unit < min(H, (block + blocks) * w); unit += w)
    for (int slot = Cell::kSlots - Cell::kGates; slot < Cell::kSlots; slot++) {
      Vec<C> sums[kDotRows];
      dot_rows<C>(sums, w_hh + (gate_of(Cell::h_ranges(), slot) * H + unit) * P, min(w, H - unit),
                  h, ld_h, P, n, reading);
      C* const sum = gates + unit * Cell::kSlots + slot * w;
      for (int64_t r = 0; r < n; r++) store(sum + r * ld_gates, load(sum + r * ld_gates) + sums[r]);
    }
}

// Rows of the compute type as factors: where that is the operand type, the rows themselves.
template <class X, class C>
const X* factors(const C* same, const X* converted) {
  if constexpr (kDepth<X> == 1) {
    if (same) return same;
  }
  return converted;
}

// Applies zoneout of h to its projection, `h` of a row; `h_prev` is that of the step before.
template <class C>
void zone_out_projected(const ZoneoutMask<C>& zoneout, int64_t P, const C* h_prev, C* h) {
  constexpr int w = Lanes<C>::kWidth;
  for (int64_t j = 0; zoneout && j < P; j += w) {
    const int64_t n = min(w, P - j);
    store(h + j, zone_out(zoneout.load(j, n), load(h_prev + j, n), load(h + j, n)), n);
  }
}

// One layer and direction: its arrays and packed weights.
template <class S>
struct ForwardDirection {
  using C = Compute<S>;
  using X = Operand<S>;
  const int64_t layer, dir, index;  // index: of all layers and directions
  const LayerInput<S> input;
  const bool indexed;
  S *const out, *const saved;
  C* const scales;
  const CellStates<C> cells;
  const bool saves_candidates;
  const Weights& weights;
  const C* const bias;
  const C* const gates_of_values;  // for integer input, in place of w_ih
  const Factor<S> w_ih, w_hh, w_hr;

  ForwardDirection(const Forward& call, int64_t of_layer, int64_t direction, const S* below,
                   const C* packed, const PackedOffsets& offsets)
      : layer(of_layer),
        dir(direction),
        index(layer * call.problem.num_directions + dir),
        input(call, layer, below),
        indexed(call.problem.indexed(layer)),
        out(layer_output<S>(call, layer)),
        saved(call.reserve ? saved_slots<S>(call, layer, dir) : nullptr),
        scales(call.reserve ? saved_scales<S>(call, layer, dir) : nullptr),
        cells(call, layer, dir),
        saves_candidates(call.reserve && Reserve::keeps_candidates(call.problem)),
        weights(call.weights[index]),
        bias(packed),
        gates_of_values(packed + offsets.w_ih),
        w_ih(reinterpret_cast<const X*>(packed) + offsets.w_ih,
             {weights.w_ih, weights.scale_ih, ranges(call).x, 0, gates(call),
              call.problem.hidden_size, input.width, call.pass.long_sums}),
        w_hh(reinterpret_cast<const X*>(packed) + offsets.w_hh,
             {weights.w_hh, weights.scale_hh, ranges(call).h,
              call.problem.cell_traits().slots - gates(call), gates(call), call.problem.hidden_size,
              call.problem.out_size(), call.pass.long_sums}),
        w_hr(reinterpret_cast<const X*>(packed) + offsets.w_hr,
             {weights.w_hr, weights.scale_hr, GateRanges<1>{{{0, 0, 1}}}, 0, 1,
              call.problem.out_size(), call.problem.hidden_size, call.pass.long_sums}) {}

 private:
  static CellGateRanges ranges(const Forward& call) {
    return gate_ranges(call.problem.cell, call.problem.layer_norm);
  }
  static int gates(const Forward& call) { return traits(call.problem.cell).gates; }
};

template <class Cell, class S>
class ForwardPass {
  using C = Compute<S>;
  using X = Operand<S>;
  using G = UnitGroups<Cell, C>;
  using Direction = ForwardDirection<S>;
  static constexpr int kFirstHSlot = Cell::kSlots - Cell::kGates;
  static constexpr bool kNormed = kIsNormed<Cell>;
  static constexpr int64_t kLongCells = 128;  // vectors of gates of a group, in all rows

 public:
  ForwardPass(const Forward& forward, const Rows& task, Member& member)
      : call(forward),
        p(forward.problem),
        seq(forward.seq),
        me(member),
        rows(seq, task.first, task.end),
        overlaps_cells(kTiled<X> && !kNormed && forward.pass.overlaps_cells),
        common{static_cast<char*>(task.common)},
        own{static_cast<char*>(task.own)},
        buf(p, rows.count, common, own) {}

  void run() {
    const C* packed = static_cast<const C*>(call.packed);
    const S* below = nullptr;
    for (int64_t layer = 0; layer < p.num_layers; layer++) {
      const PackedOffsets offsets = forward_offsets<S>(call, layer);
      for (int64_t dir = 0; dir < p.num_directions; dir++, packed += offsets.total)
        run_direction(Direction(call, layer, dir, below, packed, offsets));
      below = layer_output<S>(call, layer);
    }
  }

 private:
  void run_direction(const Direction& d) {
    if (me.index == 0)
      read_states<S>(call, d.layer, d.dir, rows.first, rows.count, buf.h[0], buf.ld_h, buf.c);
    me.barrier();
    const int64_t steps = rows.chunk_steps<X>();
    for (int64_t begin = 0; begin < rows.longest; begin += steps) {
      const int64_t end = min(rows.longest, begin + steps);
      input_product(d, begin, end);
      C* gates = buf.gates;
      for (int64_t i = begin; i < end; i++) {
        const int64_t t = rows.time(d.dir, i), n = rows.active(t);
        for (int64_t r = 0; r < n; r++) prepare(d, t, r, gates + r * buf.ld_gates);
        recurrent_step(d, call.pass.alternates && i % 2, n, gates);
        if constexpr (kNormed) normalise(d, t, n);
        if (p.proj_size) project(d, t, n);
        finish(n);
        gates += n * buf.ld_gates;
      }
    }
    if (me.index == 0)
      write_states<S>(call, d.layer, d.dir, rows.first, rows.count, buf.h[0], buf.ld_h, buf.c);
  }

  // The gates of all tokens of steps [begin, end), as far as the input makes them.
  void input_product(const Direction& d, int64_t begin, int64_t end) {
    const int64_t H = p.hidden_size, columns = G::gate_columns(H);
    int64_t q = 0;
    for (int64_t i = begin; i < end; i++) {
      const int64_t t = rows.time(d.dir, i), n = rows.active(t);
      for (int64_t r = 0; r < n; r++, q++) {
        const int64_t b = rows.row(r);
        if (d.indexed)
          convert_row(buf.gates + q * buf.ld_gates,
                      d.gates_of_values + call.one_hot.which[seq.token(t, b)] * columns, columns);
        else
          d.input.read(buf.input + q * buf.ld_input, buf.ld_input / kPlanes<X>, t, b);
      }
    }
    if (d.indexed) return;
    const int64_t tokens = q;
    G::each(H, me, false, [&](int64_t block, int64_t blocks) {
      const int64_t column = block * Cell::kSlots * G::kWidth;
      C* const gates = buf.gates + column;
      const C* const bias = d.bias + column;
      d.w_ih.multiply(block, blocks * Cell::kGates * G::kWidth, tokens, buf.input, buf.ld_input,
                      gates, buf.ld_gates, {kNormed ? nullptr : bias, 0});
      // Slots that the input does not reach.
      for (int k = Cell::kGates; !kNormed && k < Cell::kSlots; k++)
        for (int64_t i = 0; i < tokens; i++)
          store(gates + i * buf.ld_gates + k * G::kWidth, load(bias + k * G::kWidth));
    });
  }

  // Sets up the row of a step: its arrays, the state that it starts from, and the factors of the
  // recurrent product.
  void prepare(const Direction& d, int64_t t, int64_t r, C* gates) {
    const int64_t H = p.hidden_size, P = p.out_size(), D = p.num_directions;
    const int64_t b = rows.row(r), token = seq.token(t, b),
                  state_row = d.index * seq.tokens + token;
    C* const h = buf.h[0] + r * buf.ld_h;
    ForwardRow<S>& row = buf.step[r];
    row.gates = gates;
    row.h_prev = h;
    row.h = p.proj_size ? buf.hidden + r * buf.ld_hidden : buf.h[1] + r * buf.ld_h;
    row.c = Cell::kHasCell ? buf.c + r * H : nullptr;
    row.y = p.proj_size ? nullptr : d.out + (token * D + d.dir) * P;
    row.saved = d.saved ? d.saved + token * Cell::kSaved * H : nullptr;
    row.saved_c = Cell::kHasCell ? d.cells.row(token) : nullptr;
    row.candidate = d.saves_candidates ? d.cells.row(token) : nullptr;
    row.zoneout_h = p.proj_size ? ZoneoutMask<C>() : ZoneoutMask<C>(call.zoneout_h, state_row, P);
    row.zoneout_c = ZoneoutMask<C>(call.zoneout_c, state_row, H);

    int64_t before;
    if (seq.start(d.dir, t, b, &before) == Sequence::Start::kZeros) {
      for (int64_t j = 0; j < P; j++) h[j] = 0;
      for (int64_t j = 0; Cell::kHasCell && j < H; j++) row.c[j] = 0;
    }
    X* const operand = buf.operand + r * buf.ld_operand;
    if (call.h_mask) {
      const C* const mask = static_cast<const C*>(call.h_mask) + (d.index * seq.batch + b) * P;
      make_operands(operand, buf.ld_operand / kPlanes<X>, P,
                    [&](int64_t j, int64_t n) { return load(h + j, n) * load(mask + j, n); });
    } else if (kDepth<X> > 1) {
      to_operands(operand, buf.ld_operand / kPlanes<X>, h, P);
    }
  }

  // h W_hh^T is added to the gates of n rows, and their cells are computed: during the next
  // product, right after their own, whose sums are in L1 then, or after all products. While tiles
  // are in use, vectors of 64 bytes run at half their speed, until tiles have rested for 0.65 us;
  // then these take 0.3 us to start. So cells that would take so long wait for the last product.
  void recurrent_step(const Direction& d, bool descending, int64_t n, C* gates) {
    const int64_t H = p.hidden_size;
    const X* const h = factors(call.h_mask ? nullptr : buf.h[0], buf.operand);
    const ForwardRow<S>* const step = buf.step;
    GroupCells<Cell, S> cells{};
    OverlappedWork work{};
    if constexpr (!kNormed)
      if (overlaps_cells) work = {cells.run, &cells};
    const StepTiles<X> tiles(n);
    const bool after_all =
        kTiled<X> && !overlaps_cells && n * Cell::kGates * G::kBlocks >= kLongCells;
    G::each(H, me, descending, [&](int64_t block, int64_t blocks) {
      multiply_group(d, block, blocks, n, h, gates, work, tiles.height);
      if constexpr (!kNormed) {
        if (after_all) {
          const int64_t first = cells.blocks ? min(cells.block, block) : block;
          cells = {H, step, first, cells.blocks + blocks, 0, n};
          return;
        }
        cells.finish();  // the rest of the last group
        cells = {H, step, block, blocks, 0, n};
        if (!overlaps_cells) cells.finish();
      }
    });
    if constexpr (!kNormed) cells.finish();
  }

  FUSEDRNN_INLINE void multiply_group(const Direction& d, int64_t block, int64_t blocks, int64_t n,
                                      const X* h, C* gates, OverlappedWork work,
                                      int64_t tile_height) const {
    if constexpr (kDepth<X> == 1 && !kNormed && !kInPlace<S>)
      if (call.pass.unpacked_hh)
        return add_unpacked<Cell>(static_cast<const S*>(d.weights.w_hh), p.hidden_size,
                                  p.out_size(), block, blocks, n, h, buf.ld_operand, gates,
                                  buf.ld_gates, {call.pass.streams, 0});
    C* const sums = gates + (block * Cell::kSlots + kFirstHSlot) * G::kWidth;
    d.w_hh.multiply(block, blocks * Cell::kGates * G::kWidth, n, h, buf.ld_operand, sums,
                    buf.ld_gates, {kNormed ? nullptr : sums, buf.ld_gates}, work, tile_height);
  }

  // Cells with layer normalisation, which needs the gates of all units.
  void normalise(const Direction& d, int64_t t, int64_t n) {
    for (int64_t r = 0; r < n; r++) {
      const int64_t token = seq.token(t, rows.row(r));
      normed_forward<Cell>(p.hidden_size, buf.step[r], NormWeights<S>(d.weights),
                           d.scales ? d.scales + token * Cell::kScales : nullptr);
    }
  }

  // h = W_hr (o tanh(c)), and its zoneout.
  void project(const Direction& d, int64_t t, int64_t n) {
    const int64_t H = p.hidden_size, P = p.out_size(), D = p.num_directions;
    for (int64_t r = 0; kDepth<X> > 1 && r < n; r++)
      to_operands(buf.projected + r * buf.ld_projected, buf.ld_projected / kPlanes<X>,
                  buf.hidden + r * buf.ld_hidden, H);
    d.w_hr.multiply(0, P, n, factors(buf.hidden, buf.projected), buf.ld_projected, buf.h[1],
                    buf.ld_h, {});
    for (int64_t r = 0; r < n; r++) {
      const int64_t token = seq.token(t, rows.row(r));
      C *const h_prev = buf.h[0] + r * buf.ld_h, *const h = buf.h[1] + r * buf.ld_h;
      zone_out_projected<C>({call.zoneout_h, d.index * seq.tokens + token, P}, P, h_prev, h);
      convert_row(d.out + (token * D + d.dir) * P, h, P);
    }
  }

  // Hands h to the next step, with that of rows that are not active.
  void finish(int64_t n) {
    for (int64_t r = n; me.index == 0 && r < rows.count; r++)
      convert_row(buf.h[1] + r * buf.ld_h, buf.h[0] + r * buf.ld_h, p.out_size());
    C* const last = buf.h[0];
    buf.h[0] = buf.h[1], buf.h[1] = last;
    me.barrier();
  }

  const Forward& call;
  const Problem& p;
  const Sequence& seq;
  Member& me;
  const TaskRows rows;
  const bool overlaps_cells;
  Scratch common, own;
  ForwardBuffers<S> buf;
};

}  // namespace
