// CUDA C++ for g++: what a kernel's source finds in place of nvcc's built-ins and cuda_runtime.h,
// and the interface of the runtime (simt.cpp) that runs it.
//
// Every CUDA thread is a fiber on one operating system thread, which it gives up only where it
// waits. There is no lockstep and no order among threads but what barriers, flags and stores make:
// with a seed the next one to run is drawn at random. Shared memory starts as NaN. Whoever waits
// for what never comes, at a barrier or at a flag, ends the launch with a report.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace simt {

using Where = std::source_location;  // as a default argument: the line of the kernel that calls

// ---- the launch ----

struct Launch {
  dim3 blocks, threads;
  int cluster = 1;
  size_t shared_bytes = 0;
  bool cooperative = false;
};
// The errors of run, with CUDA's numbers.
constexpr int kSuccess = 0, kInvalidValue = 1, kInvalidConfiguration = 9, kLaunchFailure = 719,
              kCooperativeLaunchTooLarge = 720, kInvalidClusterSize = 912;
// The device that is played, an H100: what it has not, a launch does not get.
constexpr size_t kSharedPerBlock = 227 << 10, kSharedPerProcessor = 228 << 10,
                 kStaticShared = 48 << 10;
constexpr int kProcessors = 132, kThreadsPerBlock = 1024, kThreadsPerProcessor = 2048,
              kLargestCluster = 16;

// Runs `body` once for every thread. A kernel that fails says why on stderr.
int run(const Launch&, const std::function<void()>& body);
// Draw the order of threads, and when stores to other blocks land, from a seed; negative: always
// the same order, and stores land as late as they may.
void set_seed(int64_t seed);
// Lets so many launches pass, and has the one after them fail; negative: none.
void fail_after(int64_t launches);
// How many there have been.
int64_t launches();
// Faults to play from now on, separated by commas; none: the text is empty.
//   refuse-clusters, refuse-cooperative, refuse-all   launches of such a kind are not accepted
//   after=N       but for the first N of them
//   send-zeros    what blocks store for each other is zero
//   swap-registers  tensor cores take two registers of A in the other order
//   lose-block    the last block of a launch never runs; of launches that are no clusters
//   capture       a CUDA graph is being captured
void play(const char* faults);
struct Faults {
  bool refuse_clusters, refuse_cooperative, refuse_all, send_zeros, swap_registers, lose_block,
      capture;
  int64_t after;
};
extern Faults faults;
inline bool capturing() { return faults.capture; }

// How long the last launch had to take where all that counts is how often one block waits for
// another, at a cluster's barrier or at a flag: the longest chain of those.
int64_t longest_way();

// ---- what a thread can ask for ----

struct Thread {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
};
extern const Thread* current;

void sync_block(Where);
bool sync_block_any(bool yes, Where);
void sync_warp(unsigned mask, Where);
void arrive_cluster(Where);
void wait_cluster(Where);
int lane();

// Every lane of `mask` gives `bytes` (at most 64). Returns what lane l gave at 64 * l; this is
// readable until the next exchange with the same mask. Orders no memory, like the shuffles.
const char* exchange(unsigned mask, const void* value, size_t bytes, Where);
// The same of all 32 lanes, which execute the same instruction.
const char* exchange_aligned(const char* instruction, const void* value, size_t bytes, Where);

void* dynamic_shared();
void* static_shared(const void* key, size_t bytes);  // the same array for each key

// Fails unless p is in global memory and a multiple of `bytes`.
void expect_global(const void* p, size_t bytes, Where);

// A clock that goes on only where a block is lost: all others are waited for in any case, and one
// that never comes is reported.
uint64_t nanoseconds();

// A thread looks at a flag that others set: they run before it looks again.
void poll(Where);
void progress(const void* flag, int value);                // a flag has this value now
void reached(const void* flag, int value);                 // a thread has found it, or more
[[noreturn]] void stored_twice(const void* place, Where);  // fails: a value has come before

// mbarriers, and what completes their transactions: stores, of at most 16 bytes, to where block
// `rank` of the cluster has what this block has at `mine` and `barrier`.
void mbarrier_init(void* barrier, int arrivals, Where);
void mbarrier_init_fence();
void mbarrier_arrive(void* barrier, int64_t expect_bytes, Where);
void mbarrier_wait(void* barrier, int parity, Where);
void store_async(void* mine, const void* value, size_t bytes, void* barrier, int rank, Where);

}  // namespace simt

// ---- CUDA's names ----

#define threadIdx (simt::current->thread)
#define blockIdx (simt::current->block)
#define blockDim (simt::current->block_dim)
#define gridDim (simt::current->grid_dim)

inline void __syncthreads(simt::Where at = simt::Where::current()) { simt::sync_block(at); }
inline void __syncwarp(unsigned mask = ~0u, simt::Where at = simt::Where::current()) {
  simt::sync_warp(mask, at);
}

namespace simt {
// Lane l gets the value of lane `from`, its own where that lies outside its `width` lanes or gave
// nothing.
template <class T>
T shuffle(unsigned mask, T value, int from, int width, Where at) {
  static_assert(sizeof value <= 8);
  const char* all = exchange(mask, &value, sizeof value, at);
  const int mine = lane();
  if (from / width == mine / width && from >= 0 && mask >> from & 1)
    std::memcpy(&value, all + 64 * from, sizeof value);
  return value;
}
}  // namespace simt

template <class T>
T __shfl_sync(unsigned mask, T value, int from, int width = 32,
              simt::Where at = simt::Where::current()) {
  const int first = simt::lane() & ~(width - 1);
  return simt::shuffle(mask, value, first + (from & (width - 1)), width, at);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  simt::Where at = simt::Where::current()) {
  return simt::shuffle(mask, value, simt::lane() ^ bits, width, at);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int by, int width = 32,
                   simt::Where at = simt::Where::current()) {
  return simt::shuffle(mask, value, simt::lane() + by, width, at);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int by, int width = 32,
                 simt::Where at = simt::Where::current()) {
  return simt::shuffle(mask, value, simt::lane() - by, width, at);
}
