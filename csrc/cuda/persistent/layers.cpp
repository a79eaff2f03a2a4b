#include "cuda/persistent/layers.h"

#include "cuda/device.h"
#include "cuda/persistent/persistent.h"

namespace fusedrnn {
namespace {

constexpr int64_t aligned(int64_t bytes) { return (bytes + 255) / 256 * 256; }

// All that follows from the plan and from what the layers share.
template <class P>
P problem_of(const CudaPlan& plan, const Layer& layer, size_t stages) {
  P p{};
  p.cell = layer.cell, p.dtype = layer.dtype, p.engine = plan.engine;
  p.cluster = plan.backend == CudaBackend::kCluster;
  p.chained = plan.layers > 1;
  p.stages = int(stages);
  p.batch = layer.tokens.batch, p.hidden_size = layer.hidden_size, p.steps = layer.tokens.steps;
  p.members = layer.members;
  p.lengths = layer.tokens.lengths, p.offsets = layer.tokens.offsets;
  p.order = layer.tokens.order;
  p.mask_scale = float(layer.mask_scale);
  p.resets = layer.resets;
  p.zoneout_h = float(layer.zoneout_h.rate), p.zoneout_c = float(layer.zoneout_c.rate);
  p.c_stride = layer.c_stride;
  p.shape = plan.shape;
  p.slices = plan.at_once;
  p.tell_host = lost_block_word();
  p.launch_code = launch_code(exchange_of(plan), p.chained);
  return p;
}

// Flags, then what the kernel works with, then what else a call needs.
template <class P>
int64_t launch_bytes(const P& p) {
  return aligned(p.flag_count() * int64_t(sizeof(int))) + aligned(p.workspace_bytes());
}

// `kept`: whether the workspace has places that stay kMissing until a value comes.
template <class P, class F>
int for_each_part(P& p, int all_slices, bool kept, void* workspace, void* stream, F enqueue) {
  const int64_t flags = p.flag_count() * int64_t(sizeof(int));
  const int64_t missing = kept ? launch_bytes(p) : flags;
  p.flags = static_cast<int*>(workspace);
  p.workspace = static_cast<char*>(workspace) + aligned(flags);
  const int at_once = p.slices;
  int error = 0;
  for (int first = 0; error == 0 && first < all_slices; first += at_once) {
    p.first_slice = first, p.slices = at_once < all_slices - first ? at_once : all_slices - first;
    error = fill_missing(workspace, missing, stream);
    if (error == 0) error = enqueue(p, stream);
  }
  return error;
}

// dL/dx of every layer but the lowest.
int64_t gradient_bytes(const Layer& layer) {
  return aligned(layer.tokens.tokens * layer.hidden_size * int64_t(sizeof(float)));
}
bool chained(const CudaPlan& plan) { return plan.layers > 1; }

StageMasks masks_of(const Layer& layer) {
  return {layer.h_mask, layer.zoneout_h.mask, layer.zoneout_c.mask};
}

}  // namespace

int64_t persistent_workspace(const CudaPlan& plan, const std::vector<LayerForward>& layers) {
  return launch_bytes(problem_of<PersistentForward>(plan, layers[0], layers.size()));
}
int64_t persistent_workspace(const CudaPlan& plan, const std::vector<LayerBackward>& layers) {
  const int64_t gradients = chained(plan) ? int64_t(layers.size()) - 1 : 0;
  return launch_bytes(problem_of<PersistentBackward>(plan, layers[0], layers.size())) +
         gradients * gradient_bytes(layers[0]);
}

int persistent_forward(const CudaPlan& plan, const std::vector<LayerForward>& layers,
                       void* workspace, void* stream) {
  auto p = problem_of<PersistentForward>(plan, layers[0], layers.size());
  for (size_t i = 0; i < layers.size(); i++) {
    const LayerForward& a = layers[i];
    ForwardStage& s = p.stage[i];
    s.w_hh = a.weights.w_hh, s.b_ih = a.weights.b_ih, s.b_hh = a.weights.b_hh;
    s.gates_x = a.gates_x;
    if (chained(plan) && i > 0) s.w_ih = a.weights.w_ih, s.mask = a.input_mask;
    s.h0 = a.h0, s.c0 = a.c0, s.hn = a.hn, s.cn = a.cn;
    s.y = a.y, s.y_stride = a.y_stride, s.saved = a.saved, s.saved_c = a.saved_c;
    s.masks = masks_of(a);
    s.reverse = a.reverse;
  }
  for (size_t i = 0; chained(plan) && i + 1 < layers.size(); i++) {
    const int64_t elements = layers[i].tokens.tokens * layers[i].y_stride;
    if (const int error = fill_missing(layers[i].y, elements * bytes(layers[i].dtype), stream))
      return error;
  }
  return for_each_part(p, plan.slices, true, workspace, stream,
                       [](const auto& part, void* on) { return persistent_forward(part, on); });
}

int persistent_backward(const CudaPlan& plan, const std::vector<LayerBackward>& layers,
                        void* workspace, void* stream) {
  const size_t count = layers.size();
  auto p = problem_of<PersistentBackward>(plan, layers[0], count);
  char* gradients = static_cast<char*>(workspace) + launch_bytes(p);
  for (size_t i = 0; i < count; i++) {
    // The highest layer comes first.
    const size_t which = chained(plan) ? count - 1 - i : i;
    const LayerBackward& a = layers[which];
    BackwardStage& s = p.stage[i];
    s.w_hh = a.weights.w_hh, s.saved = a.saved, s.saved_c = a.saved_c, s.y = a.y;
    s.h0 = a.h0, s.c0 = a.c0, s.masks = masks_of(a);
    s.dy = a.dy, s.dy_stride = a.dy_stride, s.dcs = a.dcs;
    if (chained(plan) && i > 0)
      s.above = p.stage[i - 1].dx, s.above_mask = layers[which + 1].input_mask;
    if (chained(plan) && i + 1 < count)
      s.w_ih = a.weights.w_ih, s.dx = gradients + int64_t(i) * gradient_bytes(a);
    s.dgates = a.dgates, s.dhn = a.dhn, s.dcn = a.dcn, s.dh0 = a.dh0, s.dc0 = a.dc0;
    s.y_stride = a.y_stride, s.reverse = a.reverse;
  }
  if (chained(plan) && count > 1) {
    const int64_t all = int64_t(count - 1) * gradient_bytes(layers[0]);
    if (const int error = fill_missing(gradients, all, stream)) return error;
  }
  return for_each_part(p, plan.slices, false, workspace, stream,
                       [](const auto& part, void* on) { return persistent_backward(part, on); });
}

}  // namespace fusedrnn
