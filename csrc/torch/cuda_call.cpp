#include <array>
#include <iterator>

#include "cuda/elementwise.h"
#include "torch/cuda.h"
#include "torch/switches.h"

namespace fusedrnn {
namespace {

// out = a b by ATen, with the result in out's type.
void aten_mm(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  // The out variants: autocast leaves them alone.
  if (a.scalar_type() == out.scalar_type()) {
    std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
    FUSEDRNN_EXPECT_TORCH(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION),
                          "run mm");
    torch::stable::detail::to<Tensor>(stack[0]);
  } else {
    std::array<StableIValue, 4> stack{from(a), from(b), from(out.scalar_type()), from(out)};
    FUSEDRNN_EXPECT_TORCH(
        torch_call_dispatcher("aten::mm", "dtype_out", stack.data(), TORCH_ABI_VERSION), "run mm");
    torch::stable::detail::to<Tensor>(stack[0]);
  }
}

char* byte_at(const Tensor& reserve, int64_t offset) {
  if (reserve.numel() == 0) return nullptr;
  return static_cast<char*>(const_cast<void*>(reserve.const_data_ptr())) + offset;
}

}  // namespace

CudaCall::CudaCall(const Inputs& in, const Config& config, bool backward)
    : Call(in, config), device_(x), through_float64_(false), tokens_{} {
  // The modules leave these to the plain PyTorch implementation.
  FUSEDRNN_EXPECT(
      !resets && !regularisers.h_mask && !problem.zoneout && !problem.all_states &&
          !problem.layer_norm,
      "fusedrnn: no CUDA kernel has resets, recurrent dropout, zoneout, all states or layer_norm");
  tokens_.steps = steps, tokens_.batch = batch, tokens_.tokens = tokens;
  bool tf32 = false;
  if (problem.dtype == DType::kFloat32) {
    const Float32Switches permitted = float32_switches();
    tf32 = permits_tf32(permitted.recurrent);
    through_float64_ = permitted.products && !tf32;
  }
  plan = permitted_plan(problem, {steps, batch, backward, tf32}, device_);
  family = family_of(problem, backward, plan);

  if (packed()) {
    std::vector<int64_t> first(steps), row_steps(batch);
    for (int64_t t = 0, sum = 0; t < steps; sum += batch_sizes[t++]) first[t] = sum;
    for (int64_t t = steps - 1, b = 0; t >= 0; t--)
      for (; b < batch_sizes[t]; b++) row_steps[b] = t + 1;
    lengths_ = empty({batch}, ScalarType::Long), offsets_ = empty({steps}, ScalarType::Long);
    auto copy = [&](const std::vector<int64_t>& values, Tensor& to) {
      int64_t* at = static_cast<int64_t*>(to.mutable_data_ptr());
      check(copy_to_device(values.data(), at, values.size(), stream()), "copying batch_sizes");
      return at;
    };
    tokens_.lengths = copy(row_steps, lengths_), tokens_.offsets = copy(first, offsets_);
    tokens_.batch_sizes = batch_sizes.data();
  } else if (lengths) {
    const Tensor given = as_int64(*lengths, x.device());
    lengths_ = empty({batch}, ScalarType::Long);
    int64_t* at = static_cast<int64_t*>(lengths_.mutable_data_ptr());
    check(clamp_lengths(static_cast<const int64_t*>(given.const_data_ptr()), at, batch, steps,
                        stream()),
          "copying lengths");
    tokens_.lengths = at;
  }
}

void CudaCall::check(int error, const char* what) const {
  check_launch(error, what, plan, family, device_.index());
}

void CudaCall::multiply(const Tensor& a, const Tensor& b, Tensor out) const {
  if (!through_float64_) return aten_mm(a, b, out);
  const Tensor wide = empty({out.size(0), out.size(1)}, ScalarType::Double);
  aten_mm(torch::stable::to(a, ScalarType::Double), torch::stable::to(b, ScalarType::Double), wide);
  torch::stable::copy_(out, wide);
}

Tensor CudaCall::tensor_at(const void* data, const std::vector<int64_t>& sizes,
                           ScalarType type) const {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= sizes[i]) strides[i] = stride;
  return torch::stable::from_blob(const_cast<void*>(data), sizes, strides, x.device(), type);
}

Multiply CudaCall::multiply() const {
  return [this](const Product& p) {
    auto storage = [&](const void* data, int64_t rows, int64_t columns, int64_t stride) {
      return torch::stable::from_blob(const_cast<void*>(data), {rows, columns}, {stride, 1},
                                      x.device(), type());
    };
    const Tensor a = storage(p.a, p.rows, p.depth, p.a_stride);
    const Tensor w = p.transposed
                         ? torch::stable::from_blob(const_cast<void*>(p.w), {p.depth, p.columns},
                                                    {1, p.depth}, x.device(), type())
                         : storage(p.w, p.depth, p.columns, p.columns);
    multiply(a, w, tensor_at(p.out, {p.rows, p.columns}, compute()));
  };
}

Layer CudaCall::layer_of(int64_t layer, int64_t dir) const {
  const Problem& p = problem;
  Layer a{};
  a.cell = p.cell, a.dtype = p.dtype;
  a.hidden_size = p.hidden_size, a.proj_size = p.proj_size;
  a.reverse = dir == 1;
  a.tokens = tokens_;
  a.weights = weights_of(layer, dir);
  a.y_stride = out_width();
  a.input_mask = mask_of(layer), a.mask_scale = mask_scale();
  const int64_t row = (layer * p.num_directions + dir) * batch * fusedrnn::bytes(p.dtype);
  auto state = [&](const OptionalTensor& all, int64_t width) -> const void* {
    return all ? static_cast<const char*>(all->const_data_ptr()) + row * width : nullptr;
  };
  a.h0 = state(hx, p.out_size()), a.c0 = state(cx, p.hidden_size);
  return a;
}

char* CudaCall::cells_in(const Tensor& reserve, int64_t layer, int64_t dir) const {
  if (!traits(problem.cell).has_cell) return nullptr;
  return byte_at(reserve, Reserve(problem).cell_offset(layer, dir, tokens));
}
char* CudaCall::slots_in(const Tensor& reserve, int64_t layer, int64_t dir) const {
  if (!traits(problem.cell).saved) return nullptr;
  return byte_at(reserve, Reserve(problem).slots_offset(layer, dir, tokens));
}
Tensor CudaCall::output_in(const Tensor& reserve, int64_t layer) const {
  return tensor_at(byte_at(reserve, Reserve(problem).output_offset(layer, tokens)),
                   {tokens, out_width()}, type());
}

const uint8_t* CudaCall::mask_of(int64_t layer) const {
  if (layer == 0 || !regularisers.mask) return nullptr;
  return static_cast<const uint8_t*>(regularisers.mask->const_data_ptr()) +
         (layer - 1) * tokens * out_width();
}

Tensor CudaCall::input_of(int64_t layer, const std::optional<Tensor>& below, bool exact) const {
  const int64_t width = problem.layer_input(layer);
  if (problem.indexed(layer)) {
    const Tensor out = empty({tokens, width}, type());
    check(one_hot_vectors({problem.dtype, tokens_, static_cast<const int64_t*>(x.const_data_ptr()),
                           width, out.mutable_data_ptr()},
                          stream()),
          "reading integers");
    return out;
  }
  const Tensor in = layer ? *below : torch::stable::reshape(x, {tokens, width});
  const uint8_t* keep = mask_of(layer);
  if (!keep && !(exact && layer == 0 && lengths)) return in;
  const Tensor out = empty({tokens, width}, type());
  check(fusedrnn::layer_input({problem.dtype, tokens_, in.const_data_ptr(), keep, mask_scale(),
                               width, out.mutable_data_ptr()},
                              stream()),
        "reading a layer's input");
  return out;
}

}  // namespace fusedrnn
