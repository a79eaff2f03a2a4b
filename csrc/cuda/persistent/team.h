// A team of blocks: who they are, and how they wait for each other.
//
// Blocks of a cluster store into each other's shared memory and count what has come. Those of other
// teams write to global memory. Forward, and from stage to stage in all teams, every value has a
// place of its own and is its own flag (primitives.h). Backward, places are written again every two
// steps, and a flag for each block counts its steps. A team of one block exchanges nothing, and is
// never a cluster: st.async requires two blocks.
#pragma once
#include "cuda/persistent/persistent.h"
#include "cuda/primitives.h"

namespace fusedrnn {

template <bool kCluster>
struct Team {
  int rank, size;
  int64_t index, slice;  // of the team; of its rows, among those of their member
  int64_t member = 0;
  int stage;
  int* flags;  // of the team's blocks
  // A value that comes once a block of the launch has waited too long for another; and where the
  // host looks.
  uint32_t* given_up;
  int* tell_host;
  int launch_code;
  // Whether this thread has given up: it waits for no other block any more, raises no flag, and
  // whatever it computes is NaN. After agree() and wait_for() all threads of the block have.
  mutable bool lost = false;

  __device__ explicit Team(const Persistent& p)
      : size(p.shape.team), tell_host(p.tell_host), launch_code(p.launch_code) {
    index = int64_t(blockIdx.x) / size, rank = int(blockIdx.x % size);
    stage = int(index / p.slices), slice = p.first_slice + index % p.slices;
    if (p.members > 1) member = slice % p.members, slice /= p.members;
    flags = p.flags + index * size;
    given_up = reinterpret_cast<uint32_t*>(p.flags) + p.flag_count() - 1;
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
  __device__ void give_up() const {
    lost = true;
    store_value(given_up, uint32_t(1));
    if (tell_host) store_to_host(tell_host, launch_code);
  }
  // As wait_for_values(). Of a thread that has given up, what is missing stays NaN.
  template <class T, int N>
  __device__ void await(T (&values)[N], const T* from, int64_t stride) const {
    if (!lost && !wait_for_values(values, from, stride, given_up)) give_up();
  }
  // __syncthreads; a thread that has given up stands for all.
  __device__ void agree() const { lost = sync_any(lost); }

  // Backward, of teams that are not clusters. All threads of the block.
  //
  // What this block wrote for the others in a step is ready.
  __device__ void arrive(int64_t step) const {
    __syncthreads();
    if (threadIdx.x == 0 && !lost) store_release(flags + rank, int(step));
  }
  // All have come to a step: what they wrote before is seen by all threads afterwards.
  __device__ void wait(int64_t step) const {
    for (int i = threadIdx.x; i < size && !lost; i += kPersistentThreads)
      if (!wait_until(flags + i, int(step), given_up)) give_up();
    agree();
  }
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
