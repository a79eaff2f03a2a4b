// The ops on CPU tensors: checks, buffers and threads; the work is in csrc/cpu.
#include "torch/cpu.h"

#include <algorithm>
#include <atomic>
#include <numeric>
#include <stdexcept>

#include "cpu/stack.h"
#include "plan/cpu_plan.h"

namespace fusedrnn {
namespace {

// ---- threads ----

// Runs task(i, scratch) for every i below `count`. A thread takes the next task when it is done
// with one, so one that shares its core with another process takes fewer.
template <class Task>
void run_tasks(const Tensor& like, int64_t count, int64_t scratch_bytes, const Task& task) {
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), count);
  if (workers < 1) return;
  scratch_bytes = (scratch_bytes + 4095) / 4096 * 4096;
  const Tensor scratch =
      torch::stable::new_empty(like, {workers * scratch_bytes + 64}, ScalarType::Byte);
  char* base = static_cast<char*>(scratch.mutable_data_ptr());
  base += (64 - reinterpret_cast<uintptr_t>(base) % 64) % 64;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; worker++)
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;)
        task(i, base + worker * scratch_bytes);
  });
}

// ---- tensors as pointers ----

const void* pointer(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }
OptionalTensor contiguous(const OptionalTensor& t) {
  return t ? OptionalTensor(torch::stable::contiguous(*t)) : std::nullopt;
}
OptionalTensor to_type(const OptionalTensor& t, ScalarType type) {
  return t ? OptionalTensor(torch::stable::contiguous(torch::stable::to(*t, type))) : std::nullopt;
}
// In the compute type and back to the tensor's own.
Tensor as(const Tensor& t, ScalarType type) {
  return t.scalar_type() == type ? t : torch::stable::to(t, type);
}

Tensor as_int64(const Tensor& t) {
  return torch::stable::contiguous(
      torch::stable::to(t, ScalarType::Long, std::nullopt,
                        torch::stable::Device(torch::headeronly::DeviceType::CPU)));
}
std::vector<int64_t> int64_values(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 1, "fusedrnn: expected ", name, " of 1 dimension, got ", t.dim());
  STD_TORCH_CHECK(is_integer(t.scalar_type()), "fusedrnn: expected ", name, " of integers");
  const Tensor host = as_int64(t);
  const int64_t* at = static_cast<const int64_t*>(host.const_data_ptr());
  return std::vector<int64_t>(at, at + host.numel());
}

// The tensors of a call, kept alive, beside the pointers to them.
struct Call {
  Tensor x;
  Tensor like;  // what is computed has its dtype
  OptionalTensor hx, cx, mask;
  std::vector<Tensor> weight_tensors;
  std::vector<Weights> weights;
  std::vector<int64_t> offset, length, order, x_offset, valid_step, valid_row;
  std::vector<int64_t> value, which, begin, token;  // OneHot
  bool packed = false;
  bool padded_rows = false;  // some tokens do not exist: what lies there must be zeroed

  Call(const Inputs& in, const Config& config, Common& a) : x(in.x), like(typed(in.x, in.weights)) {
    a.problem = problem_of(config, in.x, in.weights);
    const Problem& p = a.problem;
    STD_TORCH_CHECK(x.is_cpu(), "fusedrnn: expected CPU tensors");
    if (p.one_hot)
      x = as_int64(x);
    else if (x.stride(x.dim() - 1) != 1 && x.size(x.dim() - 1) > 1)
      x = torch::stable::contiguous(x);
    read_sequence(in, a);

    const int64_t directions = p.num_layers * p.num_directions, batch = a.seq.batch;
    hx = contiguous(in.hx), cx = contiguous(in.cx), mask = contiguous(in.mask);
    if (hx) check_like("hx", *hx, like), check_shape("hx", *hx, {directions, batch, p.out_size()});
    if (cx) {
      STD_TORCH_CHECK(traits(p.cell).has_cell, "fusedrnn: only LSTM takes a cell state");
      check_like("cx", *cx, like), check_shape("cx", *cx, {directions, batch, p.hidden_size});
    }
    if (mask) {
      STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Byte && mask->is_cpu(),
                      "fusedrnn: expected the dropout mask as uint8 on the CPU");
      check_shape("the dropout mask", *mask,
                  {p.num_layers - 1, a.seq.tokens, p.num_directions * p.out_size()});
    }
    a.hx = pointer(hx), a.cx = pointer(cx);
    a.mask = static_cast<const uint8_t*>(pointer(mask));
    STD_TORCH_CHECK(in.dropout >= 0 && in.dropout <= 1, "fusedrnn: dropout must lie in [0, 1]");
    a.mask_scale = in.dropout < 1 ? 1 / (1 - in.dropout) : 0;

    for (const Tensor& w : in.weights) weight_tensors.push_back(torch::stable::contiguous(w));
    auto next = weight_tensors.begin();
    for (int64_t i = 0; i < directions; i++) {
      Weights w{};
      w.w_ih = next++->const_data_ptr(), w.w_hh = next++->const_data_ptr();
      if (p.bias) w.b_ih = next++->const_data_ptr(), w.b_hh = next++->const_data_ptr();
      if (p.proj_size) w.w_hr = next++->const_data_ptr();
      weights.push_back(w);
    }
    a.weights = weights.data();
    if (p.one_hot) sort_tokens(a);
  }

  void read_sequence(const Inputs& in, Common& a) {
    Sequence& s = a.seq;
    const bool one_hot = a.problem.one_hot;
    if (in.batch_sizes) {
      STD_TORCH_CHECK(x.dim() == 2 - one_hot, "fusedrnn: packed ",
                      one_hot ? "integer input has 1 dimension" : "input has 2 dimensions",
                      ", got ", x.dim());
      STD_TORCH_CHECK(!in.lengths, "fusedrnn: packed input takes no lengths");
      const std::vector<int64_t> sizes = int64_values("batch_sizes", *in.batch_sizes);
      s.steps = sizes.size(), s.tokens = x.size(0), packed = true;
      STD_TORCH_CHECK(s.steps > 0, "fusedrnn: batch_sizes is empty");
      s.batch = sizes[0];
      int64_t sum = 0;
      for (int64_t t = 0; t < s.steps; t++) {
        STD_TORCH_CHECK(sizes[t] > 0 && (t == 0 || sizes[t] <= sizes[t - 1]),
                        "fusedrnn: batch_sizes must be positive and not rise");
        STD_TORCH_CHECK(sizes[t] <= s.tokens - sum, "fusedrnn: batch_sizes add up to more than ",
                        s.tokens, " tokens");
        offset.push_back(sum);
        sum += sizes[t];
      }
      STD_TORCH_CHECK(sum == s.tokens, "fusedrnn: batch_sizes add up to ", sum, ", not to ",
                      s.tokens, " tokens");
      length.assign(s.batch, 0);
      for (int64_t t = s.steps - 1, b = 0; t >= 0; t--)
        for (; b < sizes[t]; b++) length[b] = t + 1;
      x_offset = offset;
      for (int64_t& o : x_offset) o *= x.stride(0);
      a.x_row = x.stride(0);
    } else {
      STD_TORCH_CHECK(x.dim() == 3 - one_hot, "fusedrnn: expected input of ", 3 - one_hot,
                      " dimensions, got ", x.dim());
      s.steps = x.size(0), s.batch = x.size(1), s.tokens = checked_product(s.steps, s.batch);
      const int64_t steps = s.batch ? s.steps : 0;  // of an empty batch any number, at no cost
      offset.resize(steps), x_offset.resize(steps);
      for (int64_t t = 0; t < steps; t++) offset[t] = t * s.batch, x_offset[t] = t * x.stride(0);
      a.x_row = x.stride(1);
      if (in.lengths) {
        length = int64_values("lengths", *in.lengths);
        STD_TORCH_CHECK(int64_t(length.size()) == s.batch, "fusedrnn: expected ", s.batch,
                        " lengths, got ", length.size());
        for (int64_t n : length) {
          STD_TORCH_CHECK(n >= 0 && n <= s.steps, "fusedrnn: expected lengths in [0, ", s.steps,
                          "], got ", n);
          padded_rows |= n < s.steps;
        }
      } else {
        length.assign(s.batch, s.steps);
      }
    }
    order.resize(s.batch);
    std::iota(order.begin(), order.end(), 0);
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

  // The list of tokens that exist, which only weight gradients need.
  void list_tokens(Sequence& s) {
    for (size_t t = 0; t < offset.size(); t++)
      for (int64_t b = 0; b < s.batch; b++)
        if (int64_t(t) < length[b]) valid_step.push_back(t), valid_row.push_back(b);
    s.valid = valid_step.size(), s.valid_step = valid_step.data(), s.valid_row = valid_row.data();
  }

  std::vector<int64_t> token_sizes(const Sequence& s, int64_t width) const {
    if (packed) return {s.tokens, width};
    return {s.steps, s.batch, width};
  }
};

constexpr int64_t kPackParts = 8;

}  // namespace

ForwardOutputs forward_cpu(const Inputs& in, const Config& config, bool save) {
  Forward a{};
  Call call(in, config, a);
  const Problem& p = a.problem;
  const Kernels& k = kernels();
  const int64_t D = p.num_directions, out = D * p.out_size(), tokens = a.seq.tokens;
  const Reserve layout(p);
  auto empty = [&](const std::vector<int64_t>& sizes, ScalarType type) {
    return torch::stable::new_empty(call.like, sizes, type);
  };
  const ScalarType type = call.like.scalar_type(), compute = compute_type(p.dtype);

  checked_product(tokens, std::max(layout.bytes_per_token(), 8 * out));
  Tensor y = empty(call.token_sizes(a.seq, out), type);
  if (call.padded_rows) torch::stable::zero_(y);
  Tensor hn = empty({p.num_layers * D, a.seq.batch, p.out_size()}, type);
  Tensor cn = traits(p.cell).has_cell ? empty({p.num_layers * D, a.seq.batch, p.hidden_size}, type)
                                      : empty({0}, type);
  Tensor reserve = empty({save ? tokens : 0, layout.bytes_per_token()}, ScalarType::Byte);
  a.y = y.mutable_data_ptr(), a.hn = hn.mutable_data_ptr(), a.cn = cn.mutable_data_ptr();
  if (a.seq.batch == 0) return {y, hn, cn, reserve};

  // A reserve of no bytes (one-layer RNN) still says that outputs need not go elsewhere.
  static char nothing;
  a.reserve = !save             ? nullptr
              : reserve.numel() ? static_cast<char*>(reserve.mutable_data_ptr())
                                : &nothing;
  std::vector<Tensor> inner;
  for (int64_t i = 0; !save && i < std::min<int64_t>(2, p.num_layers - 1); i++) {
    inner.push_back(empty({tokens, out}, type));
    a.inner[i] = inner.back().mutable_data_ptr();
  }

  std::vector<int64_t> at{0};
  for (int64_t i = 0; i < p.num_layers * D; i++)
    at.push_back(at.back() + k.forward_offsets(a, i / D).total);
  const Tensor packed = empty({at.back()}, compute);
  const int64_t size = compute_bytes(p.dtype);
  char* to = static_cast<char*>(packed.mutable_data_ptr());
  a.packed = to;
  run_tasks(call.x, p.num_layers * D * kPackParts, 0, [&](int64_t i, char*) {
    const int64_t which = i / kPackParts;
    k.pack_forward(a, which, to + at[which] * size, i % kPackParts, kPackParts);
  });

  const auto [rows, tasks] = plan_cpu(a.seq.batch, torch::stable::get_num_threads());
  run_tasks(call.x, tasks, k.rows_scratch(p, rows), [&, rows = rows](int64_t i, char* scratch) {
    k.forward(a, i * rows, std::min(a.seq.batch, (i + 1) * rows), scratch);
  });
  return {y, hn, cn, reserve};
}

BackwardOutputs backward_cpu(const Inputs& in, const Config& config, const OptionalTensor& grad_y,
                             const OptionalTensor& grad_hn, const OptionalTensor& grad_cn,
                             const Tensor& y, const Tensor& reserve,
                             const std::vector<bool>& needs) {
  Backward a{};
  Call call(in, config, a);
  call.list_tokens(a.seq);
  const Problem& p = a.problem;
  const Kernels& k = kernels();
  const int64_t D = p.num_directions, out = D * p.out_size(), tokens = a.seq.tokens,
                B = a.seq.batch;
  const int64_t each = p.weights_per_direction(), directions = p.num_layers * D;
  const ScalarType type = call.like.scalar_type(), compute = compute_type(p.dtype);
  const bool has_cell = traits(p.cell).has_cell;
  auto empty = [&](const std::vector<int64_t>& sizes) {
    return torch::stable::new_empty(call.like, sizes, compute);
  };

  STD_TORCH_CHECK(needs.size() == 3 + in.weights.size(), "fusedrnn: expected ",
                  3 + in.weights.size(), " needs, got ", needs.size());
  check_like("the output", y, call.like);
  check_shape("the output", y, call.token_sizes(a.seq, out));
  check_shape("the reserve", reserve, {tokens, Reserve(p).bytes_per_token()});
  STD_TORCH_CHECK(y.is_contiguous() && reserve.is_contiguous() && reserve.is_cpu() &&
                      reserve.scalar_type() == ScalarType::Byte,
                  "fusedrnn: expected output and reserve as forward made them");
  a.y = y.const_data_ptr();
  a.reserve = static_cast<char*>(const_cast<void*>(reserve.const_data_ptr()));  // only read
  auto gradient = [&](const char* name, const OptionalTensor& g,
                      const std::vector<int64_t>& sizes) {
    if (g) check_shape(name, *g, sizes);
    return to_type(g, compute);
  };
  const OptionalTensor dhn =
      gradient("the gradient of h_n", grad_hn, {directions, B, p.out_size()});
  const OptionalTensor dcn = gradient("the gradient of c_n", has_cell ? grad_cn : std::nullopt,
                                      {directions, B, p.hidden_size});
  a.grad_hn = pointer(dhn), a.grad_cn = pointer(dcn);
  const OptionalTensor dy =
      gradient("the gradient of the output", grad_y, call.token_sizes(a.seq, out));
  Tensor grad_out = dy ? *dy : torch::stable::new_zeros(call.like, {tokens, out}, compute);

  STD_TORCH_CHECK(!needs[0] || !p.one_hot, "fusedrnn: integer input has no gradient");
  const bool need_x = needs[0], need_hx = needs[1], need_cx = needs[2] && has_cell;
  Tensor dx = need_x ? empty(call.token_sizes(a.seq, p.input_size)) : empty({0});
  if (need_x && call.padded_rows) torch::stable::zero_(dx);
  Tensor dhx = need_hx ? empty({directions, B, p.out_size()}) : empty({0});
  Tensor dcx = need_cx ? empty({directions, B, p.hidden_size}) : empty({0});
  std::vector<Tensor> dweights;
  for (size_t i = 0; i < in.weights.size(); i++) {
    dweights.push_back(needs[3 + i]
                           ? empty({in.weights[i].sizes().begin(), in.weights[i].sizes().end()})
                           : empty({0}));
    if (B == 0) torch::stable::zero_(dweights.back());
  }
  auto finish = [&]() -> BackwardOutputs {
    for (Tensor& w : dweights) w = as(w, type);
    return {as(dx, type), as(dhx, type), as(dcx, type), dweights};
  };
  if (B == 0) return finish();
  if (need_hx) a.dhx = dhx.mutable_data_ptr();
  if (need_cx) a.dcx = dcx.mutable_data_ptr();

  // The lowest layer that anything asked for depends on; below it nothing is done.
  int64_t lowest = need_x || need_hx || need_cx ? 0 : p.num_layers;
  for (size_t i = 0; i < in.weights.size(); i++)
    if (needs[3 + i]) lowest = std::min<int64_t>(lowest, i / (each * D));

  const Tensor dgates = empty({D, tokens, p.slot_columns()});
  a.dgates = dgates.mutable_data_ptr();
  const Tensor dproj = empty({p.proj_size ? D : 0, tokens, p.out_size()});
  const Tensor hidden = empty({p.proj_size ? D : 0, tokens, p.hidden_size});
  a.dproj = dproj.mutable_data_ptr(), a.hidden = hidden.mutable_data_ptr();
  const int64_t size = compute_bytes(p.dtype), threads = torch::stable::get_num_threads();
  const auto [rows, tasks] = plan_cpu(B, threads);

  for (int64_t layer = p.num_layers - 1; layer >= lowest; layer--) {
    a.layer = layer;
    const int64_t total = k.backward_offsets(p, layer).total;
    const Tensor packed = empty({D * total});
    char* to = static_cast<char*>(packed.mutable_data_ptr());
    a.packed = to;
    run_tasks(call.x, D * kPackParts, 0, [&](int64_t i, char*) {
      const int64_t dir = i / kPackParts;
      k.pack_backward(p, a.weights[layer * D + dir], layer, to + dir * total * size, i % kPackParts,
                      kPackParts);
    });

    a.grad_out = grad_out.const_data_ptr();
    const bool want_input = layer > lowest || (layer == 0 && need_x);
    Tensor grad_in = layer == 0 ? dx : empty({want_input ? tokens : 0, out});
    a.grad_in = want_input ? grad_in.mutable_data_ptr() : nullptr;
    run_tasks(call.x, tasks, k.rows_scratch(p, rows), [&, rows = rows](int64_t i, char* scratch) {
      k.backward(a, i * rows, std::min(B, (i + 1) * rows), scratch);
    });

    std::vector<void*> places;  // five a direction, in the order of Weights
    bool any = false;
    for (int64_t dir = 0; dir < D; dir++) {
      size_t i = (layer * D + dir) * each;
      auto next = [&](bool present) -> void* {
        if (!present) return nullptr;
        void* at = needs[3 + i] ? dweights[i].mutable_data_ptr() : nullptr;
        i++, any |= at != nullptr;
        return at;
      };
      for (bool present : {true, true, p.bias, p.bias, p.proj_size > 0})
        places.push_back(next(present));
    }
    a.dweights = places.data();
    if (any)
      run_tasks(call.x, k.weight_tasks(p, layer, threads), k.weight_scratch(p, layer),
                [&](int64_t i, char* scratch) { k.weight_grad(a, i, threads, scratch); });
    grad_out = grad_in;
  }
  return finish();
}

}  // namespace fusedrnn
