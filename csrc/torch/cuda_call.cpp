#include <algorithm>
#include <array>
#include <iterator>

#include "cuda/device.h"
#include "cuda/elementwise.h"
#include "torch/cuda.h"
#include "torch/host.h"

namespace fusedrnn {
namespace {

using torch::stable::narrow;
using torch::stable::transpose;

// out = a b by ATen, with the result in out's type; one launch for any number of members.
void aten_mm(const Tensor& a, const Tensor& b, const Tensor& out) {
  const char* const op = out.dim() == 3 ? "aten::bmm" : "aten::mm";
  using torch::stable::detail::from;
  // The out variants: autocast leaves them alone.
  if (a.scalar_type() == out.scalar_type()) {
    std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
    FUSEDRNN_EXPECT_TORCH(torch_call_dispatcher(op, "out", stack.data(), TORCH_ABI_VERSION),
                          "run mm");
    torch::stable::detail::to<Tensor>(stack[0]);
  } else {
    std::array<StableIValue, 4> stack{from(a), from(b), from(out.scalar_type()), from(out)};
    FUSEDRNN_EXPECT_TORCH(torch_call_dispatcher(op, "dtype_out", stack.data(), TORCH_ABI_VERSION),
                          "run mm");
    torch::stable::detail::to<Tensor>(stack[0]);
  }
}

char* byte_at(const Tensor& reserve, int64_t offset) {
  if (reserve.numel() == 0) return nullptr;
  return static_cast<char*>(const_cast<void*>(reserve.const_data_ptr())) + offset;
}

// Element i of a tensor of elements of `size` bytes; null where there is no tensor.
const void* element(const OptionalTensor& t, int64_t i, int64_t size) {
  return t ? static_cast<const char*>(t->const_data_ptr()) + i * size : nullptr;
}
const uint8_t* byte(const OptionalTensor& t, int64_t i) {
  return static_cast<const uint8_t*>(element(t, i, 1));
}

}  // namespace

Tensor by_member(const Tensor& rows, int64_t members) {
  if (members == 1) return rows;
  const Tensor grouped =
      torch::stable::reshape(rows, {rows.size(0) / members, members, rows.size(1)});
  return transpose(grouped, 0, 1);
}

CudaCall::CudaCall(const Inputs& in, const Config& config, bool backward, bool tangent)
    : Call(in, config), device_(x), float32_products_(Float32Products::kAten), tokens_{} {
  tokens_.steps = steps, tokens_.batch = batch, tokens_.tokens = tokens;
  bool tf32 = false, products = false;
  if (problem.dtype == DType::kFloat32) {
    const Float32Switches permitted = host().float32_switches();
    tf32 = permits_tf32(permitted.recurrent);
    products = permitted.products;
  }
  const CudaRequest request{steps, batch, backward, tf32, tangent, ensemble};
  plan = permitted_plan(problem, request, device_);
  family = family_of(problem, request, plan);
  if (tf32 != products) {
    DeviceSpec device{};
    check(device_spec(&device), "asking the device");
    float32_products_ = float32_products({tf32, products}, device.capability);
  }

  for (const int64_t rows : batch_sizes)
    FUSEDRNN_EXPECT(rows % ensemble == 0, "fusedrnn: expected weights of an ensemble that divides ",
                    rows, " rows, got ", ensemble);
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
    // Launches that follow each other end with their longest row each. Packed rows are in order.
    if (plan.backend != CudaBackend::kStepwise && plan.launches() > 1) {
      order_ = empty({batch}, ScalarType::Long);
      int64_t* order = static_cast<int64_t*>(order_.mutable_data_ptr());
      check(order_by_length(at, order, batch, ensemble, stream()), "ordering rows");
      tokens_.order = order;
    }
  }
}

void CudaCall::check(int error, const char* what) const {
  check_launch(error, what, plan, family, device_.index());
}

void CudaCall::multiply(const Tensor& a, const Tensor& b, Tensor out) const {
  const bool many = out.dim() == 3;
  const int64_t members = many ? out.size(0) : 1, depth = a.size(a.dim() - 1);
  const bool large = depth > 0 && out.numel() / members >= kLeastSplit / depth;
  if (!large || float32_products_ != Float32Products::kSplit || b.numel() / members > UINT32_MAX)
    return multiply_whole(a, b, out);
  for (int64_t m = 0; m < members; m++) {
    auto own = [&](const Tensor& all) { return many ? torch::stable::select(all, 0, m) : all; };
    multiply_split(own(a), own(b), own(out));
  }
}

// Of a part of the rows of a at a time, or of its columns and the rows of b: what there is more of.
void CudaCall::multiply_split(const Tensor& a, const Tensor& b, const Tensor& out) const {
  // Parts of the depth are added up element by element.
  const bool apart = a.size(0) < a.size(1) && !out.is_contiguous();
  Tensor left = a, right = b;
  Tensor to = apart ? empty({out.size(0), out.size(1)}, out.scalar_type()) : out;
  const int64_t M = a.size(0), K = a.size(1), N = b.size(1), count = std::max(M, K);
  const bool by_rows = M >= K;
  const int64_t most = std::max<int64_t>(1, kSplitAtOnce / (by_rows ? K : std::max(M, N)));
  Tensor right_parts = empty({0}, ScalarType::BFloat16);
  if (by_rows) right_parts = parts_of(b, 0, false);
  for (int64_t at = 0; at < count; at += most) {
    const int64_t n = std::min(most, count - at);
    if (by_rows) {
      aten_mm(parts_of(narrow(left, 0, at, n), 1, true), right_parts, narrow(to, 0, at, n));
      continue;
    }
    const Tensor sum = at ? empty({M, N}, out.scalar_type()) : to;
    aten_mm(parts_of(narrow(left, 1, at, n), 1, true), parts_of(narrow(right, 0, at, n), 0, false),
            sum);
    if (at)
      check(input_gradient({problem.dtype, to.const_data_ptr(), sum.const_data_ptr(), nullptr,
                            nullptr, 1, M * N, to.mutable_data_ptr()},
                           stream()),
            "adding products");
  }
  Tensor result = out;
  if (apart) torch::stable::copy_(result, to);
}

Tensor CudaCall::parts_of(Tensor matrix, int64_t depth, bool left) const {
  if (matrix.stride(0) != 1 && matrix.stride(1) != 1) matrix = torch::stable::contiguous(matrix);
  const bool turned = matrix.stride(1) != 1;  // columns follow each other in memory, not rows
  if (turned) matrix = transpose(matrix, 0, 1), depth = 1 - depth;
  const int64_t rows = matrix.size(0), columns = matrix.size(1);
  Tensor parts = depth == 0 ? empty({3 * rows, columns}, ScalarType::BFloat16)
                            : empty({rows, 3 * columns}, ScalarType::BFloat16);
  check(split_float32(
            {rows, columns, matrix.stride(0), parts.size(1), depth == 0 ? rows * columns : columns,
             left, static_cast<const float*>(matrix.const_data_ptr()), parts.mutable_data_ptr()},
            stream()),
        "splitting a matrix");
  return turned ? transpose(parts, 0, 1) : parts;
}

void CudaCall::multiply_whole(const Tensor& a, const Tensor& b, const Tensor& out) const {
  if (float32_products_ != Float32Products::kFloat64) return aten_mm(a, b, out);
  const Tensor wide = empty({out.sizes().begin(), out.sizes().end()}, ScalarType::Double);
  aten_mm(torch::stable::to(a, ScalarType::Double), torch::stable::to(b, ScalarType::Double), wide);
  Tensor to = out;
  torch::stable::copy_(to, wide);
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
    // A matrix, or one for each member, which begin `next` elements after each other.
    auto matrix = [&](const void* data, int64_t rows, int64_t columns, int64_t row_stride,
                      int64_t column_stride, int64_t next, ScalarType of) {
      std::vector<int64_t> sizes{rows, columns}, strides{row_stride, column_stride};
      if (p.members > 1)
        sizes.insert(sizes.begin(), p.members), strides.insert(strides.begin(), next);
      return torch::stable::from_blob(const_cast<void*>(data), sizes, strides, x.device(), of);
    };
    const int64_t M = p.members, rows = p.rows / M, of_weight = p.depth * p.columns;
    const Tensor a = matrix(p.a, rows, p.depth, M * p.a_stride, 1, p.a_stride, type());
    const Tensor w = p.transposed
                         ? matrix(p.w, p.depth, p.columns, 1, p.depth, of_weight, type())
                         : matrix(p.w, p.depth, p.columns, p.columns, 1, of_weight, type());
    multiply_whole(a, w, matrix(p.out, rows, p.columns, M * p.columns, 1, p.columns, compute()));
  };
}

Tensor CudaCall::weight(int64_t layer, int64_t dir, WeightKind kind) const {
  const Tensor w = weights[problem.weight_index(layer, dir, kind)];
  return stacked(weights) && ensemble == 1 ? torch::stable::select(w, 0, 0) : w;
}

Layer CudaCall::layer_of(int64_t layer, int64_t dir) const {
  const Problem& p = problem;
  Layer a{};
  a.cell = p.cell, a.dtype = p.dtype;
  a.hidden_size = p.hidden_size, a.proj_size = p.proj_size;
  a.layer_norm = p.layer_norm, a.reverse = dir == 1;
  a.tokens = tokens_;
  a.weights = weights_of(layer, dir), a.members = ensemble;
  a.y_stride = out_width();
  a.input_mask = mask_of(layer), a.mask_scale = mask_scale();
  const int64_t H = p.hidden_size, P = p.out_size(), D = p.num_directions, index = layer * D + dir,
                size = fusedrnn::bytes(p.dtype);
  a.h0 = element(hx, index * batch * P, size), a.c0 = element(cx, index * batch * H, size);
  const RegulariserTensors& r = regularisers;
  a.resets = byte(resets, 0);
  a.h_mask = element(r.h_mask, index * batch * P, compute_bytes(p.dtype));
  a.zoneout_h = {byte(r.zone_h, index * tokens * P), r.zoneout_h};
  a.zoneout_c = {byte(r.zone_c, index * tokens * H), r.zoneout_c};
  a.c_stride = p.all_states && traits(p.cell).has_cell ? D * H : H;
  return a;
}

char* CudaCall::cells_in(const Tensor& reserve, const OptionalTensor& cs, int64_t layer,
                         int64_t dir) const {
  const Problem& p = problem;
  if (p.all_states && traits(p.cell).has_cell)
    return byte_at(
        *cs, (layer * tokens * p.num_directions + dir) * p.hidden_size * compute_bytes(p.dtype));
  if (!Reserve::keeps_cells(p) && !Reserve::keeps_candidates(p)) return nullptr;
  return byte_at(reserve, Reserve(p).cell_offset(layer, dir, tokens));
}
char* CudaCall::slots_in(const Tensor& reserve, int64_t layer, int64_t dir) const {
  if (!traits(problem.cell).saved) return nullptr;
  return byte_at(reserve, Reserve(problem).slots_offset(layer, dir, tokens));
}
char* CudaCall::scales_in(const Tensor& reserve, int64_t layer, int64_t dir) const {
  if (!problem.layer_norm) return nullptr;
  return byte_at(reserve, Reserve(problem).scales_offset(layer, dir, tokens));
}
Tensor CudaCall::output_in(const Tensor& reserve, const OptionalTensor& hs, int64_t layer) const {
  const char* const at =
      problem.all_states
          ? byte_at(*hs, layer * tokens * out_width() * fusedrnn::bytes(problem.dtype))
          : byte_at(reserve, Reserve(problem).output_offset(layer, tokens));
  return tensor_at(at, {tokens, out_width()}, type());
}

LayerSaved CudaCall::saved_of(int64_t layer, int64_t dir, const Tensor& output,
                              const Tensor& reserve, const OptionalTensor& cs) const {
  LayerSaved a{};
  static_cast<Layer&>(a) = layer_of(layer, dir);
  a.y = static_cast<const char*>(output.const_data_ptr()) +
        dir * problem.out_size() * fusedrnn::bytes(problem.dtype);
  a.saved = slots_in(reserve, layer, dir), a.saved_c = cells_in(reserve, cs, layer, dir);
  a.scales = scales_in(reserve, layer, dir);
  return a;
}

const uint8_t* CudaCall::mask_of(int64_t layer) const {
  if (layer == 0 || !regularisers.mask) return nullptr;
  return static_cast<const uint8_t*>(regularisers.mask->const_data_ptr()) +
         (layer - 1) * tokens * out_width();
}

Tensor CudaCall::input_of(int64_t layer, const Tensor& from, bool exact) const {
  const int64_t width = problem.layer_input(layer);
  Tensor in = torch::stable::reshape(from, {tokens, width});
  const uint8_t* keep = mask_of(layer);
  if (!keep && !(exact && layer == 0 && lengths)) return in;
  in = torch::stable::contiguous(in);  // rows of x may lie apart
  const Tensor out = empty({tokens, width}, type());
  check(fusedrnn::layer_input({problem.dtype, tokens_, in.const_data_ptr(), keep, mask_scale(),
                               width, out.mutable_data_ptr()},
                              stream()),
        "reading a layer's input");
  return out;
}

Integers CudaCall::integers() const {
  return {problem.dtype, tokens_, static_cast<const int64_t*>(x.const_data_ptr()),
          problem.input_size, ensemble};
}

void CudaCall::multiply_input(const std::optional<Tensor>& input, const Tensor& w_ih,
                              Tensor out) const {
  const Tensor w = torch::stable::transpose(w_ih, -2, -1);
  if (input) return multiply(by_member(*input, ensemble), w, by_member(out, ensemble));
  const Tensor rows = torch::stable::contiguous(w);
  check(
      gather_rows(integers(), rows.const_data_ptr(), out.size(1), out.mutable_data_ptr(), stream()),
      "gathering rows of weights");
}

}  // namespace fusedrnn
