// All steps forward, of one or more layers and directions.
//
// A block owns `units` hidden units, with all their gates, of one stage and one slice of `rows`
// rows of the batch. Its rows of W_hh (of a chained stage also those of W_ih) lie in shared memory
// from the first step to the last, beside h of all units: of the step before, complete, and of this
// one, as the team's blocks write it. Thread i owns row i / units and unit i % units: h and c stay
// in its registers; the warps share the product as product.h says.
//
// A step: wait until h is complete | product | block barrier | sums, cell | block barrier | send h
// to the team | y and what backward needs to global memory, the next step's input or its product.
// The last part runs while h is on its way: it costs nothing where the exchange takes longer. In a
// cluster a block writes the buffer of step s + 1 when h of step s has come from all, who have left
// step s - 1 then, whose buffer it was. In global memory each step has places of its own. A team of
// one block sends nothing: its threads write h to where the next product reads it.
#pragma once
#include "cuda/persistent/block.h"
#include "cuda/persistent/product.h"

namespace fusedrnn {

template <class E, bool kCluster>
struct ForwardBlock : Block<PersistentForward, typename E::Operand, kCluster> {
  using S = typename E::Operand;  // the storage type too
  using Base = Block<PersistentForward, S, kCluster>;
  using Base::begins_anew, Base::feeds_next, Base::follows, Base::gate_row, Base::h_factor,
      Base::me, Base::p, Base::piece, Base::s, Base::shared, Base::team, Base::weight_row;
  const ForwardStage& stage = Base::stage();

  __device__ ForwardBlock(const PersistentForward& p, char* shared)
      : Base(p, shared, 16 / sizeof(S)) {}

  __device__ int64_t time(int64_t step) const { return stage.reverse ? me.last - 1 - step : step; }

  __device__ S* x(int64_t step) const {
    S* buffers = reinterpret_cast<S*>(shared + s.x);
    return kCluster ? buffers + step % 2 * (s.x_rows * s.x_row) : buffers;
  }
  // Where teams that are not clusters exchange x of a step, from the second one on: [rows, units].
  __device__ Words* outside(int64_t step, int row, int unit) const {
    const int64_t before = (team.index * (p.steps - 1) + step - 1) * p.exchanged();
    return reinterpret_cast<Words*>(static_cast<S*>(p.workspace) + before +
                                    row * team.size * s.units + unit);
  }

  // x of the first step is the initial state, which every block reads for itself.
  __device__ void set_up() const {
    const int64_t H = p.hidden_size;
    // Row r of the tiles is gate r / units, in the order of the slots, of unit r % units.
    auto load = [&](const ProductShape& product, const void* w, const int* gates) {
      load_weights<E, false>(shared, product, w, p.layout.gates * s.units, int(p.hidden_size),
                             [&](int i) { return weight_row(gates, i); });
    };
    load(s.recurrent, stage.w_hh, p.layout.h_gate + p.layout.first());
    if (follows()) load(s.input, stage.w_ih, p.layout.x_gate);
    for (int i = threadIdx.x; i < (kCluster ? 2 : 1) * s.x_rows * s.x_row;
         i += kPersistentThreads) {
      const int row = i / s.x_row, column = i % s.x_row;
      const int64_t b = p.row_at(team.slice * s.rows + row, team.member);
      bool initial = row < s.rows && b < p.batch && column < H;
      if (initial && p.resets)
        initial = !fusedrnn::begins_anew(p, p.resets, stage.reverse, time(0), b, length_of(p, b));
      float value = initial ? read<S>(stage.h0, b * H + column) : 0.f;
      if (initial && stage.masks.h_mask) value *= read<float>(stage.masks.h_mask, b * H + column);
      reinterpret_cast<S*>(shared + s.x)[i] = E::operand(value);
    }
    if (follows())
      for (int i = threadIdx.x; i < s.x_rows * s.x_row; i += kPersistentThreads)
        reinterpret_cast<S*>(shared + s.input_x)[i] = E::operand(0);
    if constexpr (kCluster) arrivals().begin();
    team.begin();
  }
  __device__ Arrivals arrivals() const {
    return {reinterpret_cast<Mbarrier*>(shared + s.arrivals),
            team.size * s.rows * s.units * int(sizeof(S))};
  }

  // Where the sums of each slot lie in a row of partial sums, of gates that begin with slot
  // `first`; of slots that have none, somewhere in it: loads without a condition can be on the way
  // together.
  struct Offsets {
    int at[kMostSlots];
  };
  __device__ Offsets offsets_from(int first) const {
    Offsets o;
#pragma unroll
    for (int k = 0; k < kMostSlots; k++) {
      const bool has = k >= first && k < first + p.layout.gates;
      o.at[k] = (has ? k - first : 0) * s.units + me.unit;
    }
    return o;
  }

  // The input's part of the step, for slots that it reaches. All threads of the block.
  __device__ void read_input(int64_t step, float (&input)[kMostSlots]) const {
    const int64_t H = p.hidden_size, t = time(step);
    if (!follows()) {
      if (!me.exists || t >= me.length) return;
      const float* gates = static_cast<const float*>(stage.gates_x) +
                           token_of(p, t, me.b) * (p.layout.gates * H) + me.j;
#pragma unroll
      for (int k = 0; k < kMostSlots; k++) {
        const int gate = p.layout.x_gate[k];
        input[k] = gates[(gate > 0 ? gate : 0) * H];
      }
      return;
    }
    const ForwardStage& below = p.stage[team.stage - 1];
    S* x_in = reinterpret_cast<S*>(shared + s.input_x);
    const Share mine(s.rows);
    for (int row = mine.row; row < s.rows; row += mine.rows) {
      const int64_t b = p.row_at(team.slice * s.rows + row, team.member);
      const bool runs = b < p.batch && t < length_of(p, b);
      const int64_t token = runs ? token_of(p, t, b) : 0;
      const S* const from = static_cast<const S*>(below.y) + token * below.y_stride;
      constexpr int kAtOnce = 8;  // loads on their way
      for (int64_t first = mine.lane; first < H; first += kAtOnce * mine.lanes) {
        auto exists = [&](int i) { return first + i * mine.lanes < H; };
        S values[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; i++)
          values[i] = runs && exists(i) ? missing<S>() : from_compute<S>(0);
        team.await(values, from + first, mine.lanes);
#pragma unroll
        for (int i = 0; i < kAtOnce; i++) {
          if (!exists(i)) break;
          const int64_t column = first + i * mine.lanes;
          float value = to_compute(values[i]);
          if (runs && stage.mask) value *= stage.mask[token * H + column] ? p.mask_scale : 0.f;
          x_in[row * s.x_row + column] = E::operand(value);
        }
      }
    }
    team.agree();
    multiply<E>(shared, s.input, NoneKept{}, s.x_rows, x_in, s.x_row);
    __syncthreads();
    if (me.in_block) totals(input, shared, s.input, s.x_rows, me.row, offsets_from(0).at);
    __syncthreads();  // the next product writes where these sums were
  }

  // Where a thread leaves its element of the next x: for the team, or in x itself, which no product
  // reads just then.
  __device__ S& own_h() const {
    return team.alone() ? x(0)[me.row * s.x_row + me.unit]
                        : reinterpret_cast<S*>(shared + s.staging)[me.row * s.units + me.unit];
  }
  // Hands the team what stands in the staging buffer, this block's part of x of `step`.
  __device__ void publish(int64_t step) const {
    if (team.alone()) return;
    const S* staging = reinterpret_cast<const S*>(shared + s.staging);
    const Words words = *reinterpret_cast<const Words*>(staging + piece.row * s.units + piece.unit);
    const int unit = team.rank * s.units + piece.unit;
    if constexpr (kCluster) {
      Words* const at = reinterpret_cast<Words*>(x(step) + piece.row * s.x_row + unit);
      for (int to = piece.first; to < team.size; to += piece.every)
        store_async(at, words, arrivals().of(step), to);
    } else if (piece.first == 0) {
      store_value(outside(step, piece.row, unit), words);
      if (step + 1 < me.last) prefetch(outside(step + 1, piece.row, unit));
    }
  }
  // Waits until x of `step` is complete.
  __device__ void await(int64_t step) const {
    if (team.alone()) return;
    if constexpr (kCluster) {
      arrivals().wait(step);
    } else {
      constexpr int kElements = 16 / sizeof(S), kAtOnce = 8;  // loads on their way
      const Share mine(s.rows);
      const int count = team.size * s.units / kElements;
      for (int row = mine.row; row < s.rows; row += mine.rows) {
        const Words* const from = outside(step, row, 0);
        Words* const to = reinterpret_cast<Words*>(x(step) + row * s.x_row);
        for (int first = mine.lane; first < count; first += kAtOnce * mine.lanes) {
          auto exists = [&](int i) { return first + i * mine.lanes < count; };
          Words words[kAtOnce];
#pragma unroll
          for (int i = 0; i < kAtOnce; i++) words[i] = exists(i) ? missing<Words>() : Words{};
          team.await(words, from + first, mine.lanes);
#pragma unroll
          for (int i = 0; i < kAtOnce; i++)
            if (exists(i)) to[first + i * mine.lanes] = words[i];
        }
      }
      team.agree();
    }
  }

  // A step of the cell from the pre-activations in `slots`, and its zoneout.
  __device__ void step_cell(int64_t token, float (&slots)[kMostSlots], float& h, float& c) const {
    const int64_t H = p.hidden_size;
    const float h_prev = h, c_prev = c;
    with_cell_type(p.cell, slots, [&](auto cell, auto& own) {
      h = decltype(cell)::template forward<ScalarMath>(own, h, c);
    });
    if (p.zoneout_h > 0) {
      if (!p.layout.has_cell) write<float>(stage.saved_c, token * p.c_stride + me.j, h);
      h = zone_out(zone_rate(stage.masks.zone_h, p.zoneout_h, token * H + me.j), h_prev, h);
    }
    if (p.zoneout_c > 0)
      c = zone_out(zone_rate(stage.masks.zone_c, p.zoneout_c, token * H + me.j), c_prev, c);
  }

  // y of a step, for the next stage too if there is one.
  __device__ void write_y(int64_t t, float h) const {
    auto at = [&](int64_t t) {
      return static_cast<S*>(stage.y) + token_of(p, t, me.b) * stage.y_stride + me.j;
    };
    if (feeds_next()) {
      store_value(at(t), from_compute<S>(h));
      if (t + 1 < me.length) prefetch(at(t + 1));  // chains run forward in time
    } else {
      *at(t) = from_compute<S>(h);
    }
  }

  __device__ void run() const {
    const CellLayout& layout = p.layout;
    const int64_t H = p.hidden_size, at = me.b * H + me.j;
    const float factor = h_factor();
    float bias[kMostSlots] = {};
    float h = 0, c = 0;
    if (me.exists) {
#pragma unroll
      for (int k = 0; k < kMostSlots; k++) {
        if (layout.x_gate[k] >= 0) bias[k] += read<S>(stage.b_ih, gate_row(layout.x_gate[k], me.j));
        if (layout.h_gate[k] >= 0) bias[k] += read<S>(stage.b_hh, gate_row(layout.h_gate[k], me.j));
      }
      h = read<S>(stage.h0, at);
      if (layout.has_cell) c = read<S>(stage.c0, at);
    }
    set_up();
    const Kept<E> kept(shared, s.recurrent);

    float input[kMostSlots] = {};  // of the next step
    if (me.last > 0) read_input(0, input);
    bool anew = begins_anew(time(0));  // the next step
    for (int64_t step = 0; step < me.last; step++) {
      const int64_t t = time(step);
      const bool runs = me.exists && t < me.length, more = step + 1 < me.last;
      if (anew) h = c = 0;
      anew = more && begins_anew(time(step + 1));
      if (step > 0) await(step);
      multiply<E>(shared, s.recurrent, kept, s.x_rows, x(step), s.x_row);
      __syncthreads();
      float slots[kMostSlots];
      if (runs) {
        float sums[kMostSlots];
        totals(sums, shared, s.recurrent, s.x_rows, me.row, offsets_from(layout.first()).at);
#pragma unroll
        for (int k = 0; k < kMostSlots; k++) {
          slots[k] = bias[k];
          if (layout.x_gate[k] >= 0) slots[k] += input[k];
          if (layout.h_gate[k] >= 0) slots[k] += sums[k];
        }
        step_cell(token_of(p, t, me.b), slots, h, c);
      }
      if (team.lost) h = c = not_a_number();
      if (me.in_block) own_h() = E::operand(anew ? 0.f : h * factor);
      __syncthreads();
      if (more) publish(step + 1);
      if (runs) {
        const int64_t token = token_of(p, t, me.b);
        write_y(t, h);
        if (layout.has_cell) write<float>(stage.saved_c, token * p.c_stride + me.j, c);
        if (stage.saved) {
          S* const saved = static_cast<S*>(stage.saved) + token * layout.saved * H + me.j;
#pragma unroll
          for (int k = 0; k < kMostSlots; k++)
            if (k < layout.saved) saved[k * H] = from_compute<S>(slots[k]);
        }
      } else if (me.exists && !p.offsets) {
        write<S>(stage.y, token_of(p, t, me.b) * stage.y_stride + me.j, 0);
      }
      if (more) read_input(step + 1, input);
    }
    if (me.exists) {
      write<S>(stage.hn, at, h);
      if (layout.has_cell) write<S>(stage.cn, at, c);
      if (!p.offsets)  // steps that no row of the team has
        for (int64_t t = me.last; t < p.steps; t++)
          write<S>(stage.y, token_of(p, t, me.b) * stage.y_stride + me.j, 0);
    }
  }
};

template <class E, bool kCluster>
__global__ void __launch_bounds__(kPersistentThreads, 1)
    persistent_forward_kernel(const __grid_constant__ PersistentForward p) {
  if constexpr (kCanRun<E, kCluster>) {
    FUSEDRNN_DYNAMIC_SHARED(char, shared);
    const ForwardBlock<E, kCluster> block(p, shared);
    block.run();
  }
}

}  // namespace fusedrnn
