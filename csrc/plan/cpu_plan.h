// How the CPU divides a call, a pure function of its shape and the number of threads.
#pragma once
#include <algorithm>
#include <cstdint>

#include "plan/cpu_costs.h"
#include "plan/problem.h"

namespace fusedrnn {

constexpr int64_t kSecondCache = 2 << 20;  // bytes, of one core

struct CpuPlan {
  int64_t threads;        // that the call uses
  int64_t rows_per_task;  // rows of the batch that a thread takes through all layers and steps
  int64_t tasks;
  int64_t members;  // threads that take a task together
};

// As many threads as the work is worth, or all of them. Each has a share of the batch; one of more
// rows than keep their states and gates in the second cache is cut into equal tasks, and none has
// fewer rows than the kernels do at once. Where each row has two threads or more, they take it
// together, if `may_team` and a step is worth meeting for. So they do with few rows each, if the
// weights that a step reads are more than the second cache holds: then each reads a part of them.
inline CpuPlan plan_cpu(const Problem& p, const CpuCosts& costs, bool backward, int64_t batch,
                        int64_t tokens, int64_t threads, bool all, bool may_team) {
  constexpr int64_t kManyRows = 64;            // that a task takes; in general half as many
  constexpr int64_t kWorkOfThread = 1 << 20;   // multiply-adds that take longer than to wake one
  constexpr int64_t kWorkOfGate = 8;           // its activation, counted the same way
  constexpr int64_t kWorkOfMeeting = 1 << 12;  // once a step, for each thread that comes
  // In backward members have more to tell each other, the gradients of all gates.
  const int64_t few_rows = backward ? 15 : 16;
  auto divide = [](int64_t a, int64_t b) { return (a + b - 1) / b; };
  int64_t per_token = 0;
  for (int64_t layer = 0; layer < p.num_layers; layer++)
    per_token +=
        p.num_directions * p.gate_rows() * (p.product_input(layer) + p.out_size() + kWorkOfGate);
  if (!all) threads = std::min(threads, std::max<int64_t>(1, tokens * per_token / kWorkOfThread));
  if (batch == 0) return {threads, 1, 0, 1};
  // Many rows share what a step reads of large weights, where the gradients of their gates, which a
  // step of backward reads too, leave room for that.
  const int64_t weights = p.gate_rows() * p.out_size() * costs.weight_bytes;
  const bool room = !backward || kManyRows * p.gate_rows() * costs.weight_bytes <= kSecondCache / 2;
  const bool many = p.dtype == DType::kBFloat16 || (weights > kSecondCache && room);
  const int64_t most_rows = many ? kManyRows : kManyRows / 2;
  int64_t members = 1;
  if (may_team && !p.proj_size && !p.layer_norm) {
    const int64_t step = p.gate_rows() * p.hidden_size;
    auto worth = [&](int64_t n) { return all || n * n * kWorkOfMeeting <= step; };
    while ((members + 1) * batch <= threads && worth(members + 1)) members++;
    if (members == 1 && weights > kSecondCache && divide(batch, threads) <= few_rows)
      members = threads / std::max({int64_t(1), threads * kSecondCache / 2 / weights,
                                    divide(batch, most_rows)});  // no more tasks than teams
  }
  const int64_t least = all || members > 1 ? 1 : std::min(batch, costs.least_rows);
  const int64_t share = std::max(divide(batch, threads / members), least);
  const int64_t rows = divide(share, divide(share, most_rows));
  return {threads, rows, divide(batch, rows), members};
}

// How many threads share the steps of a call of few tokens, whose weights are read as they lie; 0:
// they are packed. For what plain layers do: a call may need more than the problem says.
inline int64_t plan_direct(const Problem& p, const CpuCosts& costs, int64_t steps, int64_t tokens,
                           int64_t threads) {
  constexpr int64_t kBytesOfThread = 256 << 10;  // take longer to read than threads to meet
  const int64_t depth = p.hidden_size + std::max(p.input_size, p.num_directions * p.hidden_size),
                weights = p.gate_rows() * depth * bytes(p.dtype);
  // More tokens pay for the packing: soon if the weights are small, or in many steps, each of which
  // reads all of them, from beyond the second cache even.
  int64_t most_tokens = 8;
  if (weights >= kSecondCache / 4 && costs.loads_quickly) {
    if (steps <= 3)
      most_tokens = kFewTokens;
    else if (steps <= 8 && weights <= kSecondCache)
      most_tokens = 16;
  }
  if (p.dtype == DType::kBFloat16) most_tokens = 4;
  if (tokens > most_tokens || p.one_hot || p.proj_size || p.zoneout || p.all_states || p.layer_norm)
    return 0;
  return std::max<int64_t>(1, std::min(weights / kBytesOfThread, threads));
}

// Whether other calls read W_hh, and it alone, as it lies: with few rows a step takes about as long
// as with packed weights, and packing them as long as some steps. Of more than the second cache
// holds both wait for the same bytes.
inline bool plan_unpacked(const Problem& p, const CpuCosts& costs, int64_t batch, int64_t steps) {
  const int64_t weights = p.gate_rows() * p.out_size() * bytes(p.dtype);
  const int64_t most_steps = weights > kSecondCache ? 64 : 32 / std::max<int64_t>(1, batch);
  return batch <= kDotRows && steps <= most_steps && weights >= kSecondCache / 8 && !p.layer_norm &&
         costs.loads_quickly;
}

// Whether a call of few tokens goes up and down through its weights in turns: they are more than
// the second cache holds, but not by so much that little of them is found there the next time.
inline bool plan_turns(const Problem& p, int64_t steps, int64_t threads) {
  int64_t between = 0;  // elements that are read from one time to the next
  for (int64_t layer = 0; layer < p.num_layers; layer++) {
    const int64_t of_layer = p.gate_rows() * (p.layer_input(layer) + p.hidden_size);
    between = steps == 1 ? between + p.num_directions * of_layer : std::max(between, of_layer);
  }
  between = between * bytes(p.dtype) / threads;
  return between > kSecondCache && between <= 5 * kSecondCache;
}

}  // namespace fusedrnn
