// What the ops are called with and return, their schemas, and what is registered for each backend.
#pragma once
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "torch/checks.h"

namespace fusedrnn {

struct Inputs {
  Tensor x;  // (T, B, input) with any strides over T and B, or packed (tokens, input); or integers
             // (T, B), (tokens) that mean one-hot vectors
  OptionalTensor hx{}, cx{};
  std::vector<Tensor> weights{};
  OptionalTensor batch_sizes{};  // of packed input
  OptionalTensor lengths{};      // of padded input
  OptionalTensor resets{};       // where a new sequence begins, bool
  RegulariserTensors regularisers{};
};

struct OutputGradients {
  OptionalTensor y, hn, cn, hs, cs;
};

// What forward leaves for backward. hs and cs, the states of all layers and steps, are absent or
// empty unless asked for.
struct SavedForBackward {
  Tensor y, reserve;
  OptionalTensor hs, cs;
};

using States = std::tuple<Tensor, Tensor, OptionalTensor>;  // y, hn, an LSTM's cn
using PlainOutputs = std::tuple<Tensor, Tensor, OptionalTensor, OptionalTensor>;  // and the reserve
using ForwardOutputs =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;  // these, reserve, hs, cs
using BackwardOutputs =
    std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;  // of x, hx, cx, weights

// What forward leaves beside y, hn and an LSTM's cn. Each tensor costs time in Python.
enum class Save {
  kReserve,      // and hs, cs, and another cell's cn, which are empty unless asked for
  kEmpty,        // the same with a reserve of no rows
  kReserveOnly,  // the rest are no tensors
  kNothing,      // all of them are no tensors
};
inline bool fills_reserve(Save save) {
  return save == Save::kReserve || save == Save::kReserveOnly;
}

// What backward computes. needs: whether the gradients of x, hx, cx and each weight are wanted; the
// others come back empty. members: 0 sums weight gradients over all rows; else row b of the batch
// belongs to member b % members, and they have a leading dimension, the sums over each member's
// rows.
struct Wanted {
  std::vector<bool> needs;
  int64_t members;
};

// A direction in which an op is differentiated: the tangents of x, hx, cx and the weights. Zeros
// where there is none; of a weight an empty tensor says so.
struct Tangents {
  OptionalTensor x, hx, cx;
  std::vector<Tensor> weights;
};
using ForwardFunction = ForwardOutputs(const Inputs&, const Config&, Save);
using BackwardFunction = BackwardOutputs(const Inputs&, const Config&, const OutputGradients&,
                                         const SavedForBackward&, const Wanted&);

// The tangents of all that forward puts out.
using ForwardTangentFunction = ForwardOutputs(const Inputs&, const Config&, const Tangents&,
                                              const SavedForBackward&, bool save);
// Of backward, with tangents of its gradients, and of what forward left, after each.
using BackwardTangentFunction = BackwardOutputs(const Inputs&, const Config&,
                                                const OutputGradients&, const OutputGradients&,
                                                const Tangents&, const SavedForBackward&,
                                                const SavedForBackward&, const Wanted&);

ForwardFunction forward_cpu, forward_cuda;
BackwardFunction backward_cpu, backward_cuda;
ForwardTangentFunction forward_tangent_cpu, forward_tangent_cuda;
BackwardTangentFunction backward_tangent_cpu, backward_tangent_cuda;

// The arguments of an op, in the order of its schema.
class Arguments {
 public:
  Arguments(StableIValue* stack, uint64_t count) : next_(stack), end_(stack + count) {}

  template <class T>
  T take() {
    FUSEDRNN_EXPECT(next_ < end_, "fusedrnn: the schema has fewer arguments");
    return torch::stable::detail::to<T>(*next_++);
  }
  template <class T>
  Arguments& operator>>(T& to) {
    to = take<T>();
    return *this;
  }
  void end() const { FUSEDRNN_EXPECT(next_ == end_, "fusedrnn: the schema has more arguments"); }

 private:
  StableIValue* next_;
  StableIValue* const end_;
};

// The arguments that several ops have, and below them what reads them; fusedrnn/calls.py
// documents each.
#define FUSEDRNN_TENSORS "Tensor x, Tensor? hx, Tensor? cx, Tensor[] weights"
#define FUSEDRNN_STACK \
  "str mode, int hidden_size, int proj_size, int num_layers, bool bias, bool bidirectional"
#define FUSEDRNN_CALL                                                              \
  FUSEDRNN_TENSORS                                                                 \
  ", Tensor? batch_sizes, Tensor? lengths, Tensor? mask, Tensor? resets, "         \
  "Tensor? h_mask, Tensor? zone_h, Tensor? zone_c, float dropout, " FUSEDRNN_STACK \
  ", float zoneout_h, float zoneout_c, bool all_states, bool layer_norm"

inline Inputs take_tensors(Arguments& args) {
  Inputs in{args.take<Tensor>()};  // a Tensor without a value costs an allocation
  args >> in.hx >> in.cx >> in.weights;
  return in;
}
inline Config take_stack(Arguments& args) {
  Config c;
  args >> c.mode >> c.hidden_size >> c.proj_size >> c.num_layers >> c.bias >> c.bidirectional;
  return c;
}
inline std::pair<Inputs, Config> take_call(Arguments& args) {
  Inputs in = take_tensors(args);
  RegulariserTensors& r = in.regularisers;
  args >> in.batch_sizes >> in.lengths >> r.mask >> in.resets >> r.h_mask >> r.zone_h >> r.zone_c >>
      r.dropout;
  Config c = take_stack(args);
  args >> r.zoneout_h >> r.zoneout_c >> c.all_states >> c.layer_norm;
  return {std::move(in), std::move(c)};
}

inline constexpr const char* kForwardSchema =
    "forward(" FUSEDRNN_CALL ", bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";
template <ForwardFunction& implementation>
void forward(StableIValue* stack, uint64_t count, uint64_t) {
  Arguments args(stack, count);
  const auto [in, config] = take_call(args);
  const bool save = args.take<bool>();
  args.end();
  torch::stable::detail::box_from_tuple(
      stack, implementation(in, config, save ? Save::kReserve : Save::kEmpty));
}

inline OptionalTensor if_defined(const Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}

inline constexpr const char* kInferSchema =
    "infer(" FUSEDRNN_TENSORS ", " FUSEDRNN_STACK
    ", bool save=False) -> (Tensor, Tensor, Tensor?, Tensor?)";
template <ForwardFunction& implementation>
void infer(StableIValue* stack, uint64_t count, uint64_t) {
  Arguments args(stack, count);
  const Inputs in = take_tensors(args);
  const Config config = take_stack(args);
  const bool save = args.take<bool>();
  args.end();
  const auto [y, hn, cn, reserve, hs, cs] =
      implementation(in, config, save ? Save::kReserveOnly : Save::kNothing);
  torch::stable::detail::box_from_tuple(stack,
                                        PlainOutputs{y, hn, if_defined(cn), if_defined(reserve)});
}

inline constexpr const char* kInferQuantizedSchema =
    "infer_quantized(" FUSEDRNN_TENSORS ", Tensor? batch_sizes, Tensor? lengths, " FUSEDRNN_STACK
    ", int input_size, str stored) -> (Tensor, Tensor, Tensor?)";
template <ForwardFunction& implementation>
void infer_quantized(StableIValue* stack, uint64_t count, uint64_t) {
  Arguments args(stack, count);
  Inputs in = take_tensors(args);
  args >> in.batch_sizes >> in.lengths;
  Config config = take_stack(args);
  args >> config.input_size >> config.stored;
  args.end();
  FUSEDRNN_EXPECT(!config.stored.empty(), "fusedrnn: expected weights in int8 or bfloat16");
  const auto [y, hn, cn, reserve, hs, cs] = implementation(in, config, Save::kNothing);
  torch::stable::detail::box_from_tuple(stack, States{y, hn, if_defined(cn)});
}

#define FUSEDRNN_GRADIENTS(d)                                                   \
  "Tensor? " d "grad_y, Tensor? " d "grad_hn, Tensor? " d "grad_cn, Tensor? " d \
  "grad_hs, Tensor? " d "grad_cs"
#define FUSEDRNN_SAVED(d) "Tensor " d "y, Tensor " d "reserve, Tensor? " d "hs, Tensor? " d "cs"

inline OutputGradients take_gradients(Arguments& args) {
  OutputGradients grad;
  args >> grad.y >> grad.hn >> grad.cn >> grad.hs >> grad.cs;
  return grad;
}
inline SavedForBackward take_saved(Arguments& args) {
  SavedForBackward saved{args.take<Tensor>(), args.take<Tensor>()};
  args >> saved.hs >> saved.cs;
  return saved;
}

inline constexpr const char* kBackwardSchema =
    "backward(" FUSEDRNN_GRADIENTS("") ", " FUSEDRNN_SAVED(
        "") ", bool[] needs, int members, " FUSEDRNN_CALL ") -> (Tensor, Tensor, Tensor, Tensor[])";
template <BackwardFunction& implementation>
void backward(StableIValue* stack, uint64_t count, uint64_t) {
  Arguments args(stack, count);
  const OutputGradients grad = take_gradients(args);
  const SavedForBackward saved = take_saved(args);
  Wanted wanted;
  args >> wanted.needs >> wanted.members;
  const auto [in, config] = take_call(args);
  args.end();
  torch::stable::detail::box_from_tuple(stack, implementation(in, config, grad, saved, wanted));
}

#define FUSEDRNN_TANGENTS "Tensor? dx, Tensor? dhx, Tensor? dcx, Tensor[] dweights"
inline Tangents take_tangents(Arguments& args) {
  Tangents d;
  args >> d.x >> d.hx >> d.cx >> d.weights;
  return d;
}

inline constexpr const char* kForwardTangentSchema =
    "forward_tangent(" FUSEDRNN_TANGENTS
    ", " FUSEDRNN_SAVED("") ", bool save, " FUSEDRNN_CALL
                            ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)";
template <ForwardTangentFunction& implementation>
void forward_tangent(StableIValue* stack, uint64_t count, uint64_t) {
  Arguments args(stack, count);
  const Tangents tangents = take_tangents(args);
  const SavedForBackward saved = take_saved(args);
  const bool save = args.take<bool>();
  const auto [in, config] = take_call(args);
  args.end();
  torch::stable::detail::box_from_tuple(stack, implementation(in, config, tangents, saved, save));
}

inline constexpr const char* kBackwardTangentSchema = "backward_tangent(" FUSEDRNN_GRADIENTS(
    "") ", " FUSEDRNN_GRADIENTS("d") ", " FUSEDRNN_TANGENTS
                                     ", " FUSEDRNN_SAVED("") ", " FUSEDRNN_SAVED(
                                         "d") ", bool[] needs, int members, " FUSEDRNN_CALL
                                              ") -> (Tensor, Tensor, Tensor, Tensor[])";
template <BackwardTangentFunction& implementation>
void backward_tangent(StableIValue* stack, uint64_t count, uint64_t) {
  Arguments args(stack, count);
  const OutputGradients grad = take_gradients(args), dgrad = take_gradients(args);
  const Tangents tangents = take_tangents(args);
  const SavedForBackward saved = take_saved(args), dsaved = take_saved(args);
  Wanted wanted;
  args >> wanted.needs >> wanted.members;
  const auto [in, config] = take_call(args);
  args.end();
  torch::stable::detail::box_from_tuple(
      stack, implementation(in, config, grad, dgrad, tangents, saved, dsaved, wanted));
}

}  // namespace fusedrnn
