#include <cmath>

#include "cuda/dispatch.h"
#include "cuda/elementwise.h"
#include "cuda/primitives.h"
#include "cuda/row_sums.h"
#include "cuda/tokens.h"

namespace fusedrnn {
namespace {

constexpr int kThreads = 128;
constexpr int64_t kMostBlocks = 1 << 16;

// A grid whose threads share `count` elements, `rows` times over.
Grid grid_for(int64_t count, int64_t rows = 1) {
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  return {dim3(unsigned(blocks < kMostBlocks ? blocks : kMostBlocks),
               unsigned(rows < 65535 ? rows : 65535)),
          dim3(kThreads)};
}
__device__ inline int64_t first_index() { return int64_t(blockIdx.x) * kThreads + threadIdx.x; }
__device__ inline int64_t index_stride() { return int64_t(gridDim.x) * kThreads; }

// The step is at all, and within row b's length.
__device__ inline bool runs_at(const Tokens& p, int64_t b, int64_t step) {
  return step >= 0 && step < length_of(p, b);
}

template <class From, class To>
__global__ void convert_kernel(const From* from, const Compute<To>* mask, To* to, int64_t count) {
  for (int64_t i = first_index(); i < count; i += index_stride()) {
    Compute<To> value = from ? to_compute(from[i]) : Compute<To>(0);
    if (mask) value *= mask[i];
    to[i] = from_compute<To>(value);
  }
}

struct HostValues {
  static constexpr int kMost = 496;  // parameters take up to 4 KiB
  int64_t* to;
  int64_t count, value[kMost];
};
__global__ void store_kernel(const __grid_constant__ HostValues p) {
  for (int64_t i = first_index(); i < p.count; i += index_stride()) p.to[i] = p.value[i];
}

__global__ void clamp_kernel(const int64_t* given, int64_t* lengths, int64_t batch, int64_t steps) {
  for (int64_t b = first_index(); b < batch; b += index_stride()) {
    const int64_t n = given[b];
    lengths[b] = n < 0 ? 0 : n < steps ? n : steps;
  }
}

// Every row counts those that come before it: some microseconds for a batch of thousands.
__global__ void order_kernel(const int64_t* lengths, int64_t* order, int64_t batch,
                             int64_t members) {
  for (int64_t b = first_index(); b < batch; b += index_stride()) {
    const int64_t mine = lengths[b], member = b % members;
    int64_t place = 0;
    for (int64_t other = member; other < batch; other += members)
      place += lengths[other] > mine || (lengths[other] == mine && other < b);
    order[place * members + member] = b;
  }
}

template <class S>
__global__ void layer_input_kernel(const __grid_constant__ LayerInput p) {
  using C = Compute<S>;
  const Tokens& t = p.tokens;
  for (int64_t i = first_index(); i < t.tokens * p.width; i += index_stride()) {
    const int64_t token = i / p.width;
    C value = 0;
    // Packed tokens all exist.
    if (t.offsets || runs_at(t, token % t.batch, token / t.batch)) {
      value = to_compute(static_cast<const S*>(p.in)[i]);
      if (p.mask) value *= C(p.mask[i]) * C(p.scale);
    }
    static_cast<S*>(p.out)[i] = from_compute<S>(value);
  }
}

// Of a token's value among the rows of all members' weights; -1: no value.
__device__ inline int64_t row_of(const Integers& p, int64_t token) {
  const int64_t value = p.values[token];
  if (value < 0 || value >= p.width) return -1;
  return p.members > 1 ? token % p.members * p.width + value : value;
}
__global__ void rows_of_members_kernel(const __grid_constant__ Integers p, int64_t* out) {
  for (int64_t i = first_index(); i < p.tokens.tokens; i += index_stride()) out[i] = row_of(p, i);
}

template <class S>
__global__ void gather_kernel(const __grid_constant__ Integers p, const S* w, int64_t columns,
                              Compute<S>* out) {
  using C = Compute<S>;
  const Tokens& t = p.tokens;
  for (int64_t i = first_index(); i < t.tokens * columns; i += index_stride()) {
    const int64_t token = i / columns;
    C value = 0;
    // Packed tokens all exist.
    if (t.offsets || runs_at(t, token % t.batch, token / t.batch)) {
      const int64_t row = row_of(p, token);
      value = row < 0 ? C(NAN) : to_compute(w[row * columns + i % columns]);
    }
    out[i] = value;
  }
}

template <class S>
__global__ void times_saved_kernel(const __grid_constant__ SavedProduct p) {
  using C = Compute<S>;
  const Tokens& t = p.tokens;
  for (int64_t i = first_index(); i < t.tokens * p.width; i += index_stride()) {
    const int64_t token = i / p.width, j = i % p.width;
    C value = 0;
    auto product = [&](const void* d, const void* saved) {
      return static_cast<const C*>(d)[token * p.d_stride + j] *
             to_compute(static_cast<const S*>(saved)[token * p.saved_stride + j]);
    };
    if (t.offsets || runs_at(t, token % t.batch, token / t.batch)) {
      value = product(p.d, p.saved);
      if (p.other_d) value += product(p.other_d, p.other_saved);
    }
    static_cast<C*>(p.out)[i] = value;
  }
}

template <class C>
__global__ void input_gradient_kernel(const __grid_constant__ InputGradient p) {
  for (int64_t i = first_index(); i < p.count; i += index_stride()) {
    C value = static_cast<const C*>(p.a)[i];
    if (p.b) value += static_cast<const C*>(p.b)[i];
    if (p.mask) value *= C(p.mask[i]) * C(p.scale);
    if (p.c) value += static_cast<const C*>(p.c)[i];
    static_cast<C*>(p.out)[i] = value;
  }
}

__global__ void split_kernel(const __grid_constant__ SplitFloat32 p) {
  const uint32_t columns = uint32_t(p.columns);
  for (int64_t i = first_index(); i < p.rows * p.columns; i += index_stride()) {
    const uint32_t row = uint32_t(i) / columns, column = uint32_t(i) % columns;
    const float x = p.in[row * p.stride + column];
    const BFloat16 high = from_compute<BFloat16>(x), zero = from_compute<BFloat16>(0.f);
    const float rest = x - to_compute(high);
    const bool finite = rest - rest == 0;
    const BFloat16 low = finite ? from_compute<BFloat16>(rest) : zero, again = finite ? high : zero;
    BFloat16* const to = static_cast<BFloat16*>(p.parts) + row * p.parts_stride + column;
    to[0] = high;
    to[p.next_part] = p.left ? again : low;
    to[2 * p.next_part] = p.left ? low : again;
  }
}

struct PreviousStates {
  Layer layer;
  const void* y;
  void* out;
  int64_t stride;
};
template <class S>
__global__ void previous_kernel(const __grid_constant__ PreviousStates p) {
  const Layer& layer = p.layer;
  const Tokens& tokens = layer.tokens;
  const int64_t width = layer.out_size(), steps = tokens.steps, batch = tokens.batch;
  auto first = [&](int64_t t) {
    return !tokens.offsets ? t * batch : t < steps ? tokens.offsets[t] : tokens.tokens;
  };
  for (int64_t t = blockIdx.y; t < steps; t += gridDim.y) {
    const int64_t from = first(t), rows = first(t + 1) - from;
    const int64_t before = layer.reverse ? t + 1 : t - 1;
    const int64_t before_from = before >= 0 && before < steps ? first(before) : 0;
    for (int64_t i = first_index(); i < rows * width; i += index_stride()) {
      const int64_t b = i / width, j = i % width;
      S value = from_compute<S>(0);
      if (runs_at(tokens, b, t) &&
          !begins_anew(tokens, layer.resets, layer.reverse, t, b, length_of(tokens, b))) {
        if (runs_at(tokens, b, before)) {
          value = static_cast<const S*>(p.y)[(before_from + b) * layer.y_stride + j];
        } else if (layer.h0) {
          value = static_cast<const S*>(layer.h0)[i];
        }
        if (layer.h_mask)
          value =
              from_compute<S>(to_compute(value) * static_cast<const Compute<S>*>(layer.h_mask)[i]);
      }
      static_cast<S*>(p.out)[(from + b) * p.stride + j] = value;
    }
  }
}

}  // namespace

const char* error_text(int error) { return error_name(error); }

int to_compute_type(DType dtype, const void* from, void* to, int64_t count, void* stream) {
  if (count == 0) return 0;
  return with_dtype(dtype, [&](auto s) {
    using S = decltype(s);
    return launch(convert_kernel<S, Compute<S>>, grid_for(count), stream,
                  static_cast<const S*>(from), nullptr, static_cast<Compute<S>*>(to), count);
  });
}
int to_storage_type(DType dtype, const void* from, void* to, int64_t count, void* stream) {
  return to_storage_type(dtype, from, nullptr, to, count, stream);
}
int to_storage_type(DType dtype, const void* from, const void* mask, void* to, int64_t count,
                    void* stream) {
  if (count == 0) return 0;
  return with_dtype(dtype, [&](auto s) {
    using S = decltype(s);
    using C = Compute<S>;
    return launch(convert_kernel<C, S>, grid_for(count), stream, static_cast<const C*>(from),
                  static_cast<const C*>(mask), static_cast<S*>(to), count);
  });
}

int copy_to_device(const int64_t* host, int64_t* device, int64_t count, void* stream) {
  int error = 0;
  for (int64_t at = 0; at < count && error == 0; at += HostValues::kMost) {
    HostValues p{device + at, count - at < HostValues::kMost ? count - at : HostValues::kMost, {}};
    for (int64_t i = 0; i < p.count; i++) p.value[i] = host[at + i];
    error = launch(store_kernel, grid_for(p.count), stream, p);
  }
  return error;
}

int clamp_lengths(const int64_t* given, int64_t* lengths, int64_t batch, int64_t steps,
                  void* stream) {
  if (batch == 0) return 0;
  return launch(clamp_kernel, grid_for(batch), stream, given, lengths, batch, steps);
}

int order_by_length(const int64_t* lengths, int64_t* order, int64_t batch, int64_t members,
                    void* stream) {
  if (batch == 0) return 0;
  return launch(order_kernel, grid_for(batch), stream, lengths, order, batch, members);
}

int layer_input(const LayerInput& p, void* stream) {
  const int64_t count = p.tokens.tokens * p.width;
  if (count == 0) return 0;
  return with_dtype(p.dtype, [&](auto s) {
    return launch(layer_input_kernel<decltype(s)>, grid_for(count), stream, p);
  });
}

int gather_rows(const Integers& p, const void* w, int64_t columns, void* out, void* stream) {
  const int64_t count = p.tokens.tokens * columns;
  if (count == 0) return 0;
  return with_dtype(p.dtype, [&](auto s) {
    using S = decltype(s);
    return launch(gather_kernel<S>, grid_for(count), stream, p, static_cast<const S*>(w), columns,
                  static_cast<Compute<S>*>(out));
  });
}

int rows_of_members(const Integers& p, int64_t* out, void* stream) {
  if (p.tokens.tokens == 0) return 0;
  return launch(rows_of_members_kernel, grid_for(p.tokens.tokens), stream, p, out);
}

int64_t sum_rows_workspace(const RowSums& p) {
  if (p.tokens == 0) return 0;
  const row_sums::Division d = row_sums::divide(p.tokens, p.width);
  return d.chunks * p.columns * compute_bytes(p.dtype) +
         (2 * p.tokens + (d.runs << d.bits)) * int64_t(sizeof(uint32_t));
}
int sum_rows(const RowSums& p, void* stream) {
  if (p.width == 0 || p.columns == 0) return 0;
  int error = to_compute_type(p.dtype, nullptr, p.out, p.width * p.columns, stream);
  if (error || p.tokens == 0) return error;
  if (p.tokens > UINT32_MAX) return kInvalidValue;
  const row_sums::Division d = row_sums::divide(p.tokens, p.width);
  char* const partial = static_cast<char*>(p.workspace);
  uint32_t* const order =
      reinterpret_cast<uint32_t*>(partial + d.chunks * p.columns * compute_bytes(p.dtype));
  uint32_t* orders[] = {order, order + p.tokens};
  const uint32_t* sorted = nullptr;
  error = row_sums::sort_tokens(p, d, orders, order + 2 * p.tokens, &sorted, stream);
  if (error) return error;
  const int64_t blocks = row_sums::divide_up(p.columns, row_sums::kColumns);
  const Grid grid{dim3(unsigned(blocks), unsigned(d.chunks)), dim3(row_sums::kColumns)};
  return with_dtype(p.dtype, [&](auto s) {
    using S = decltype(s);
    using C = Compute<S>;
    const row_sums::Chunks<C> chunks{p, d.chunk, sorted, reinterpret_cast<C*>(partial)};
    const int failed = launch(row_sums::add_chunks_kernel<S>, grid, stream, chunks);
    return failed ? failed : launch(row_sums::add_partial_sums_kernel<C>, grid, stream, chunks);
  });
}

int split_float32(const SplitFloat32& p, void* stream) {
  const int64_t count = p.rows * p.columns;
  if (count == 0) return 0;
  if (count > UINT32_MAX) return kInvalidValue;
  return launch(split_kernel, grid_for(count), stream, p);
}

int times_saved(const SavedProduct& p, void* stream) {
  const int64_t count = p.tokens.tokens * p.width;
  if (count == 0) return 0;
  return with_dtype(p.dtype, [&](auto s) {
    return launch(times_saved_kernel<decltype(s)>, grid_for(count), stream, p);
  });
}

int input_gradient(const InputGradient& p, void* stream) {
  if (p.count == 0) return 0;
  return p.dtype == DType::kFloat64
             ? launch(input_gradient_kernel<double>, grid_for(p.count), stream, p)
             : launch(input_gradient_kernel<float>, grid_for(p.count), stream, p);
}

int previous_states(const Layer& layer, const void* y, void* out, int64_t stride, void* stream) {
  if (layer.tokens.tokens == 0) return 0;
  const PreviousStates p{layer, y, out, stride};
  return with_dtype(layer.dtype, [&](auto s) {
    return launch(previous_kernel<decltype(s)>,
                  grid_for(layer.tokens.batch * layer.out_size(), layer.tokens.steps), stream, p);
  });
}

}  // namespace fusedrnn
