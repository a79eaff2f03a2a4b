// The ops on CPU tensors: checks, buffers and threads; the work is in csrc/cpu.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>

#include "cpu/stack.h"
#include "cpu/team.h"
#include "plan/cpu_plan.h"
#include "torch/call.h"
#include "torch/switches.h"

namespace fusedrnn {
namespace {

// ---- threads ----

// Memory that the calling thread keeps from call to call, up to a limit: given back, most of it
// would be unmapped, and clearing the pages of the next call takes as long as small products.
class KeptMemory {
 public:
  struct Block {
    char* at;
    int64_t bytes;
  };

  KeptMemory() { free_.reserve(kMostBlocks); }
  ~KeptMemory() {
    for (const Block& block : free_) release(block);
  }
  Block take(int64_t bytes) {
    if (bytes == 0) return {nullptr, 0};
    auto best = free_.end();
    for (auto i = free_.begin(); i != free_.end(); ++i)  // not one that a larger need comes for
      if (i->bytes >= bytes && i->bytes <= 2 * bytes &&
          (best == free_.end() || i->bytes < best->bytes))
        best = i;
    if (best == free_.end()) {
      void* const fresh = ::operator new(bytes, kPage, std::nothrow);
      STD_TORCH_CHECK(fresh, "fusedrnn: cannot allocate ", bytes, " bytes of scratch memory");
      return {static_cast<char*>(fresh), bytes};
    }
    const Block found = *best;
    free_.erase(best), kept_ -= found.bytes;
    return found;
  }
  void give(const Block& block) {
    if (block.bytes == 0) return;
    if (block.bytes > kMostBytes) return release(block);
    while (kept_ + block.bytes > kMostBytes || free_.size() == kMostBlocks) {
      kept_ -= free_.front().bytes;  // not asked for longest
      release(free_.front());
      free_.erase(free_.begin());
    }
    free_.push_back(block), kept_ += block.bytes;
  }
  static constexpr std::align_val_t kPage{4096};

 private:
#ifdef __SANITIZE_ADDRESS__
  static constexpr int64_t kMostBytes = 0;  // what overruns a block is to be seen
#else
  static constexpr int64_t kMostBytes = 32 << 20;
#endif
  static constexpr size_t kMostBlocks = 64;
  static void release(const Block& block) { ::operator delete(block.at, kPage); }

  std::vector<Block> free_;
  int64_t kept_ = 0;
};
thread_local KeptMemory kept_memory;

// `count` parts of `bytes` each, in pages of their own.
class ScratchMemory {
 public:
  ScratchMemory(int64_t count, int64_t bytes)
      : stride_((bytes + 4095) / 4096 * 4096), block_(kept_memory.take(count * stride_)) {
    if (block_.at && poison_scratch()) std::memset(block_.at, 0xFF, count * stride_);
  }
  ~ScratchMemory() { kept_memory.give(block_); }
  ScratchMemory(const ScratchMemory&) = delete;
  char* of(int64_t part = 0) const { return block_.at + part * stride_; }

 private:
  int64_t stride_;
  KeptMemory::Block block_;
};

// Runs task(i, scratch) for every i below `count`. A thread takes the next task when it is done
// with one, so one that shares its core with another process takes fewer.
template <class Task>
void run_tasks(int64_t threads, int64_t count, int64_t scratch_bytes, const Task& task) {
  const int64_t workers = std::min(threads, count);
  if (workers < 1) return;
  const ScratchMemory scratch(workers, scratch_bytes);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; worker++)
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;)
        task(i, scratch.of(worker));
  });
}

// Runs task(rows, member) for all rows of the batch.
template <class Task>
void run_rows(const CpuPlan& plan, int64_t batch, const RowsScratch& bytes, const Task& task) {
  auto rows = [&](int64_t i, char* scratch, int64_t member) {
    const int64_t first = i * plan.rows_per_task;
    return Rows{first, std::min(batch, first + plan.rows_per_task), scratch,
                scratch + bytes.common + member * bytes.own};
  };
  const int64_t M = plan.members, of_task = bytes.common + M * bytes.own;
  if (M == 1) {
    run_tasks(plan.threads, plan.tasks, of_task, [&](int64_t i, char* scratch) {
      Member alone;
      task(rows(i, scratch, 0), alone);
    });
    return;
  }
  std::vector<Team> teams(plan.tasks);
  ScratchMemory scratch(plan.tasks, of_task);
  torch::stable::parallel_for(0, plan.tasks * M, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin / M; i * M < end; i++) {
      const int64_t places = std::min(end, (i + 1) * M) - std::max(begin, i * M);
      Member me;
      if (teams[i].join(places, M, &me)) task(rows(i, scratch.of(i), me.index), me);
    }
  });
}

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

  CpuPlan plan() const {
    return plan_cpu(problem, batch, tokens, torch::stable::get_num_threads(), all_threads(),
                    !resets);
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

void forward_direct(const CpuCall& call, const Forward& a, const Kernels& k, int64_t threads) {
  const Problem& p = a.problem;
  const int64_t B = a.seq.batch, row = p.hidden_size * compute_bytes(p.dtype);
  const int64_t scratch = (k.direct_scratch(p, B) + 63) / 64 * 64;
  const ScratchMemory memory(1, 3 * B * row + threads * scratch + 64);
  char* const states = memory.of();
  char* const inputs = states + (3 * B * row + 63) / 64 * 64;
  const int64_t longest = B ? call.length[a.seq.order[0]] : 0;
  for (int64_t i = 0; i < call.directions(); i++) {
    DirectStep s{};
    s.layer = i / p.num_directions, s.dir = i % p.num_directions;
    s.h_prev = states, s.h = states + B * row, s.c = states + 2 * B * row;
    k.direct_begin(a, s);
    for (int64_t step = 0; step < longest; step++) {
      s.t = s.dir == 0 ? step : longest - 1 - step;
      s.rows = B;
      while (call.length[a.seq.order[s.rows - 1]] <= s.t) s.rows--;
      if (threads == 1)
        k.direct_step(a, s, 0, 1, inputs);
      else
        torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
          for (int64_t part = begin; part < end; part++)
            k.direct_step(a, s, part, threads, inputs + part * scratch);
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
  const Kernels& k = kernels(p.dtype);
  const int64_t D = p.num_directions;
  const bool saves = save == Save::kReserve;
  auto [y, hn, cn, reserve, hs, cs] = call.outputs(save);
  if (call.padded_rows) torch::stable::zero_(y), torch::stable::zero_(hs), torch::stable::zero_(cs);
  call.set_states(a, hs, cs);
  a.y = y.mutable_data_ptr(), a.hn = hn.mutable_data_ptr(), a.cn = cn.mutable_data_ptr();
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

  const int64_t direct = plan_direct(p, a.seq.tokens, torch::stable::get_num_threads());
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
  a.packed = to;
  const CpuPlan plan = call.plan();
  run_tasks(plan.threads, p.num_layers * D * kPackParts, 0, [&](int64_t i, char*) {
    const int64_t which = i / kPackParts;
    k.pack_forward(a, which, to + at[which] * size, i % kPackParts, kPackParts);
  });

  run_rows(plan, a.seq.batch, k.rows_scratch(p, plan.rows_per_task),
           [&](const Rows& rows, Member& me) { k.forward(a, rows, me); });
  return {y, hn, cn, reserve, hs, cs};
}

BackwardOutputs backward_cpu(const Inputs& in, const Config& config, const OutputGradients& given,
                             const Kept& kept, const std::vector<bool>& needs) {
  Backward a{};
  CpuCall call(in, config, a);
  call.list_tokens(a.seq);
  const Problem& p = a.problem;
  const Kernels& k = kernels(p.dtype);
  const int64_t D = p.num_directions, tokens = a.seq.tokens, B = a.seq.batch;
  GradientTensors g(call, given, kept, needs);
  auto empty = [&](const std::vector<int64_t>& sizes) { return call.empty(sizes, call.compute()); };
  if (call.padded_rows) torch::stable::zero_(g.x);
  if (B == 0) return g.in_type(call.type());

  a.y = kept.y.const_data_ptr();
  a.reserve = static_cast<char*>(const_cast<void*>(kept.reserve.const_data_ptr()));  // only read
  call.set_states(a, kept.hs, kept.cs);
  a.grad_hn = pointer(g.hn), a.grad_cn = pointer(g.cn);
  if (g.need_hx) a.dhx = g.hx.mutable_data_ptr();
  if (g.need_cx) a.dcx = g.cx.mutable_data_ptr();
  Tensor grad_out =
      g.y ? *g.y : torch::stable::new_zeros(call.like, {tokens, call.out_width()}, call.compute());

  const int64_t size = compute_bytes(p.dtype), all = D * tokens * size;
  const ScratchMemory dgates(1, all * p.slot_columns());
  const ScratchMemory dproj(1, p.proj_size ? all * p.out_size() : 0);
  const ScratchMemory hidden(1, p.proj_size ? all * p.hidden_size : 0);
  const ScratchMemory dnormed(1, p.layer_norm ? all * p.normed_columns() : 0);
  a.dgates = dgates.of(), a.dnormed = dnormed.of();
  a.dproj = dproj.of(), a.hidden = hidden.of();
  const CpuPlan plan = call.plan();
  const int64_t threads = plan.threads;
  const bool few = plan_direct(p, tokens, threads) > 0;
  // One layer's rows of the gradient of all states.
  auto of_layer = [&](const OptionalTensor& gradients, int64_t layer, int64_t width) {
    const int64_t bytes = layer * tokens * D * width * size;
    return gradients ? static_cast<const char*>(gradients->const_data_ptr()) + bytes : nullptr;
  };

  for (int64_t layer = p.num_layers - 1; layer >= g.lowest; layer--) {
    a.layer = layer;
    const int64_t total = few ? 0 : k.backward_offsets(p, layer).total;
    const ScratchMemory packed(1, D * total * size);
    char* const to = packed.of();
    a.packed = to;
    run_tasks(threads, few ? 0 : D * kPackParts, 0, [&](int64_t i, char*) {
      const int64_t dir = i / kPackParts;
      k.pack_backward(p, a.weights[layer * D + dir], layer, to + dir * total * size, i % kPackParts,
                      kPackParts);
    });

    a.grad_out = grad_out.const_data_ptr();
    const bool want_input = g.wants_input(layer);
    Tensor grad_in = layer == 0 ? g.x : empty({want_input ? tokens : 0, call.out_width()});
    a.grad_in = want_input ? grad_in.mutable_data_ptr() : nullptr;
    a.onto_grad_in = want_input && layer > 0 && g.hs;
    if (a.onto_grad_in)
      std::memcpy(a.grad_in, of_layer(g.hs, layer - 1, p.out_size()),
                  tokens * call.out_width() * size);
    a.grad_cs = of_layer(g.cs, layer, p.hidden_size);
    run_rows(plan, B, k.rows_scratch(p, plan.rows_per_task),
             [&](const Rows& rows, Member& me) { k.backward(a, rows, me); });

    const bool gains = p.layer_norm, of_c = gains && traits(p.cell).has_cell;
    std::vector<void*> places;  // nine a direction, in the order of Weights
    bool any = false;
    for (int64_t dir = 0; dir < D; dir++) {
      size_t i = (layer * D + dir) * p.weights_per_direction();
      auto next = [&](bool present) -> void* {
        if (!present) return nullptr;
        void* at = needs[3 + i] ? g.weights[i].mutable_data_ptr() : nullptr;
        i++, any |= at != nullptr;
        return at;
      };
      for (bool present : {true, true, p.bias, p.bias, p.proj_size > 0, gains, gains, of_c, of_c})
        places.push_back(next(present));
    }
    a.dweights = places.data();
    if (any)
      run_tasks(threads, k.weight_tasks(p, threads), k.weight_scratch(p, layer),
                [&](int64_t i, char* scratch) { k.weight_grad(a, i, threads, scratch); });
    grad_out = grad_in;
  }
  return g.in_type(call.type());
}

}  // namespace fusedrnn
