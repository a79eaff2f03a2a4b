// Each program is right, and wrong in one way where p.bug says so: what the test looks for is that
// the right one passes under every order of threads, and that the wrong one is caught.
#include <cstring>

#include "cuda/primitives.h"
#include "emulator/programs.h"

namespace fusedrnn {
namespace {

template <class T>
__device__ inline const T* in(const void* p) {
  return static_cast<const T*>(p);
}
template <class T>
__device__ inline T* out(const Program& p) {
  return static_cast<T*>(p.out);
}

// ---- one block ----

// out = a reversed, through static shared memory. Bug: no barrier.
__global__ void reverse(const __grid_constant__ Program p) {
  FUSEDRNN_STATIC_SHARED(float, values, 256);
  const int i = threadIdx.x, n = blockDim.x;
  values[i] = in<float>(p.a)[i];
  if (!p.bug) __syncthreads();
  out<float>(p)[i] = values[n - 1 - i];
}

// The same, through dynamic shared memory. Bug: one element past its end.
__global__ void shared_overrun(const __grid_constant__ Program p) {
  FUSEDRNN_DYNAMIC_SHARED(float, values);
  const int i = threadIdx.x, n = blockDim.x;
  values[i + (p.bug ? 1 : 0)] = in<float>(p.a)[i];
  __syncthreads();
  out<float>(p)[i] = values[n - 1 - i];
}

// Every thread of every block its own element of out. Bug: no guard at the tail.
__global__ void global_overrun(const __grid_constant__ Program p) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (p.bug || i < p.shared_bytes) out<float>(p)[i] = in<float>(p.a)[0];
}

// The sum of a, by halves. Bug: the second half of the threads leaves at its first idle turn.
__global__ void early_exit(const __grid_constant__ Program p) {
  FUSEDRNN_DYNAMIC_SHARED(float, values);
  const int i = threadIdx.x;
  values[i] = in<float>(p.a)[i];
  for (int n = blockDim.x / 2; n > 0; n /= 2) {
    __syncthreads();
    if (i < n) values[i] += values[i + n];
    if (p.bug && i >= n) return;
  }
  if (i == 0) *out<float>(p) = values[0];
}

// Bug: the two halves of a block meet at two barriers that are not the same.
__global__ void divergent(const __grid_constant__ Program p) {
  if (p.bug) {
    if (threadIdx.x < blockDim.x / 2) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else {
    __syncthreads();
  }
  out<float>(p)[threadIdx.x] = 1;
}

// A warp makes numbers that another turns into results, two buffers in turn. Bug: nothing keeps the
// producer from filling a buffer that is still read.
__global__ void named_barriers(const __grid_constant__ Program p) {
  FUSEDRNN_STATIC_SHARED(float, buffer, 64);
  const int lane = threadIdx.x % 32, producer = threadIdx.x < 32;
  constexpr int kFull = 1, kEmpty = 3, kTurns = 6;
  for (int turn = 0; turn < kTurns; turn++) {
    const int b = turn % 2;
    if (producer) {
      if (turn >= 2 && !p.bug) sync_named(kEmpty + b, 64);
      buffer[32 * b + lane] = in<float>(p.a)[32 * turn + lane];
      arrive_named(kFull + b, 64);
    } else {
      sync_named(kFull + b, 64);
      out<float>(p)[32 * turn + lane] = 2 * buffer[32 * b + 31 - lane];
      if (turn + 2 < kTurns && !p.bug) arrive_named(kEmpty + b, 64);
    }
  }
}

// ---- one warp ----

// Rows of out: a of lane 5; of lane ^ 3; of the lane 4 up and down, of 16 lanes each; the sum of a
// to this lane. Bug: a lane that is not in the mask.
__global__ void shuffles(const __grid_constant__ Program p) {
  const int lane = threadIdx.x, n = blockDim.x;
  const unsigned mask = p.bug ? 0x7fffffffu : ~0u;
  const double a = in<double>(p.a)[lane];
  double* to = out<double>(p) + lane;
  to[0 * n] = __shfl_sync(mask, a, 5);
  to[1 * n] = __shfl_xor_sync(mask, a, 3);
  to[2 * n] = __shfl_up_sync(mask, a, 4, 16);
  to[3 * n] = __shfl_down_sync(mask, a, 4, 16);
  double sum = a;
  for (int by = 1; by < 32; by *= 2) {
    const double below = __shfl_up_sync(mask, sum, by);
    if (lane >= by) sum += below;
  }
  to[4 * n] = sum;
  // Only the even lanes.
  if (lane % 2 == 0) to[4 * n] += 0 * __shfl_xor_sync(0x55555555u, a, 2);
}

// Lanes hand values on through shared memory. Bug: a shuffle in place of __syncwarp orders nothing.
__global__ void warp_order(const __grid_constant__ Program p) {
  FUSEDRNN_STATIC_SHARED(float, values, 32);
  const int lane = threadIdx.x;
  values[lane] = in<float>(p.a)[lane];
  if (p.bug) {
    __shfl_sync(~0u, 0, 0);
  } else {
    __syncwarp();
  }
  out<float>(p)[lane] = values[31 - lane];
}

// out = a b + 1 for A [16, 16] by rows and B [16, 8] by columns. Bug: registers 1 and 2 of A change
// places, which is their order in some other instructions.
template <class S>
__global__ void product(const __grid_constant__ Program p) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  FUSEDRNN_STATIC_SHARED(S, rows, 16 * 16);
  for (int i = lane; i < 16 * 16; i += 32) rows[i] = in<S>(p.a)[i];
  __syncwarp();
  uint32_t a[4], b[2];
  load_matrices(a, &rows[(lane % 8 + lane / 8 % 2 * 8) * 16 + lane / 16 * 8]);
  for (int i = 0; i < 2; i++) memcpy(&b[i], in<S>(p.b) + g * 16 + 2 * t + 8 * i, 4);
  if (p.bug) {
    const uint32_t other = a[1];
    a[1] = a[2], a[2] = other;
  }
  float d[4] = {1, 1, 1, 1};
  mma(S{}, d, a, b);
  for (int i = 0; i < 4; i++) out<float>(p)[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}
// The same for A [16, 8] and B [8, 8] of floats. Bug: B by rows.
__global__ void product_tf32(const __grid_constant__ Program p) {
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  const float *A = in<float>(p.a), *B = in<float>(p.b);
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; i++) a[i] = to_tf32(A[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
  for (int i = 0; i < 2; i++) b[i] = to_tf32(p.bug ? B[(t + 4 * i) * 8 + g] : B[g * 8 + t + 4 * i]);
  float d[4] = {1, 1, 1, 1};
  mma_tf32(d, a, b);
  for (int i = 0; i < 4; i++) out<float>(p)[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}

// ---- late copies ----

// out = 2 a, four values a thread and turn, each turn's copied while the last one's are used.
// Bug: waits for one group too few.
__global__ void late_copy(const __grid_constant__ Program p) {
  FUSEDRNN_DYNAMIC_SHARED(float, buffer);
  const int n = 4 * blockDim.x, mine = 4 * threadIdx.x;
  constexpr int kTurns = 4;
  copy_async(buffer + mine, in<float>(p.a) + mine);
  copies_commit();
  for (int turn = 0; turn < kTurns; turn++) {
    if (turn + 1 < kTurns)
      copy_async(buffer + (turn + 1) % 2 * n + mine, in<float>(p.a) + (turn + 1) * n + mine);
    copies_commit();  // an empty group in the last turn, so that the count stays
    if (p.bug) {
      copies_wait<2>();
    } else {
      copies_wait<1>();
    }
    __syncthreads();
    // Another thread's: its copies are seen because of the barrier.
    const int other = n - 4 - mine;
    for (int i = 0; i < 4; i++)
      out<float>(p)[turn * n + other + i] = 2 * buffer[turn % 2 * n + other + i];
    __syncthreads();
  }
}

// The same with bulk copies and an mbarrier for each buffer. Bug: reads before it waits.
__global__ void bulk_copy(const __grid_constant__ Program p) {
  FUSEDRNN_DYNAMIC_SHARED(float, buffer);
  FUSEDRNN_STATIC_SHARED(Mbarrier, full, 2);
  const int n = blockDim.x, i = threadIdx.x;
  constexpr int kTurns = 4;
  auto fetch = [&](int turn) {
    mbarrier_arrive(&full[turn % 2], n * 4);
    copy_bulk(buffer + turn % 2 * n, in<float>(p.a) + turn * n, n * 4, &full[turn % 2]);
  };
  if (i == 0) {
    for (int b = 0; b < 2; b++) mbarrier_init(&full[b], 1);
    mbarrier_init_fence();
    fetch(0);
  }
  __syncthreads();
  for (int turn = 0; turn < kTurns; turn++) {
    if (i == 0 && turn + 1 < kTurns) fetch(turn + 1);
    if (p.bug) out<float>(p)[turn * n + i] = 2 * buffer[turn % 2 * n + i];
    while (!mbarrier_try_wait(&full[turn % 2], turn / 2 % 2)) {
    }
    if (!p.bug) out<float>(p)[turn * n + i] = 2 * buffer[turn % 2 * n + i];
    __syncthreads();
  }
}

// ---- clusters ----

// Each block writes a of its own to all blocks of its cluster, in turns that alternate between two
// buffers, and sums what it got. Bug: no barrier in the turns.
__global__ void cluster_turns(const __grid_constant__ Program p) {
  FUSEDRNN_DYNAMIC_SHARED(float, buffer);  // [2][blocks][threads]
  const int n = blockDim.x, i = threadIdx.x, blocks = cluster_size(), rank = cluster_rank();
  const float a = in<float>(p.a)[blockIdx.x * n + i];
  float sum = 0;
  cluster_arrive();
  cluster_wait();
  for (int turn = 0; turn < 4; turn++) {
    float* b = buffer + turn % 2 * blocks * n;
    for (int to = 0; to < blocks; to++) cluster_map(b, to)[rank * n + i] = a * (turn + 1);
    if (!p.bug) {
      cluster_arrive();
      cluster_wait();
    }
    for (int from = 0; from < blocks; from++) sum += b[from * n + n - 1 - i];
  }
  cluster_arrive();
  cluster_wait();
  out<float>(p)[blockIdx.x * n + i] = sum;
}

// Each block reads what the next one has. Bug: a block may end before it was read.
__global__ void cluster_end(const __grid_constant__ Program p) {
  FUSEDRNN_DYNAMIC_SHARED(float, values);
  const int n = blockDim.x, i = threadIdx.x;
  values[i] = in<float>(p.a)[blockIdx.x * n + i];
  cluster_arrive();
  cluster_wait();
  out<float>(p)[blockIdx.x * n + i] = cluster_map(values, (cluster_rank() + 1) % cluster_size())[i];
  if (!p.bug) {
    cluster_arrive();
    cluster_wait();
  }
}

// Each block sends a number to the next block, which waits for its bytes at an mbarrier; in the
// second turn the receiver says first, at the sender's mbarrier, that it has read. Bug: it does
// not.
__global__ void store_to_peer(const __grid_constant__ Program p) {
  FUSEDRNN_STATIC_SHARED(double, value, 64);
  FUSEDRNN_STATIC_SHARED(Mbarrier, full, 1);
  FUSEDRNN_STATIC_SHARED(Mbarrier, empty, 1);
  const int n = blockDim.x, i = threadIdx.x, size = cluster_size();
  const int next = (cluster_rank() + 1) % size, last = (cluster_rank() + size - 1) % size;
  if (i == 0) {
    mbarrier_init(full, n);
    mbarrier_init(empty, n);
    mbarrier_init_fence();
  }
  cluster_arrive();
  cluster_wait();
  for (int turn = 0; turn < 3; turn++) {
    if (turn && !p.bug)
      while (!mbarrier_try_wait(empty, (turn + 1) % 2)) {
      }
    mbarrier_arrive(full, 8);
    store_async(&value[i], in<double>(p.a)[blockIdx.x * n + i] + turn, full, next);
    while (!mbarrier_try_wait(full, turn % 2)) {
    }
    out<double>(p)[(turn * gridDim.x + blockIdx.x) * n + i] = value[n - 1 - i];
    mbarrier_arrive_at(empty, last);
  }
  cluster_arrive();
  cluster_wait();
}

// ---- the grid ----

// out[block] = the sum of a over all blocks. Bug: the launch is not cooperative (see the test).
__global__ void grid_barrier(const __grid_constant__ Program p) {
  float* parts = out<float>(p) + gridDim.x;
  if (threadIdx.x == 0) parts[blockIdx.x] = in<float>(p.a)[blockIdx.x];
  grid_sync();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (unsigned i = 0; i < gridDim.x; i++) sum += parts[i];
    out<float>(p)[blockIdx.x] = sum;
  }
}

// A chain: a block takes what the block before has released, and adds its own. Bug: it releases the
// flag before the value is written.
__global__ void flags(const __grid_constant__ Program p) {
  float* sums = out<float>(p);
  int* flag = reinterpret_cast<int*>(sums + gridDim.x);
  const unsigned b = blockIdx.x;
  if (threadIdx.x) return;
  if (p.bug) store_release(&flag[b], 1);
  if (b)
    while (!load_acquire(&flag[b - 1])) {
    }
  sums[b] = (b ? sums[b - 1] : 0) + in<float>(p.a)[b];
  if (!p.bug) add_release(&flag[b], 1);
}

// The first block copies, doubles and releases; the second one waits for its flag and passes on. So
// the copy has to come though someone is always busy with the flag. Bug: releases what it has not.
__global__ void copy_then_flag(const __grid_constant__ Program p) {
  FUSEDRNN_DYNAMIC_SHARED(float, buffer);
  FUSEDRNN_STATIC_SHARED(Mbarrier, full, 1);
  const int n = blockDim.x, i = threadIdx.x;
  float* to = out<float>(p);
  int* flag = reinterpret_cast<int*>(to + 2 * n);
  if (blockIdx.x == 0) {
    if (i == 0) {
      mbarrier_init(full, 1);
      mbarrier_init_fence();
      mbarrier_arrive(full, 4 * n);
      copy_bulk(buffer, p.a, 4 * n, full);
    }
    __syncthreads();
    if (p.bug && i == 0) store_release(flag, 1);
    while (!mbarrier_try_wait(full, 0)) {
    }
    to[i] = 2 * buffer[i];
    __syncthreads();
    if (i == 0) store_release(flag, 1);
  } else {
    while (!load_acquire(flag)) {
    }
    to[n + i] = to[i];
  }
}

// Bug: the last block never sets the flag that all others wait for.
__global__ void lost_flag(const __grid_constant__ Program p) {
  int* flag = out<int>(p);
  if (threadIdx.x) return;
  if (blockIdx.x + 1 == gridDim.x) {
    if (!p.bug) store_release(flag, 1);
  } else {
    while (!load_acquire(flag)) {
    }
  }
}

// Every block its own element. Bug: all the same one.
__global__ void apart(const __grid_constant__ Program p) {
  if (threadIdx.x == 0) out<float>(p)[p.bug ? 0 : blockIdx.x] = in<float>(p.a)[blockIdx.x];
}

// out: threadIdx, blockIdx and the dimensions of each thread, in three dimensions.
__global__ void coordinates(const __grid_constant__ Program p) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  int* to = out<int>(p) + 12 * (block * blockDim.x * blockDim.y * blockDim.z + thread);
  to[0] = threadIdx.x, to[1] = threadIdx.y, to[2] = threadIdx.z;
  to[3] = blockIdx.x, to[4] = blockIdx.y, to[5] = blockIdx.z;
  to[6] = blockDim.x, to[7] = blockDim.y, to[8] = blockDim.z;
  to[9] = gridDim.x, to[10] = gridDim.y, to[11] = gridDim.z;
}

// What a thread needs on its stack. Bug: more than it has.
__device__ int deep(int n, const int* p) {
  volatile char frame[4096];
  frame[n % 4096] = char(*p);
  return n ? deep(n - 1, p) + frame[n % 4096] : 0;
}
__global__ void stack(const __grid_constant__ Program p) {
  out<int>(p)[threadIdx.x] = deep(p.bug ? 15 : 2, in<int>(p.a));
}

struct Entry {
  const char* name;
  void (*kernel)(Program);
};
#define ENTRY(name) {#name, name}
const Entry kEntries[] = {
    ENTRY(reverse),
    ENTRY(shared_overrun),
    ENTRY(global_overrun),
    ENTRY(early_exit),
    ENTRY(divergent),
    ENTRY(named_barriers),
    ENTRY(shuffles),
    ENTRY(warp_order),
    ENTRY(late_copy),
    ENTRY(bulk_copy),
    ENTRY(cluster_turns),
    ENTRY(cluster_end),
    ENTRY(store_to_peer),
    ENTRY(grid_barrier),
    ENTRY(flags),
    ENTRY(lost_flag),
    ENTRY(apart),
    ENTRY(copy_then_flag),
    ENTRY(coordinates),
    ENTRY(stack),
    ENTRY(product_tf32),
    {"product_bf16", product<BFloat16>},
    {"product_fp16", product<Float16>},
};

}  // namespace

int program(const Program& p, void* stream) {
  for (const Entry& e : kEntries) {
    if (strcmp(e.name, p.name)) continue;
    Grid grid{dim3(unsigned(p.blocks)), dim3(unsigned(p.threads)), int(p.cluster),
              size_t(p.shared_bytes), p.cooperative};
    if (e.kernel == coordinates) grid.blocks = {2, 3, 2}, grid.threads = {3, 2, 4};
    if (e.kernel == global_overrun) grid.shared_bytes = 0;
    return launch(e.kernel, grid, stream, p);
  }
  return kInvalidValue;
}

}  // namespace fusedrnn
