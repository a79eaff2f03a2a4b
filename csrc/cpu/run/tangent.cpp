// The derivatives of forward and backward in one direction, as phases.
#include <algorithm>
#include <cstring>
#include <iterator>

#include "cpu/run/run.h"
#include "cpu/run/tasks.h"

namespace fusedrnn {
namespace {

RowsScratch tangent_scratch(const CpuRun& run, const Problem& p) {
  return {0, run.kernels.tangent_scratch(p, run.plan.rows_per_task)};
}

// Weights that are multiplied with what has a tangent: their gradients are two sums.
constexpr WeightKind kFactors[] = {kWeightIH, kWeightHH, kWeightHR, kGainIH, kGainHH, kGainC};

// All layers of backward, the last one first: weights and their tangents are packed, rows go back
// through time, then come the gradients of weights, in two sums.
class BackwardTangentLayers {
 public:
  BackwardTangentLayers(const CpuRun& run, const BackwardTangentStack& a)
      : run_(run),
        a_(a),
        p_(a.primal.problem),
        size_(compute_bytes(p_.dtype)),
        columns_(a.primal.seq.tokens * p_.num_directions * size_),
        layers_(p_.num_layers - a.tangent.lowest),
        packed_bytes_(most_packed() * size_),
        dgates_(2, columns_ * p_.slot_columns()),
        dproj_(2, p_.proj_size ? columns_ * p_.out_size() : 0),
        hidden_(2, p_.proj_size ? columns_ * p_.hidden_size : 0),
        dnormed_(2, columns_ * p_.normed_columns()),
        between_(layers_ > 1 ? 4 : 0, columns_ * p_.out_size()),
        packed_(2 * run.plan.ensemble, p_.num_directions * packed_bytes_),
        more_(1, a.tangent.member_count * most_weights() * size_),
        tasks_(run.plan, a.primal.seq.batch, tangent_scratch(run, p_), layers_),
        arguments_(layers_ * run.plan.ensemble),
        sums_(2 * layers_) {}

  void run() {
    std::vector<Phase> phases;
    const void *grad_out = a_.primal.grad_y, *dgrad_out = a_.tangent.grad_y;
    for (int64_t i = 0; i < layers_; i++) {
      for (int64_t which = 0; which < run_.plan.ensemble; which++)
        set_arguments(i, which, grad_out, dgrad_out);
      grad_out = arguments(i).primal.grad_in, dgrad_out = arguments(i).tangent.grad_in;
      phases.push_back(prepare(i));
      phases.push_back(tasks_.phase(i, [this, i](int64_t which, const Rows& rows, Member&) {
        run_.kernels.backward_tangent(arguments(i, which), rows);
      }));
      set_sums(i);
      for (int64_t sum = 0; sum < 2; sum++) phases.push_back(weight_gradients(i, sum));
      phases.push_back(add(i));
    }
    run_phases(run_.pool, run_.plan.threads, phases);
  }

 private:
  // Elements of a direction's packed weights, and of a layer's weights, where they are most.
  int64_t most_packed() const {
    int64_t most = 0;
    for (int64_t layer = a_.tangent.lowest; layer < p_.num_layers; layer++)
      most = std::max(most, run_.kernels.backward_offsets(p_, layer).total);
    return most;
  }
  // Of the weight of a kind.
  int64_t elements(int64_t layer, WeightKind kind) const {
    switch (kind) {
      case kWeightIH:
        return p_.gate_rows() * p_.layer_input(layer);
      case kWeightHH:
        return p_.gate_rows() * p_.out_size();
      case kWeightHR:
        return p_.proj_size * p_.hidden_size;
      default:
        return !p_.has_weight(kind) ? 0 : kind == kGainC ? p_.hidden_size : p_.gate_rows();
    }
  }
  int64_t weight_elements(int64_t layer) const {
    int64_t sum = 0;
    for (const WeightKind kind : kFactors) sum += elements(layer, kind);
    return p_.num_directions * sum;
  }
  int64_t most_weights() const {
    int64_t most = 0;
    for (int64_t layer = a_.tangent.lowest; layer < p_.num_layers; layer++)
      most = std::max(most, weight_elements(layer));
    return most;
  }

  // The gradient of the states of the layer below, to which this layer's is added.
  const void* grad_below(const BackwardStack& of, const Backward& b) const {
    return b.layer && b.grad_in ? of.grad_outputs(b.layer - 1) : nullptr;
  }
  void copy_below(const BackwardStack& of, const Backward& b) const {
    if (const void* const below = grad_below(of, b))
      std::memcpy(b.grad_in, below, columns_ * p_.out_size());
  }

  BackwardTangent& arguments(int64_t i, int64_t which = 0) {
    return arguments_[i * run_.plan.ensemble + which];
  }

  void set_arguments(int64_t i, int64_t which, const void* grad_out, const void* dgrad_out) {
    const int64_t layer = p_.num_layers - 1 - i;
    auto set = [&](Backward& b, const BackwardStack& of, int64_t place, const void* from_above) {
      b = {};
      static_cast<Common&>(b) = of_weights<Common>(of, run_.plan, which);
      b.pass = run_.plan.pass;
      b.layer = layer;
      b.packed = packed_.data(2 * which + place);
      b.y = of.y;
      b.grad_hn = of.grad_hn, b.grad_cn = of.grad_cn, b.grad_out = from_above;
      if (layer > a_.tangent.lowest) b.grad_in = between_.data(2 * place + i % 2);
      b.onto_grad_in = grad_below(of, b), b.grad_cs = of.grad_cells(layer);
      b.dgates = dgates_.data(place);
      b.dproj = dproj_.data(place), b.hidden = hidden_.data(place);
      b.dnormed = dnormed_.data(place);
    };
    set(arguments(i, which).primal, a_.primal, 0, grad_out);
    Backward& tangent = arguments(i, which).tangent;
    set(tangent, a_.tangent, 1, dgrad_out);
    if (layer == 0) tangent.grad_in = a_.tangent.dx;
    tangent.dhx = a_.tangent.dhx, tangent.dcx = a_.tangent.dcx;
  }

  // Packs the weights, and copies the gradients that the layer's own are added to.
  Phase prepare(int64_t i) {
    const int64_t each = pack_parts(run_.plan), parts = p_.num_directions * each,
                  packs = 2 * run_.plan.ensemble * parts;
    const int64_t layer = arguments(i).primal.layer,
                  total = run_.kernels.backward_offsets(p_, layer).total * size_;
    return {packs + 2, 0, [this, i, each, parts, packs, layer, total](int64_t part, char*) {
              if (part == packs) return copy_below(a_.primal, arguments(i).primal);
              if (part > packs) return copy_below(a_.tangent, arguments(i).tangent);
              const int64_t place = part / parts, dir = part % parts / each;
              const BackwardTangent& both = arguments(i, place / 2);
              // Tangents need the primal weights wherever they need their own.
              Backward b = place % 2 ? both.tangent : both.primal;
              b.grad_in = both.tangent.grad_in, b.dhx = both.tangent.dhx;
              run_.kernels.pack_backward(b, layer * p_.num_directions + dir,
                                         packed_.data(place) + dir * total, part % each, each);
            }};
  }

  // Where member m's second sums of a layer go for now: by directions, then by kinds.
  char* more(int64_t layer, int64_t m, int64_t dir, WeightKind wanted) const {
    int64_t place = m * weight_elements(layer) + dir * (weight_elements(layer) / p_.num_directions);
    for (const WeightKind kind : kFactors) {
      if (kind == wanted) break;
      place += elements(layer, kind);
    }
    return more_.data() + place * size_;
  }

  // The gradients that the two sums of a layer write, [members][directions]: that of dg x h the
  // results, and that of g x dh others, which are added to these. The second sum has no biases, and
  // of W_ih nothing where the input has no tangent.
  void set_sums(int64_t i) {
    const Backward& d = arguments(i).tangent;
    const bool dx = !p_.indexed(d.layer) && (d.layer || d.x);
    for (int64_t m = 0; m < a_.tangent.member_count; m++)
      for (int64_t dir = 0; dir < p_.num_directions; dir++) {
        const WeightGradients& to =
            a_.tangent.dweights[(m * p_.num_layers + d.layer) * p_.num_directions + dir];
        WeightGradients other{};
        auto place = [&](WeightKind kind) {
          return to[kind] ? more(d.layer, m, dir, kind) : nullptr;
        };
        if (dx) other.w_ih = place(kWeightIH);
        other.w_hh = place(kWeightHH), other.w_hr = place(kWeightHR);
        other.gain_ih = place(kGainIH), other.gain_hh = place(kGainHH);
        other.gain_c = place(kGainC);
        sums_[2 * i].push_back(to), sums_[2 * i + 1].push_back(other);
      }
  }
  bool any(const std::vector<WeightGradients>& sum) const {
    for (const WeightGradients& g : sum)
      for (int kind = 0; kind < kWeightKinds; kind++)
        if (g[WeightKind(kind)]) return true;
    return false;
  }

  Phase weight_gradients(int64_t i, int64_t sum) {
    const std::vector<WeightGradients>& to = sums_[2 * i + sum];
    if (!any(to)) return {};
    const int64_t members = a_.tangent.member_count,
                  threads = std::max<int64_t>(1, run_.plan.threads / members),
                  tasks = run_.kernels.weight_tasks(p_, threads);
    size_t most = 0;
    for (int64_t m = 0; m < members; m++) most = std::max(most, a_.tangent.members[m].step.size());
    return {members * tasks, run_.kernels.weight_scratch(p_, arguments(i).primal.layer, most),
            [this, i, sum, &to, threads, tasks](int64_t task, char* scratch) {
              const int64_t m = task / tasks;
              const BackwardTangent& both = arguments(i);
              Backward b = sum ? both.tangent : both.primal;
              b.dgates = sum ? both.primal.dgates : both.tangent.dgates;
              b.dproj = sum ? both.primal.dproj : both.tangent.dproj;
              b.dnormed = sum ? both.primal.dnormed : both.tangent.dnormed;
              b.seq = a_.tangent.members[m].of(b.seq);
              b.one_hot = a_.tangent.members[m].of(both.primal.one_hot);
              b.dweights = to.data() + m * p_.num_directions;
              run_.kernels.weight_grad(b, task % tasks, threads, scratch);
            }};
  }

  Phase add(int64_t i) {
    const std::vector<WeightGradients>& sums = sums_[2 * i + 1];
    if (!any(sums)) return {};
    const int64_t kinds = std::size(kFactors);
    return {kinds * int64_t(sums.size()), 0, [this, i, kinds](int64_t task, char*) {
              const WeightKind kind = kFactors[task % kinds];
              void* const to = sums_[2 * i][task / kinds][kind];
              const void* const from = sums_[2 * i + 1][task / kinds][kind];
              if (!to || !from) return;
              const int64_t n = elements(arguments(i).primal.layer, kind);
              if (size_ == sizeof(double))
                add_to(static_cast<double*>(to), static_cast<const double*>(from), n);
              else
                add_to(static_cast<float*>(to), static_cast<const float*>(from), n);
            }};
  }
  template <class C>
  static void add_to(C* to, const C* from, int64_t n) {
    for (int64_t j = 0; j < n; j++) to[j] += from[j];
  }

  const CpuRun& run_;
  const BackwardTangentStack& a_;
  const Problem& p_;
  // Bytes: of the compute type; of one column of all tokens and directions.
  const int64_t size_, columns_;
  const int64_t layers_, packed_bytes_;
  // Two: of the primal pass, and their tangents.
  const ScratchMemory dgates_, dproj_, hidden_, dnormed_;
  const ScratchMemory between_;  // gradients of the inputs of two layers that take turns, likewise
  const ScratchMemory packed_;   // of each of the ensemble's weights
  const ScratchMemory more_;
  RowTasks tasks_;
  std::vector<BackwardTangent> arguments_;  // [layers][ensemble]
  std::vector<std::vector<WeightGradients>> sums_;
};

}  // namespace

void run_forward_tangent(const CpuRun& run, ForwardTangent& a) {
  const Problem& p = a.primal.problem;
  const Kernels& k = run.kernels;
  const int64_t size = compute_bytes(p.dtype), stack = p.num_layers * p.num_directions;
  a.primal.pass = a.tangent.pass = run.plan.pass;
  // The tangents of outputs of the layers but the last, where they are not kept, take turns.
  const bool held = a.tangent.reserve || a.tangent.hs;
  const int64_t turns = held ? 0 : std::min<int64_t>(2, p.num_layers - 1);
  const ScratchMemory inner(turns,
                            a.primal.seq.tokens * p.num_directions * p.out_size() * bytes(p.dtype));
  for (int64_t i = 0; i < turns; i++) a.tangent.inner[i] = inner.data(i);

  std::vector<int64_t> offsets{0};
  for (int64_t i = 0; i < stack; i++)
    offsets.push_back(offsets.back() + k.forward_offsets(a.primal, i / p.num_directions).total);
  const int64_t parts = pack_parts(run.plan), ensemble = run.plan.ensemble;
  const ScratchMemory packed(2 * ensemble, offsets.back() * size);
  std::vector<ForwardTangent> calls;  // of each of the ensemble's weights
  for (int64_t which = 0; which < ensemble; which++) {
    ForwardTangent& call = calls.emplace_back(both_of_weights(a, run.plan, which));
    call.primal.packed = packed.data(2 * which), call.tangent.packed = packed.data(2 * which + 1);
  }
  auto pack = [&](int64_t task, char*) {
    const int64_t i = task / parts % stack, part = task % parts, place = task / parts / stack;
    const ForwardTangent& both = calls[place / 2];
    k.pack_forward(place % 2 ? both.tangent : both.primal, i,
                   packed.data(place) + offsets[i] * size, part, parts);
  };
  RowTasks tasks(run.plan, a.primal.seq.batch, tangent_scratch(run, p), 1);
  run_phases(run.pool, run.plan.threads,
             {{2 * ensemble * stack * parts, 0, pack},
              tasks.phase(0, [&](int64_t which, const Rows& rows, Member& me) {
                k.forward_tangent(calls[which], rows, me);
              })});
}

void run_backward_tangent(const CpuRun& run, const BackwardTangentStack& a) {
  BackwardTangentLayers(run, a).run();
}

}  // namespace fusedrnn
