// A team of blocks: who they are, and how they wait for each other.
//
// Blocks of a cluster store into each other's shared memory and count what has come. Those of other
// teams write to global memory and tell each other by flags, one for each block, that count steps.
// A team of one block exchanges nothing, and is never a cluster: st.async requires two blocks.
#pragma once
#include "cuda/persistent/persistent.h"
#include "cuda/primitives.h"

namespace fusedrnn {

template <bool kCluster>
struct Team {
  int rank, size;
  int64_t index, slice;  // of the team; of its rows of the batch
  int stage;
  int* flags;              // of the team's blocks
  int* own_done;           // this block's: how many steps the stage that follows may read
  const int* before_done;  // the same of the team whose output is read here
  // Not zero once a block of the launch has waited too long for another; and where the host looks.
  int *given_up, *tell_host;
  int launch_code;
  // Whether this block has given up: it waits for no one any more, tells no one that it has come to
  // a step, and whatever it computes is NaN.
  mutable bool lost = false;

  __device__ explicit Team(const Persistent& p)
      : size(p.shape.team), tell_host(p.tell_host), launch_code(p.launch_code) {
    index = int64_t(blockIdx.x) / size, rank = int(blockIdx.x % size);
    stage = int(index / p.slices), slice = p.first_slice + index % p.slices;
    flags = p.flags + index * size;
    int* done = p.flags + int64_t(p.slices) * p.stages * size;
    own_done = done + blockIdx.x;
    before_done = done + (index - p.slices) * size;  // of stages that have one before them
    given_up = p.flags + p.flag_count() - 1;
  }

  // Whether there is no other block to exchange with.
  __device__ bool alone() const { return !kCluster && size == 1; }

  // Before the first exchange: every block runs, and has set up its shared memory.
  __device__ void begin() const {
    if constexpr (kCluster) {
      cluster_arrive();
      cluster_wait();
    } else {
      __syncthreads();
    }
  }
  // Waits until all flags of a team have reached `value`. All threads of the block; what the flags'
  // owners wrote before they raised them is seen by all of them afterwards.
  __device__ void wait_for(const int* all, int64_t value) const {
    if (lost) return;
    bool found = true;
    for (int i = threadIdx.x; i < size; i += kPersistentThreads)
      found &= wait_until(all + i, int(value), given_up);
    if (!found) {
      store_release(given_up, 1);
      if (tell_host) store_release(tell_host, launch_code);
    }
    lost = sync_any(!found);
  }
  // Says that this block has come to `value`. All threads of the block.
  __device__ void raise(int* flag, int64_t value) const {
    __syncthreads();
    if (threadIdx.x == 0 && !lost) store_release(flag, int(value));
  }

  // Of teams that are not clusters: what this block wrote for the others is ready; all have come.
  __device__ void arrive(int64_t step) const { raise(flags + rank, step); }
  __device__ void wait(int64_t step) const { wait_for(flags, step); }
};

// How a block of a cluster knows that all others' stores to its shared memory have come: two
// mbarriers in turn, for steps 1, 2, ..., count their bytes. Unlike a cluster's barrier this orders
// nothing else, and needs no fence of all memory.
//
// Why a buffer can be reused. Block A reads it at step s. Block B stores to it for step s + 2,
// after it has waited for all stores of step s + 1, A's among them. The PTX memory model does not
// order A's reads before B's store: the end of a st.async releases the stored bytes, and nothing
// that its thread did before. An arrival with release semantics would order them, at the price of a
// fence of all memory in every step. It is not needed:
//  - Only reads must come first, and a read is over when it has its value. Of A's writes, B needs
//    to see only the stores that it waits for.
//  - A __syncthreads lies between A's last read of the buffer and A's stores of step s + 1. PTX
//    guarantees that the reads of all threads of A are performed there. So they end before A's
//    stores are issued, which is before B's wait ends, which is before B stores.
// The emulator assumes just this: under ThreadSanitizer a st.async comes after what its block did
// before the last __syncthreads, and after nothing else.
struct Arrivals {
  Mbarrier* m;
  int bytes;  // of a step

  __device__ Mbarrier* of(int64_t step) const { return m + step % 2; }
  __device__ void begin() const {
    if (threadIdx.x > 0) return;
    for (int i = 0; i < 2; i++) mbarrier_init(m + i, 1);
    mbarrier_init_fence();
    for (int i = 0; i < 2; i++) mbarrier_arrive(m + i, bytes);
  }
  // All threads. The same mbarrier's next step is announced at once: its bytes come when every
  // block has all of the step between, for which this one has to send first.
  __device__ void wait(int64_t step) const {
    mbarrier_wait(of(step), int(step - 1) / 2 % 2);
    if (threadIdx.x == 0) mbarrier_arrive(of(step), bytes);
  }
};

}  // namespace fusedrnn
