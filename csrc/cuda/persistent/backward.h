// All steps of back-propagation through time, of one or more layers and directions.
//
// A block owns what it owns forward: `units` hidden units with all their gates, of one stage and
// one slice of the batch, and the same rows of W_hh. From the gradients of its own gates it makes
// partial sums of dL/dh for every unit of the layer and sends each block of the team the part that
// is its own: that moves a gate's share of what it would take to send all gate gradients to all. A
// stage with another below does the same with W_ih, for the gradient of its input. Thread i owns
// row i / units and unit i % units: dh and dc stay in its registers.
//
// A step: fetch what forward saved | wait until the partial sums have come | add them in the order
// of blocks, cell | block barrier | products | block barrier | send | gate gradients and the
// input's gradient to global memory. There are two inboxes in turn: a block writes the one of step
// s + 1 when the sums of step s have come from all, who have read those of step s - 1 by then. A
// team of one block sends nothing: what its products left is what it would receive.
#pragma once
#include "cuda/persistent/block.h"
#include "cuda/persistent/product.h"

namespace fusedrnn {

template <class E, bool kCluster>
struct BackwardBlock : Block<PersistentBackward, typename E::Operand, kCluster> {
  using S = typename E::Operand;  // the storage type too
  using Base = Block<PersistentBackward, S, kCluster>;
  using Base::begins_anew, Base::feeds_next, Base::follows, Base::h_factor, Base::me, Base::p,
      Base::piece, Base::s, Base::shared, Base::team, Base::weight_row;
  const BackwardStage& stage = Base::stage();

  __device__ BackwardBlock(const PersistentBackward& p, char* shared)
      : Base(p, shared, 16 / sizeof(float)) {}

  __device__ int64_t time(int64_t step) const { return stage.reverse ? step : me.last - 1 - step; }

  enum Kind { kRecurrent, kInput };
  // Where a block finds what block `from` sent it for `step`, from the beginning of its inbox.
  __device__ int64_t place(Kind kind, int64_t step, int from) const {
    const int kinds = p.chained ? 2 : 1, each = s.rows * s.units;
    return ((step % 2 * kinds + kind) * team.size + from) * int64_t(each);
  }
  // This block's, in shared memory; teams that are not clusters have block `rank`'s in global
  // memory.
  __device__ float* own_inbox() const { return reinterpret_cast<float*>(shared + s.inbox); }
  __device__ float* inbox_of(int rank) const {
    const int64_t block = team.index * team.size + rank;
    return static_cast<float*>(p.workspace) + block * 2 * inbox_floats(s, p.chained);
  }
  // Sends everyone the sums over this block's gates for the units that are theirs.
  __device__ void send(Kind kind, const ProductShape& product, int64_t step) const {
    if (team.alone()) return;
    const float* partial = reinterpret_cast<const float*>(shared + product.partial) +
                           piece.row * product.partial_row + piece.unit;
    const int from_part = s.x_rows * product.partial_row;
    with_split(product, [&](auto split) {
      constexpr int kSplit = decltype(split)::kValue;
      auto sums_for = [&](int to) {
        Words parts[kSplit];
#pragma unroll
        for (int i = 0; i < kSplit; i++)
          parts[i] = *reinterpret_cast<const Words*>(partial + i * from_part + to * s.units);
        Words sums = parts[0];
#pragma unroll
        for (int i = 1; i < kSplit; i++)
#pragma unroll
          for (int k = 0; k < 4; k++)
            sums.word[k] =
                float_to_bits(bits_to_float(sums.word[k]) + bits_to_float(parts[i].word[k]));
        return sums;
      };
      const int64_t at = place(kind, step, team.rank) + piece.row * s.units + piece.unit;
      auto store = [&](int to, const Words& sums) {
        if constexpr (kCluster)
          store_async(reinterpret_cast<Words*>(own_inbox() + at), sums, arrivals().of(step), to);
        else
          store_words(reinterpret_cast<Words*>(inbox_of(to) + at), sums);
      };
      int to = piece.first;
      const int next = piece.every;
      for (; to + next < team.size; to += 2 * next) {  // no load waits behind a store
        const Words sums[2] = {sums_for(to), sums_for(to + next)};
        store(to, sums[0]), store(to + next, sums[1]);
      }
      if (to < team.size) store(to, sums_for(to));
    });
  }
  __device__ float received(Kind kind, const ProductShape& product, int64_t step) const {
    if (team.alone()) {
      float sums[1];
      totals(sums, shared, product, s.x_rows, me.row, {me.unit});
      return sums[0];
    }
    const float* from = kCluster ? own_inbox() : inbox_of(team.rank);
    from += place(kind, step, 0) + me.row * s.units + me.unit;
    const int each = s.rows * s.units;
    float sum = 0;
    for (int block = 0; block < team.size; block++) sum += from[block * each];
    return sum;
  }

  // What comes for a step, where the team is a cluster.
  __device__ Arrivals arrivals() const {
    return {reinterpret_cast<Mbarrier*>(shared + s.arrivals),
            (feeds_next() ? 2 : 1) * team.size * s.rows * s.units * int(sizeof(float))};
  }
  __device__ void wait(int64_t step) const {
    if constexpr (kCluster)
      arrivals().wait(step);
    else if (!team.alone())
      team.wait(step);
  }

  __device__ void set_up() const {
    // Column c of the tiles is gate c / units, in the order of the slots, of unit c % units.
    auto load = [&](const ProductShape& product, const void* w, const int* gates) {
      load_weights<E, true>(shared, product, w, p.layout.gates * s.units, int(p.hidden_size),
                            [&](int i) { return weight_row(gates, i); });
    };
    load(s.recurrent, stage.w_hh, p.layout.h_gate + p.layout.first());
    if (feeds_next()) load(s.input, stage.w_ih, p.layout.x_gate);
    for (int i = threadIdx.x; i < s.x_rows * s.x_row; i += kPersistentThreads)
      reinterpret_cast<S*>(shared + s.x)[i] = E::operand(0);
    if constexpr (kCluster) arrivals().begin();
    team.begin();
  }

  // The gradient of the input at the time of the step before, for the stage that follows.
  __device__ void finish_input(int64_t step, float dx) const {
    const int64_t t = time(step - 1);
    auto at = [&](int64_t t) {
      return static_cast<float*>(stage.dx) + token_of(p, t, me.b) * p.hidden_size + me.j;
    };
    if (!me.exists || t >= me.length) return;
    store_value(at(t), dx);
    if (t > 0) prefetch(at(t - 1));  // chains run forward in time
  }

  // What a step starts from: zeros, the call's initial state, or the state of another step.
  enum Start { kZeros, kInitial, kBefore };
  // What the cell of a step reads.
  struct StepInputs {
    S raw[kMostSlots];  // what forward saved; converted later: all loads are on their way together
    float h = 0, h_prev = 0, c = 0, c_prev = 0, dy = 0, dcs = 0, zone_h = 0, zone_c = 0;
  };
  __device__ StepInputs read_step(int64_t token, Start start, int64_t before) const {
    const CellLayout& layout = p.layout;
    const int64_t H = p.hidden_size, at = me.b * H + me.j;
    const int64_t earlier = start == kBefore ? token_of(p, before, me.b) : 0;
    StepInputs in;
    if (layout.saved) {
      const S* saved = static_cast<const S*>(stage.saved) + token * layout.saved * H + me.j;
#pragma unroll
      for (int k = 0; k < kMostSlots; k++) in.raw[k] = saved[(k < layout.saved ? k : 0) * H];
    }
    if (layout.saved == 0)
      in.h = stage.saved_c ? read<float>(stage.saved_c, token * p.c_stride + me.j)
                           : read<S>(stage.y, token * stage.y_stride + me.j);
    if (layout.uses_h_prev && start != kZeros)
      in.h_prev = start == kInitial ? read<S>(stage.h0, at)
                                    : read<S>(stage.y, earlier * stage.y_stride + me.j);
    if (layout.has_cell) {
      in.c = read<float>(stage.saved_c, token * p.c_stride + me.j);
      if (start != kZeros)
        in.c_prev = start == kInitial ? read<S>(stage.c0, at)
                                      : read<float>(stage.saved_c, earlier * p.c_stride + me.j);
      in.dcs = read<float>(stage.dcs, token * p.c_stride + me.j);
    }
    in.dy = read<float>(stage.dy, token * stage.dy_stride + me.j);
    if (p.zoneout_h > 0) in.zone_h = zone_rate(stage.masks.zone_h, p.zoneout_h, token * H + me.j);
    if (p.zoneout_c > 0) in.zone_c = zone_rate(stage.masks.zone_c, p.zoneout_c, token * H + me.j);
    return in;
  }

  // A step of zoneout and of the cell, from the gradients of h and c to those of the gates, in
  // `slots`, and of the h and c before, but for what goes through W_hh.
  __device__ void step_cell(StepInputs in, float (&slots)[kMostSlots], float& dh, float& dc) const {
    if (p.layout.saved)
#pragma unroll
      for (int k = 0; k < kMostSlots; k++) slots[k] = to_compute(in.raw[k]);
    const bool zones_h = p.zoneout_h > 0, zones_c = p.zoneout_c > 0;
    float passed_h = 0, passed_c = 0;
    if (zones_h) passed_h = zone_out_backward(in.zone_h, dh);
    if (zones_c) passed_c = zone_out_backward(in.zone_c, dc);
    with_cell_type(p.cell, slots, [&](auto cell, auto& own) {
      using Cell = decltype(cell);
      if constexpr (Cell::kHasCell)
        if (zones_c) in.c = Cell::cell_state(own, in.c_prev);
      dh = Cell::template backward<ScalarMath>(own, in.h_prev, in.h, in.c_prev, in.c, dh, dc);
    });
    dh += passed_h, dc += passed_c;
  }

  __device__ void run() const {
    const CellLayout& layout = p.layout;
    const int64_t H = p.hidden_size, at = me.b * H + me.j;
    const float factor = h_factor();
    S* gates = reinterpret_cast<S*>(shared + s.x);
    bool anew = false;  // the last step began from zeros, which no gradient passes
    float dh = 0, dc = 0, dx = 0;
    if (me.exists) {
      dh = read<float>(stage.dhn, at);
      if (layout.has_cell) dc = read<float>(stage.dcn, at);
    }
    auto through_w_hh = [&](int64_t step) {
      const float sum = received(kRecurrent, s.recurrent, step) * factor;
      return anew ? 0.f : sum;
    };
    set_up();
    const Kept<E> kept(shared, s.recurrent);

    for (int64_t step = 0; step < me.last; step++) {
      const int64_t t = time(step), before = stage.reverse ? t + 1 : t - 1;
      const bool runs = me.exists && t < me.length;
      const bool first = before < 0 || before >= me.length;
      const bool from_zeros = begins_anew(t);
      const int64_t token = me.exists && (runs || !p.offsets) ? token_of(p, t, me.b) : 0;
      float slots[kMostSlots] = {};
      StepInputs in;
      if (runs) in = read_step(token, from_zeros ? kZeros : first ? kInitial : kBefore, before);
      const float* const from_above = static_cast<const float*>(stage.above) + token * H + me.j;
      float above[1];
      if (runs && follows()) above[0] = load_value(from_above);
      if (step > 0) {
        wait(step);
        if (me.exists) dh += through_w_hh(step);
        if (feeds_next() && me.exists) dx = received(kInput, s.input, step);
      }
      if (runs && follows()) {
        team.await(above, from_above, 0);
        if (stage.above_mask) above[0] *= stage.above_mask[token * H + me.j] ? p.mask_scale : 0.f;
        in.dy += above[0];
      }
      if (runs) {
        dh += in.dy, dc += in.dcs;
        step_cell(in, slots, dh, dc);
        if (from_zeros) dh = dc = 0;
      }
      anew = from_zeros;
      if (team.lost) {
        dh = dc = dx = not_a_number();
#pragma unroll
        for (int k = 0; k < kMostSlots; k++) slots[k] = dh;
      }
      if (me.in_block)
#pragma unroll
        for (int k = 0; k < kMostSlots; k++)
          if (k < layout.slots)
            gates[me.row * s.x_row + k * s.units + me.unit] = E::operand(runs ? slots[k] : 0.f);
      __syncthreads();
      multiply<E>(shared, s.recurrent, kept, s.x_rows, gates + layout.first() * s.units, s.x_row);
      if (feeds_next()) multiply<E>(shared, s.input, NoneKept{}, s.x_rows, gates, s.x_row);
      __syncthreads();
      send(kRecurrent, s.recurrent, step + 1);
      if (feeds_next()) send(kInput, s.input, step + 1);
      if constexpr (!kCluster)
        if (!team.alone()) team.arrive(step + 1);
      if (me.exists && (runs || !p.offsets))
#pragma unroll
        for (int k = 0; k < kMostSlots; k++)
          if (k < layout.slots)
            write<S>(stage.dgates, (token * layout.slots + k) * H + me.j, runs ? slots[k] : 0.f);
      if (feeds_next() && step > 0) finish_input(step, dx);
    }
    if (me.last > 0) {
      wait(me.last);
      if (me.exists) dh += through_w_hh(me.last);
      if (feeds_next()) finish_input(me.last, me.exists ? received(kInput, s.input, me.last) : 0.f);
      if (team.lost) dh = dc = not_a_number();
    }
    if (me.exists) {
      write<float>(stage.dh0, at, dh);
      if (layout.has_cell) write<float>(stage.dc0, at, dc);
      if (!p.offsets)  // steps that no row of the team has
        for (int64_t t = me.last; t < p.steps; t++)
          for (int k = 0; k < layout.slots; k++)
            write<S>(stage.dgates, (token_of(p, t, me.b) * layout.slots + k) * H + me.j, 0);
    }
  }
};

template <class E, bool kCluster>
__global__ void __launch_bounds__(kPersistentThreads, 1)
    persistent_backward_kernel(const __grid_constant__ PersistentBackward p) {
  if constexpr (kCanRun<E, kCluster>) {
    FUSEDRNN_DYNAMIC_SHARED(char, shared);
    const BackwardBlock<E, kCluster> block(p, shared);
    block.run();
  }
}

}  // namespace fusedrnn
