// The ops on CPU tensors: checks, buffers and phases; the work is in csrc/cpu.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>

#include "torch/call.h"
#include "torch/cpu_tasks.h"
#include "torch/switches.h"

namespace fusedrnn {
namespace {

// ---- tensors as pointers ----

const void* pointer(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

// A call beside what the kernels read of it.
struct CpuCall : Call {
  std::vector<Weights> pointers;
  std::vector<int64_t> offset, length, order, x_offset, valid_step, valid_row;
  std::vector<int64_t> value, which, begin, token;  // OneHot
  bool padded_rows = false;  // some tokens do not exist: what lies there must be zeroed

  CpuCall(const Inputs& in, const Config& config, Common& a) : Call(in, config) {
    STD_TORCH_CHECK(x.is_cpu(), "fusedrnn: expected CPU tensors");
    a.problem = problem;
    read_sequence(a);
    a.hx = pointer(hx), a.cx = pointer(cx);
    a.mask = static_cast<const uint8_t*>(pointer(mask));
    a.mask_scale = mask_scale;
    a.seq.resets = static_cast<const uint8_t*>(pointer(resets));
    a.h_mask = pointer(h_mask);
    a.zoneout_h = {static_cast<const uint8_t*>(pointer(zone_h)), zoneout_h};
    a.zoneout_c = {static_cast<const uint8_t*>(pointer(zone_c)), zoneout_c};
    pointers.reserve(directions());
    for (int64_t i = 0; i < directions(); i++)
      pointers.push_back(weights_of(i / problem.num_directions, i % problem.num_directions));
    a.weights = pointers.data();
    if (problem.one_hot) sort_tokens(a);
  }

  void read_sequence(Common& a) {
    Sequence& s = a.seq;
    s.steps = steps, s.batch = batch, s.tokens = tokens;
    const int64_t stored = batch ? steps : 0;  // of an empty batch any number, at no cost
    offset.resize(stored), x_offset.resize(stored);
    a.x_row = x.stride(packed() ? 0 : 1);
    if (packed()) {
      int64_t first = 0;
      for (int64_t t = 0; t < steps; t++) {
        offset[t] = first, x_offset[t] = first * a.x_row;
        first += batch_sizes[t];
      }
      length.assign(batch, 0);
      for (int64_t t = steps - 1, b = 0; t >= 0; t--)
        for (; b < batch_sizes[t]; b++) length[b] = t + 1;
    } else {
      for (int64_t t = 0; t < stored; t++) offset[t] = t * batch, x_offset[t] = t * x.stride(0);
      if (lengths) {
        length = int64_values("lengths", *lengths);
        for (int64_t n : length) {
          STD_TORCH_CHECK(n >= 0 && n <= steps, "fusedrnn: expected lengths in [0, ", steps,
                          "], got ", n);
          padded_rows |= n < steps;
        }
      } else {
        length.assign(batch, steps);
      }
    }
    order.resize(batch);
    std::iota(order.begin(), order.end(), 0);
    if (lengths)  // else they fall already
      std::stable_sort(order.begin(), order.end(),
                       [&](int64_t i, int64_t j) { return length[i] > length[j]; });
    s.offset = offset.data(), s.length = length.data(), s.order = order.data();
    a.x = x.const_data_ptr(), a.x_offset = x_offset.data();
  }

  // Integer input: finds the distinct values, and sorts the tokens that exist by theirs.
  void sort_tokens(Common& a) {
    const Sequence& s = a.seq;
    const int64_t* values = static_cast<const int64_t*>(x.const_data_ptr());
    std::vector<int64_t> place(a.problem.input_size + 1);  // first how many tokens have a value
    auto each_token = [&](auto f) {
      for (size_t t = 0; t < offset.size(); t++)
        for (int64_t b = 0; b < s.batch; b++)
          if (int64_t(t) < length[b]) f(s.token(t, b));
    };
    each_token([&](int64_t i) {
      if (values[i] < 0 || values[i] >= a.problem.input_size)
        throw std::out_of_range(  // Python's IndexError, which torch.nn.Embedding raises
            "fusedrnn: index " + std::to_string(values[i]) + " is out of range for input_size " +
            std::to_string(a.problem.input_size));
      place[values[i]]++;
    });
    begin.push_back(0);
    for (int64_t v = 0; v < a.problem.input_size; v++) {
      if (!place[v]) continue;
      begin.push_back(begin.back() + place[v]);
      place[v] = value.size(), value.push_back(v);
    }
    which.resize(s.tokens), token.resize(begin.back());
    std::vector<int64_t> next(begin);
    each_token([&](int64_t i) {
      which[i] = place[values[i]];
      token[next[which[i]]++] = i;
    });
    a.one_hot = {int64_t(value.size()), value.data(), which.data(), begin.data(), token.data()};
  }

  const Kernels& kernels() const { return fusedrnn::kernels(problem, batch, tokens); }
  CpuPlan plan(bool backward) const {
    return plan_cpu(problem, kernels().costs(problem.dtype), backward, batch, tokens,
                    torch::stable::get_num_threads(), all_threads(), !resets);
  }

  // Backward only reads them.
  void set_states(Common& a, const Tensor& hs, const Tensor& cs) const {
    if (!problem.all_states) return;
    a.hs = const_cast<void*>(hs.const_data_ptr());
    if (traits(problem.cell).has_cell) a.cs = const_cast<void*>(cs.const_data_ptr());
  }

  // The list of tokens that exist, which only weight gradients need.
  void list_tokens(Sequence& s) {
    for (size_t t = 0; t < offset.size(); t++)
      for (int64_t b = 0; b < s.batch; b++)
        if (int64_t(t) < length[b]) valid_step.push_back(t), valid_row.push_back(b);
    s.valid = valid_step.size(), s.valid_step = valid_step.data(), s.valid_row = valid_row.data();
  }
};

constexpr int64_t kPackParts = 8;

// Whether a stack's next call goes from the last units to the first, for the one before went the
// other way and left in the second cache what it read last. Only time depends on it.
std::atomic<bool>& next_falls(const void* weights) {
  static std::atomic<bool> falls[64];
  return falls[reinterpret_cast<uintptr_t>(weights) / 64 % 64];
}

void forward_direct(const CpuCall& call, const Forward& a, const Kernels& k, int64_t threads) {
  const Problem& p = a.problem;
  const int64_t B = a.seq.batch, row = p.hidden_size * compute_bytes(p.dtype);
  const int64_t states = call.directions(), longest = B ? call.length[a.seq.order[0]] : 0;
  const RowsScratch scratch = k.direct_scratch(p, B);
  const int64_t of_state = (3 * B * row + 63) / 64 * 64 + scratch.common;
  const ScratchMemory memory(1, states * of_state + threads * scratch.own);
  char* const inputs = memory.of() + states * of_state;
  const bool turns = plan_turns(p, longest, threads);
  bool falling = false;
  if (turns) {
    std::atomic<bool>& falls = next_falls(a.weights->w_hh);
    falling = falls.load(std::memory_order_relaxed);
    falls.store(falling != longest % 2, std::memory_order_relaxed);
  }

  // Of a single step all that W_hh is multiplied with is known at its beginning: these products go
  // before the first layer's step, or right behind it where units fall, where they find more.
  const bool ahead = turns && longest == 1;

  std::vector<DirectStep> all(states);
  auto at_step = [&](DirectStep& s, int64_t step) {
    s.t = s.dir == 0 ? step : longest - 1 - step;
    s.rows = B;
    while (call.length[a.seq.order[s.rows - 1]] <= s.t) s.rows--;
    s.falling = turns && falling != step % 2;
  };
  for (int64_t i = 0; i < states; i++) {
    DirectStep& s = all[i];
    s.layer = i / p.num_directions, s.dir = i % p.num_directions;
    char* const of = memory.of() + i * of_state;
    s.h_prev = of, s.h = of + B * row, s.c = of + 2 * B * row;
    k.direct_begin(a, s);
    if (!ahead || i == 0) continue;
    s.by_h = of + of_state - scratch.common;
    at_step(s, 0);
  }
  for (int64_t i = 0; i < states; i++) {
    DirectStep& s = all[i];
    for (int64_t step = 0; step < longest; step++) {
      at_step(s, step);
      auto share = [&](int64_t part) {
        const int64_t others = ahead && i == 0 ? states - 1 : 0;
        for (int64_t j = others; !falling && j > 0; j--)
          k.direct_recurrent(a, all[j], part, threads);
        k.direct_step(a, s, part, threads, inputs + part * scratch.own);
        for (int64_t j = 1; falling && j <= others; j++)
          k.direct_recurrent(a, all[j], part, threads);
      };
      if (threads == 1)
        share(0);
      else
        torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
          for (int64_t part = begin; part < end; part++) share(part);
        });
      // Rows that rest.
      std::memcpy(static_cast<char*>(s.h) + s.rows * row,
                  static_cast<char*>(s.h_prev) + s.rows * row, (B - s.rows) * row);
      std::swap(s.h, s.h_prev);
    }
    k.direct_end(a, s);
  }
}

}  // namespace

ForwardOutputs forward_cpu(const Inputs& in, const Config& config, Save save) {
  Forward a{};
  CpuCall call(in, config, a);
  const Problem& p = a.problem;
  const Kernels& k = call.kernels();
  const int64_t D = p.num_directions;
  const bool saves = save == Save::kReserve;
  auto [y, hn, cn, reserve, hs, cs] = call.outputs(save);
  if (call.padded_rows) torch::stable::zero_(y), torch::stable::zero_(hs), torch::stable::zero_(cs);
  call.set_states(a, hs, cs);
  a.y = y.mutable_data_ptr(), a.hn = hn.mutable_data_ptr();
  if (traits(p.cell).has_cell) a.cn = cn.mutable_data_ptr();
  if (a.seq.batch == 0) return {y, hn, cn, reserve, hs, cs};

  // A reserve of no bytes (one-layer RNN) still says that outputs need not go elsewhere.
  static char nothing;
  a.reserve = !saves            ? nullptr
              : reserve.numel() ? static_cast<char*>(reserve.mutable_data_ptr())
                                : &nothing;
  std::vector<Tensor> inner;
  for (int64_t i = 0; !saves && !a.hs && i < std::min<int64_t>(2, p.num_layers - 1); i++) {
    inner.push_back(call.empty({a.seq.tokens, call.out_width()}, call.type()));
    a.inner[i] = inner.back().mutable_data_ptr();
  }

  const int64_t direct =
      plan_direct(p, k.costs(p.dtype), a.seq.steps, a.seq.tokens, torch::stable::get_num_threads());
  if (direct && !a.h_mask && !a.seq.resets) {
    forward_direct(call, a, k, direct);
    return {y, hn, cn, reserve, hs, cs};
  }

  std::vector<int64_t> at{0};
  for (int64_t i = 0; i < p.num_layers * D; i++)
    at.push_back(at.back() + k.forward_offsets(a, i / D).total);
  const int64_t size = compute_bytes(p.dtype);
  const ScratchMemory packed(1, at.back() * size);
  char* const to = packed.of();
  a.packed = to, a.unpacked_hh = plan_unpacked(p, k.costs(p.dtype), a.seq.batch, a.seq.steps);
  const CpuPlan plan = call.plan(false);
  RowTasks tasks(plan, a.seq.batch, k.rows_scratch(p, plan.rows_per_task), 1);
  run_phases(plan.threads,
             {{p.num_layers * D * kPackParts, 0,
               [&](int64_t i, char*) {
                 const int64_t which = i / kPackParts;
                 k.pack_forward(a, which, to + at[which] * size, i % kPackParts, kPackParts);
               }},
              tasks.phase(0, [&](const Rows& rows, Member& me) { k.forward(a, rows, me); })});
  return {y, hn, cn, reserve, hs, cs};
}

BackwardOutputs backward_cpu(const Inputs& in, const Config& config, const OutputGradients& given,
                             const Kept& kept, const std::vector<bool>& needs) {
  Backward a{};
  CpuCall call(in, config, a);
  call.list_tokens(a.seq);
  const Problem& p = a.problem;
  const Kernels& k = call.kernels();
  const int64_t D = p.num_directions, tokens = a.seq.tokens, B = a.seq.batch;
  GradientTensors g(call, given, kept, needs);
  if (call.padded_rows) torch::stable::zero_(g.x);
  if (B == 0) return g.in_type(call.type());

  a.y = kept.y.const_data_ptr();
  a.reserve = static_cast<char*>(const_cast<void*>(kept.reserve.const_data_ptr()));  // only read
  call.set_states(a, kept.hs, kept.cs);
  a.grad_hn = pointer(g.hn), a.grad_cn = pointer(g.cn);
  if (g.need_hx) a.dhx = g.hx.mutable_data_ptr();
  if (g.need_cx) a.dcx = g.cx.mutable_data_ptr();
  const Tensor given_out =
      g.y ? *g.y : torch::stable::new_zeros(call.like, {tokens, call.out_width()}, call.compute());

  const int64_t size = compute_bytes(p.dtype), all = D * tokens * size;
  const ScratchMemory dgates(1, all * p.slot_columns());
  const ScratchMemory dproj(1, p.proj_size ? all * p.out_size() : 0);
  const ScratchMemory hidden(1, p.proj_size ? all * p.hidden_size : 0);
  const ScratchMemory dnormed(1, p.layer_norm ? all * p.normed_columns() : 0);
  a.dgates = dgates.of(), a.dnormed = dnormed.of();
  a.dproj = dproj.of(), a.hidden = hidden.of();
  const CpuPlan plan = call.plan(true);
  // Of few tokens as in forward: their weights, which are read and get gradients, are what counts.
  const int64_t few =
      tokens > kFewTokensBack
          ? 0
          : plan_direct(p, k.costs(p.dtype), a.seq.steps, tokens, torch::stable::get_num_threads());
  const int64_t threads = std::max(plan.threads, few);
  // One layer's rows of the gradient of all states.
  auto rows_of = [&](const OptionalTensor& all, int64_t layer, int64_t width) {
    const int64_t bytes = layer * tokens * D * width * size;
    return all ? static_cast<const char*>(all->const_data_ptr()) + bytes : nullptr;
  };

  // Every layer's arguments, the last layer first. What is between two layers lies in two buffers
  // that take turns.
  const int64_t layers = p.num_layers - g.lowest, between = tokens * call.out_width() * size;
  const ScratchMemory gradients(std::clamp<int64_t>(layers - 1, 0, 2), between);
  int64_t longest = 0;
  for (int64_t layer = g.lowest; layer < p.num_layers && !few; layer++)
    longest = std::max(longest, k.backward_offsets(p, layer).total);
  const ScratchMemory packed(1, D * longest * size);
  RowTasks tasks(plan, B, k.rows_scratch(p, plan.rows_per_task), layers);
  std::vector<Backward> of_layer(layers, a);
  std::vector<std::vector<void*>> places(layers);
  std::vector<Phase> phases;
  const void* grad_out = given_out.const_data_ptr();
  for (int64_t i = 0; i < layers; i++) {
    Backward& b = of_layer[i];
    const int64_t layer = b.layer = p.num_layers - 1 - i;
    b.packed = packed.of();
    b.grad_out = grad_out;
    if (g.wants_input(layer)) b.grad_in = layer ? gradients.of(i % 2) : g.x.mutable_data_ptr();
    b.grad_cs = rows_of(g.cs, layer, p.hidden_size);
    const void* const onto = layer && b.grad_in ? rows_of(g.hs, layer - 1, p.out_size()) : nullptr;
    b.onto_grad_in = onto;
    grad_out = b.grad_in;

    const int64_t total = few ? 0 : k.backward_offsets(p, layer).total;
    const int64_t parts = few ? 0 : D * kPackParts;
    phases.push_back({parts + (onto ? 1 : 0), 0, [&, onto, total, parts](int64_t part, char*) {
                        if (part == parts) {
                          std::memcpy(b.grad_in, onto, between);
                          return;
                        }
                        const int64_t dir = part / kPackParts;
                        k.pack_backward(b, b.layer * D + dir, packed.of() + dir * total * size,
                                        part % kPackParts, kPackParts);
                      }});
    phases.push_back(
        tasks.phase(i, [&](const Rows& rows, Member& me) { k.backward(b, rows, me); }));

    const bool gains = p.layer_norm, of_c = gains && traits(p.cell).has_cell;
    bool any = false;
    for (int64_t dir = 0; dir < D; dir++) {  // nine a direction, in the order of Weights
      size_t which = (layer * D + dir) * p.weights_per_direction();
      auto next = [&](bool present) -> void* {
        if (!present) return nullptr;
        void* at = needs[3 + which] ? g.weights[which].mutable_data_ptr() : nullptr;
        which++, any |= at != nullptr;
        return at;
      };
      for (bool present : {true, true, p.bias, p.bias, p.proj_size > 0, gains, gains, of_c, of_c})
        places[i].push_back(next(present));
    }
    b.dweights = places[i].data();
    if (any)
      phases.push_back(
          {k.weight_tasks(p, threads), k.weight_scratch(p, layer, b.seq.tokens),
           [&](int64_t task, char* scratch) { k.weight_grad(b, task, threads, scratch); }});
  }
  run_phases(threads, phases);
  return g.in_type(call.type());
}

}  // namespace fusedrnn
