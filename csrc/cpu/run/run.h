// Runs a planned call: packs its weights, and takes threads through its layers and steps.
#pragma once
#include "cpu/dispatch.h"
#include "cpu/run/sequence.h"
#include "cpu/run/threads.h"

namespace fusedrnn {

struct CpuRun {
  const Kernels& kernels;
  const CpuPlan& plan;
  ThreadPool pool;
};

// The caller sets what the kernels read and write; `packed`, `pass` and `inner` are set here.
void run_forward(const CpuRun&, Forward&);
// The same of a plan that reads all weights unpacked, with `inner` set.
void run_unpacked(const CpuRun&, const Forward&);

// Back-propagation through all layers.
struct BackwardStack : Common {
  const void* y;
  // Compute type. Null: zeros; of those that are written: not wanted.
  const void *grad_y, *grad_hn, *grad_cn, *grad_hs, *grad_cs;
  void *dx, *dhx, *dcx;
  const MemberTokens* members;      // [member_count]
  int64_t member_count;             // at least 1
  const WeightGradients* dweights;  // [member_count * layers * directions]
  bool rounds_weights;              // they are of the storage type
  int64_t lowest;                   // layers below are left alone

  bool wants_input(int64_t layer) const { return layer > lowest || (layer == 0 && dx); }
  // The gradients of a layer's outputs and cell states as states of all layers; null where none.
  const void* grad_outputs(int64_t layer) const {
    return layer_of(grad_hs, layer, problem.out_size());
  }
  const void* grad_cells(int64_t layer) const {
    return layer_of(grad_cs, layer, problem.hidden_size);
  }

 private:
  const void* layer_of(const void* all, int64_t layer, int64_t width) const {
    const int64_t columns = seq.tokens * problem.num_directions * compute_bytes(problem.dtype);
    return all ? static_cast<const char*>(all) + layer * columns * width : nullptr;
  }
};
void run_backward(const CpuRun&, const BackwardStack&);

// The derivatives of both in one direction, as ForwardTangent and BackwardTangent say.
void run_forward_tangent(const CpuRun&, ForwardTangent&);
struct BackwardTangentStack {
  BackwardStack primal, tangent;  // primal: writes nothing
};
void run_backward_tangent(const CpuRun&, const BackwardTangentStack&);

}  // namespace fusedrnn
