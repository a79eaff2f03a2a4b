#include <algorithm>
#include <cstring>

#include "cpu/run/run.h"
#include "cpu/run/tasks.h"

namespace fusedrnn {
namespace {

// All layers, the last one first, as phases: its weights are packed, its rows go back through time,
// then come the gradients of its weights.
class BackwardLayers {
 public:
  BackwardLayers(const CpuRun& run, const BackwardStack& a)
      : run_(run),
        a_(a),
        size_(compute_bytes(a.problem.dtype)),
        columns_(a.seq.tokens * a.problem.num_directions * size_),
        layers_(a.problem.num_layers - a.lowest),
        packed_bytes_(most_packed() * size_),
        dgates_(1, columns_ * a.problem.slot_columns()),
        dproj_(1, a.problem.proj_size ? columns_ * a.problem.out_size() : 0),
        hidden_(1, a.problem.proj_size ? columns_ * a.problem.hidden_size : 0),
        dnormed_(1, a.problem.layer_norm ? columns_ * a.problem.normed_columns() : 0),
        zeros_(1, a.grad_y ? 0 : columns_ * a.problem.out_size()),
        between_(std::clamp<int64_t>(layers_ - 1, 0, 2), columns_ * a.problem.out_size()),
        packed_(1, a.problem.num_directions * packed_bytes_),
        tasks_(run.plan, a.seq.batch,
               run.kernels.rows_scratch(a.problem, run.plan.pass, run.plan.rows_per_task), layers_),
        arguments_(layers_) {
    if (!a.grad_y) std::memset(zeros_.data(), 0, columns_ * a.problem.out_size());
  }

  void run() {
    std::vector<Phase> phases;
    const void* grad_out = a_.grad_y ? a_.grad_y : zeros_.data();
    for (int64_t i = 0; i < layers_; i++) {
      set_arguments(i, grad_out);
      grad_out = arguments_[i].grad_in;
      phases.push_back(prepare(i));
      phases.push_back(tasks_.phase(i, [this, i](const Rows& rows, Member& me) {
        run_.kernels.backward(arguments_[i], rows, me);
      }));
      if (wants_weights(i)) phases.push_back(weight_gradients(i));
    }
    run_phases(run_.pool, run_.plan.threads, phases);
  }

 private:
  // Elements of a direction's packed weights, of the layer that has most.
  int64_t most_packed() const {
    int64_t most = 0;
    for (int64_t layer = a_.lowest; layer < a_.problem.num_layers && !run_.plan.unpacked; layer++)
      most = std::max(most, run_.kernels.backward_offsets(a_.problem, layer).total);
    return most;
  }

  // One layer's rows of the gradients of all states; null stays null.
  const char* rows_of_layer(const void* all, int64_t layer, int64_t width) const {
    return all ? static_cast<const char*>(all) + layer * columns_ * width : nullptr;
  }

  // The gradient of the states of the layer below, to which this layer's is added.
  const char* grad_below(int64_t i) const {
    const Backward& b = arguments_[i];
    if (b.layer == 0 || !b.grad_in) return nullptr;
    return rows_of_layer(a_.grad_hs, b.layer - 1, a_.problem.out_size());
  }

  void set_arguments(int64_t i, const void* grad_out) {
    Backward& b = arguments_[i] = {};
    static_cast<Common&>(b) = a_;
    b.pass = run_.plan.pass;
    b.layer = a_.problem.num_layers - 1 - i;
    b.packed = packed_.data();
    b.y = a_.y;
    b.grad_hn = a_.grad_hn, b.grad_cn = a_.grad_cn, b.grad_out = grad_out;
    if (a_.wants_input(b.layer)) b.grad_in = b.layer ? between_.data(i % 2) : a_.dx;
    b.dhx = a_.dhx, b.dcx = a_.dcx;
    b.onto_grad_in = grad_below(i);
    b.grad_cs = rows_of_layer(a_.grad_cs, b.layer, a_.problem.hidden_size);
    b.dgates = dgates_.data(), b.dproj = dproj_.data();
    b.hidden = hidden_.data(), b.dnormed = dnormed_.data();
    b.dweights = a_.dweights + b.layer * a_.problem.num_directions;
  }

  // Packs the weights, and copies the gradient that the layer's own is added to.
  Phase prepare(int64_t i) {
    const Problem& p = a_.problem;
    const bool packs = !run_.plan.unpacked;
    const int64_t parts = packs ? p.num_directions * kPackParts : 0;
    const int64_t total =
        packs ? run_.kernels.backward_offsets(p, arguments_[i].layer).total * size_ : 0;
    return {parts + (grad_below(i) ? 1 : 0), 0, [this, i, parts, total](int64_t part, char*) {
              const Backward& b = arguments_[i];
              if (part == parts) {
                std::memcpy(b.grad_in, grad_below(i), columns_ * a_.problem.out_size());
                return;
              }
              const int64_t dir = part / kPackParts;
              run_.kernels.pack_backward(b, b.layer * a_.problem.num_directions + dir,
                                         packed_.data() + dir * total, part % kPackParts,
                                         kPackParts);
            }};
  }

  bool wants_weights(int64_t i) const {
    for (int64_t dir = 0; dir < a_.problem.num_directions; dir++)
      for (int kind = 0; kind < kWeightKinds; kind++)
        if (arguments_[i].dweights[dir][WeightKind(kind)]) return true;
    return false;
  }

  // The sums over the tokens of each member, whose tasks follow each other.
  Phase weight_gradients(int64_t i) {
    const int64_t members = a_.member_count,
                  threads = std::max<int64_t>(1, run_.plan.threads / members),
                  tasks = run_.kernels.weight_tasks(a_.problem, threads);
    size_t most = 0;
    for (int64_t m = 0; m < members; m++) most = std::max(most, a_.members[m].step.size());
    return {members * tasks, run_.kernels.weight_scratch(a_.problem, arguments_[i].layer, most),
            [this, i, threads, tasks](int64_t task, char* scratch) {
              const int64_t m = task / tasks;
              Backward b = arguments_[i];
              b.seq = a_.members[m].of(b.seq), b.one_hot = a_.members[m].of(b.one_hot);
              b.dweights += m * a_.problem.num_layers * a_.problem.num_directions;
              run_.kernels.weight_grad(b, task % tasks, threads, scratch);
            }};
  }

  const CpuRun& run_;
  const BackwardStack& a_;
  // Bytes: of the compute type; of one column of all tokens and directions.
  const int64_t size_, columns_;
  const int64_t layers_, packed_bytes_;
  const ScratchMemory dgates_, dproj_, hidden_, dnormed_, zeros_;
  const ScratchMemory between_;  // two layers: gradients that take turns
  const ScratchMemory packed_;
  RowTasks tasks_;
  std::vector<Backward> arguments_;
};

}  // namespace

void run_backward(const CpuRun& run, const BackwardStack& a) { BackwardLayers(run, a).run(); }

}  // namespace fusedrnn
