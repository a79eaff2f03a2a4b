// How the CPU runs a call. Every decision is in one value, made by a pure function of the call's
// shape and the machine.
#pragma once
#include <cstdint>
#include <string>

#include "plan/cpu_pass.h"
#include "plan/problem.h"

namespace fusedrnn {

// The kernels for one instruction set.
struct CpuVariant {
  const char* name;
  CpuCosts costs[int(DType::kCount)];
};

struct CpuMachine {
  // Those that may run, best first. An earlier one leaves what it does not compute to the next.
  const CpuVariant* variants;
  int count;
  bool named;  // the first is asked for by name: it takes all that it computes
  bool tiles;  // Linux gives this process the tiles of AMX
  int64_t threads;
  bool all_threads;  // divide even the smallest work among all of them
  int64_t l3_bytes;  // of one L3 cache, which some cores share
  bool quick_l3;     // a core reads it about as fast as L2
};

struct CpuRequest {
  bool backward;
  int64_t steps, batch, tokens;
  int64_t longest;  // steps of the longest row
  bool resets, recurrent_dropout;
  bool tangent = false;  // the derivative of the pass in one direction
  // Weights that differ: each has its own rows, as many as the others. What is said of the batch
  // and its tokens is said of all.
  int64_t ensemble = 1;
};

struct CpuPlan {
  int variant;      // of CpuMachine::variants
  int64_t threads;  // that the call uses
  // All weights are read unpacked: of few tokens packing them takes longer than multiplying.
  // Forward then divides hidden units among threads, or whole weights of an ensemble; all else
  // rows of the batch.
  bool unpacked;
  bool recurrent_first;  // then: the products of all initial states come before the first step
  CpuPass pass;          // what the kernels are told
  // Forward in general, and backward: a task takes so many rows of the batch through all layers
  // and steps. Its members, a team of threads if more than one, divide the hidden units. No task
  // has rows of two weights of an ensemble, all of which have as many tasks.
  int64_t rows_per_task, tasks, members;
  int64_t ensemble;

  // Whether a thread packs the weights of a member and computes all its rows, and has threads
  // enough to wait for none.
  bool by_weights() const { return ensemble > 1 && ensemble >= threads && tasks == ensemble; }
};

CpuPlan plan_cpu(const Problem&, const CpuRequest&, const CpuMachine&);

// The plan in words.
std::string describe(const CpuPlan&, const Problem&, const CpuRequest&, const CpuMachine&);

}  // namespace fusedrnn
