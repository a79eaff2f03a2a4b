// Forward of few tokens: threads divide the hidden units of each step, and weights are read
// unpacked.
#include <atomic>
#include <cstring>
#include <utility>
#include <vector>

#include "cpu/run/run.h"
#include "cpu/run/tasks.h"

namespace fusedrnn {
namespace {

// Whether a stack's next call reads its weights in descending order, because the call before ended
// with those in the L2 cache. Only time depends on it.
std::atomic<bool>& next_descends(const void* weights) {
  static std::atomic<bool> descends[64];
  return descends[reinterpret_cast<uintptr_t>(weights) / 64 % 64];
}

int64_t round_up(int64_t bytes) { return (bytes + 63) / 64 * 64; }

class UnpackedForward {
 public:
  UnpackedForward(const CpuRun& run, const Forward& a)
      : run_(run),
        a_(a),
        states_(a.problem.num_layers * a.problem.num_directions),
        longest_(a.seq.length[a.seq.order[0]]),
        row_(a.problem.hidden_size * compute_bytes(a.problem.dtype)),
        batch_(a.seq.batch / run.plan.ensemble),
        threads_(run.plan.ensemble > 1 ? 1 : run.plan.threads),
        bytes_(run.kernels.unpacked_scratch(a.problem, batch_)),
        state_bytes_(round_up(3 * batch_ * row_) + bytes_.common),
        memory_(1, states_ * state_bytes_ + threads_ * bytes_.own),
        steps_(states_) {
    if (!run.plan.pass.alternates) return;
    std::atomic<bool>& next = next_descends(a.weights->w_hh);
    descending_ = next.load(std::memory_order_relaxed);
    next.store(descending_ != longest_ % 2, std::memory_order_relaxed);
  }

  void run() {
    for (int64_t i = 0; i < states_; i++) begin(i);
    for (int64_t i = 0; i < states_; i++) {
      for (int64_t step = 0; step < longest_; step++) take(i, step);
      run_.kernels.unpacked_end(a_, steps_[i]);
    }
  }

 private:
  void begin(int64_t i) {
    UnpackedStep& s = steps_[i];
    s.layer = i / a_.problem.num_directions, s.dir = i % a_.problem.num_directions;
    char* const memory = memory_.data() + i * state_bytes_;
    const int64_t state = batch_ * row_;
    s.all_rows = batch_;
    s.h_prev = memory, s.h = memory + state, s.c = memory + 2 * state;
    run_.kernels.unpacked_begin(a_, s);
    s.sums = memory + state_bytes_ - bytes_.common;
    s.has_recurrent = run_.plan.recurrent_first && i > 0;
    if (s.has_recurrent) set_time(s, 0);
  }

  void set_time(UnpackedStep& s, int64_t step) const {
    s.t = s.dir == 0 ? step : longest_ - 1 - step;
    s.rows = batch_;
    while (a_.seq.length[a_.seq.order[s.rows - 1]] <= s.t) s.rows--;
    s.descending = run_.plan.pass.alternates && descending_ != step % 2;
  }

  void take(int64_t i, int64_t step) {
    UnpackedStep& s = steps_[i];
    set_time(s, step);
    auto share = [&](int64_t part) { take_part(i, part); };
    if (threads_ == 1)
      share(0);
    else
      run_.pool.parallel_for(threads_, share);
    const int64_t resting = (batch_ - s.rows) * row_;  // bytes of rows that have ended
    std::memcpy(static_cast<char*>(s.h) + s.rows * row_,
                static_cast<char*>(s.h_prev) + s.rows * row_, resting);
    std::swap(s.h, s.h_prev);
  }

  // One thread's share of the units. The products of the other layers with their initial states
  // come before the first layer's step, or right after it if units descend: closer to what the last
  // call left in the cache.
  void take_part(int64_t i, int64_t part) {
    const int64_t threads = threads_;
    const int64_t others = run_.plan.recurrent_first && i == 0 ? states_ - 1 : 0;
    auto multiply = [&](int64_t j) {
      run_.kernels.unpacked_recurrent(a_, steps_[j], part, threads);
    };
    for (int64_t j = others; !descending_ && j > 0; j--) multiply(j);
    char* const inputs = memory_.data() + states_ * state_bytes_ + part * bytes_.own;
    run_.kernels.unpacked_step(a_, steps_[i], part, threads, inputs);
    for (int64_t j = 1; descending_ && j <= others; j++) multiply(j);
  }

  const CpuRun& run_;
  const Forward& a_;
  const int64_t states_, longest_, row_;  // layers and directions; steps; bytes
  const int64_t batch_, threads_;         // rows; threads that divide their units
  const RowsScratch bytes_;
  const int64_t state_bytes_;
  const ScratchMemory memory_;
  std::vector<UnpackedStep> steps_;
  bool descending_ = false;
};

}  // namespace

void run_unpacked(const CpuRun& run, const Forward& a) {
  const int64_t count = run.plan.ensemble;
  auto take = [&](int64_t i, char*) { UnpackedForward(run, of_weights(a, run.plan, i)).run(); };
  if (count == 1) return take(0, nullptr);
  run_phases(run.pool, run.plan.threads, {{count, 0, take}});
}

}  // namespace fusedrnn
