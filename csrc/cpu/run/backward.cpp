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
        directions_(a.problem.num_directions),
        packed_bytes_((a.problem.num_directions * most_packed() * size_ + 63) / 64 * 64),
        dgates_(1, columns_ * a.problem.slot_columns()),
        dproj_(1, a.problem.proj_size ? columns_ * a.problem.out_size() : 0),
        hidden_(1, a.problem.proj_size ? columns_ * a.problem.hidden_size : 0),
        dnormed_(1, a.problem.layer_norm ? columns_ * a.problem.normed_columns() : 0),
        zeros_(1, a.grad_y ? 0 : columns_ * a.problem.out_size()),
        between_(std::clamp<int64_t>(layers_ - 1, 0, 2), columns_ * a.problem.out_size()),
        packed_(1, by_weights() ? 0 : run.plan.ensemble * packed_bytes_),
        tasks_(run.plan, a.seq.batch,
               run.kernels.rows_scratch(a.problem, run.plan.pass, run.plan.rows_per_task), layers_),
        arguments_(layers_ * run.plan.ensemble) {
    if (!a.grad_y) std::memset(zeros_.data(), 0, columns_ * a.problem.out_size());
  }

  void run() {
    const void* grad_out = a_.grad_y ? a_.grad_y : zeros_.data();
    for (int64_t i = 0; i < layers_; i++) {
      for (int64_t which = 0; which < run_.plan.ensemble; which++)
        set_arguments(i, which, grad_out);
      grad_out = arguments(i).grad_in;
    }
    run_phases(run_.pool, run_.plan.threads, by_weights() ? phase_of_weights() : phases());
  }

 private:
  // A thread takes all layers of a member while its weights and gradients are in the cache.
  bool by_weights() const { return run_.plan.by_weights() && !a_.grad_hs; }

  std::vector<Phase> phases() {
    std::vector<Phase> all;
    for (int64_t i = 0; i < layers_; i++) {
      all.push_back(prepare(i));
      all.push_back(tasks_.phase(i, [this, i](int64_t which, const Rows& rows, Member& me) {
        run_.kernels.backward(arguments(i, which), rows, me);
      }));
      if (wants_weights(i)) all.push_back(weight_gradients(i));
    }
    return all;
  }

  std::vector<Phase> phase_of_weights() {
    const int64_t groups = a_.member_count / run_.plan.ensemble;
    const int64_t tasks = run_.kernels.weight_tasks(a_.problem, 1);
    int64_t bytes = tasks_.task_bytes();
    for (int64_t i = 0; i < layers_; i++)
      if (wants_weights(i)) bytes = std::max(bytes, weight_scratch(i));
    auto task = [this, groups, tasks](int64_t which, char* memory) {
      char* const scratch = memory + packed_bytes_;
      for (int64_t i = 0; i < layers_; i++) {
        if (!run_.plan.unpacked) {
          arguments(i, which).packed = memory;
          for (int64_t dir = 0; dir < directions_; dir++) pack_part(i, which, dir, 0, 1);
        }
        Member alone;
        run_.kernels.backward(arguments(i, which), tasks_.rows(which, scratch, 0), alone);
        for (int64_t k = 0; k < groups * tasks && wants_weights(i); k++)
          weight_task(i, k / tasks * run_.plan.ensemble + which, k % tasks, 1, scratch);
      }
    };
    return {{run_.plan.ensemble, packed_bytes_ + bytes, task}};
  }

  // Elements of a direction's packed weights, of the layer that has most.
  int64_t most_packed() const {
    int64_t most = 0;
    for (int64_t layer = a_.lowest; layer < a_.problem.num_layers && !run_.plan.unpacked; layer++)
      most = std::max(most, run_.kernels.backward_offsets(a_.problem, layer).total);
    return most;
  }

  // The gradient of the states of the layer below, to which this layer's is added.
  const void* grad_below(int64_t i) const {
    const Backward& b = arguments(i);
    return b.layer && b.grad_in ? a_.grad_outputs(b.layer - 1) : nullptr;
  }

  Backward& arguments(int64_t i, int64_t which = 0) {
    return arguments_[i * run_.plan.ensemble + which];
  }
  const Backward& arguments(int64_t i, int64_t which = 0) const {
    return arguments_[i * run_.plan.ensemble + which];
  }

  void set_arguments(int64_t i, int64_t which, const void* grad_out) {
    Backward& b = arguments(i, which) = {};
    static_cast<Common&>(b) = of_weights<Common>(a_, run_.plan, which);
    b.pass = run_.plan.pass;
    b.layer = a_.problem.num_layers - 1 - i;
    b.packed = packed_.data() + which * packed_bytes_;
    b.y = a_.y;
    b.grad_hn = a_.grad_hn, b.grad_cn = a_.grad_cn, b.grad_out = grad_out;
    if (a_.wants_input(b.layer)) b.grad_in = b.layer ? between_.data(i % 2) : a_.dx;
    b.dhx = a_.dhx, b.dcx = a_.dcx;
    b.onto_grad_in = grad_below(i);
    b.grad_cs = a_.grad_cells(b.layer);
    b.dgates = dgates_.data(), b.dproj = dproj_.data();
    b.hidden = hidden_.data(), b.dnormed = dnormed_.data();
    b.dweights = a_.dweights + b.layer * a_.problem.num_directions;
    b.rounds_weights = a_.rounds_weights;
  }

  // Packs a part of the weights of a layer and direction.
  void pack_part(int64_t i, int64_t which, int64_t dir, int64_t part, int64_t parts) {
    const Backward& b = arguments(i, which);
    const int64_t total = run_.kernels.backward_offsets(b.problem, b.layer).total * size_;
    char* const packed = static_cast<char*>(const_cast<void*>(b.packed)) + dir * total;
    run_.kernels.pack_backward(b, b.layer * directions_ + dir, packed, part, parts);
  }

  // Packs the weights, and copies the gradient that the layer's own is added to.
  Phase prepare(int64_t i) {
    const int64_t parts = pack_parts(run_.plan), each = directions_ * parts,
                  packs = run_.plan.unpacked ? 0 : run_.plan.ensemble * each;
    return {packs + (grad_below(i) ? 1 : 0), 0, [this, i, parts, each, packs](int64_t task, char*) {
              if (task < packs)
                return pack_part(i, task / each, task % each / parts, task % parts, parts);
              std::memcpy(arguments(i).grad_in, grad_below(i), columns_ * a_.problem.out_size());
            }};
  }

  bool wants_weights(int64_t i) const {
    for (int64_t dir = 0; dir < a_.problem.num_directions; dir++)
      for (int kind = 0; kind < kWeightKinds; kind++)
        if (arguments(i).dweights[dir][WeightKind(kind)]) return true;
    return false;
  }

  // The sums over the tokens of each member, whose tasks follow each other.
  Phase weight_gradients(int64_t i) {
    const int64_t members = a_.member_count,
                  threads = std::max<int64_t>(1, run_.plan.threads / members),
                  tasks = run_.kernels.weight_tasks(a_.problem, threads);
    return {members * tasks, weight_scratch(i),
            [this, i, threads, tasks](int64_t task, char* scratch) {
              weight_task(i, task / tasks, task % tasks, threads, scratch);
            }};
  }
  int64_t weight_scratch(int64_t i) const {
    size_t most = 0;
    for (int64_t m = 0; m < a_.member_count; m++) most = std::max(most, a_.members[m].step.size());
    return run_.kernels.weight_scratch(a_.problem, arguments(i).layer, most);
  }
  void weight_task(int64_t i, int64_t member, int64_t task, int64_t threads, char* scratch) const {
    Backward b = arguments(i);
    b.seq = a_.members[member].of(b.seq), b.one_hot = a_.members[member].of(b.one_hot);
    b.dweights += member * a_.problem.num_layers * directions_;
    run_.kernels.weight_grad(b, task, threads, scratch);
  }

  const CpuRun& run_;
  const BackwardStack& a_;
  // Bytes: of the compute type; of one column of all tokens and directions.
  const int64_t size_, columns_;
  const int64_t layers_, directions_, packed_bytes_;  // packed: of one of the ensemble's weights
  const ScratchMemory dgates_, dproj_, hidden_, dnormed_, zeros_;
  const ScratchMemory between_;  // two layers: gradients that take turns
  const ScratchMemory packed_;
  RowTasks tasks_;
  std::vector<Backward> arguments_;  // [layers][ensemble]
};

}  // namespace

void run_backward(const CpuRun& run, const BackwardStack& a) { BackwardLayers(run, a).run(); }

}  // namespace fusedrnn
