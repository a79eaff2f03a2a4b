// All that kernels use beyond plain CUDA C++: storage types, mathematics, the launch, and one
// wrapper for each raw instruction. Kernels are also compiled for the CPU and run there thread by
// thread (tests/emulator): each wrapper has a twin in emulator/primitives.h that does the same.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cells/common.h"

namespace fusedrnn {
// What a thread moves at once.
struct alignas(16) Words {
  uint32_t word[4];
};

// How long a thread has waited in vain: 10 seconds are enough, for no step takes a thousandth of
// that. A look at the clock adds at most a second: time in which the GPU served another process is
// no waiting.
struct Patience {
  uint64_t last = 0, waited = 0;  // nanoseconds

  FUSEDRNN_HD bool over(uint64_t now) {
    constexpr uint64_t kSecond = 1000000000;
    if (last) waited += now - last < kSecond ? now - last : kSecond;
    last = now;
    return waited >= 10 * kSecond;
  }
};
constexpr int kLooksAtFlag = 512, kLooksAtMbarrier = 16;  // between two looks at the clock
}  // namespace fusedrnn

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Instructions of sm_90 and later. Kernels that use them are in files that setup.py compiles for
// these GPUs; elsewhere they would trap, and are never launched.
#if __CUDA_ARCH__ >= 900
#define FUSEDRNN_SM90(...) asm volatile(__VA_ARGS__)
#else
#define FUSEDRNN_SM90(...) __trap()
#endif
// The same of sm_80: products of TF32, and of 16 bits with a depth of 16.
#if __CUDA_ARCH__ >= 800
#define FUSEDRNN_SM80(...) __VA_ARGS__
#else
#define FUSEDRNN_SM80(...) __trap()
#endif
// Whether this pass of the compiler is for a GPU that has them: a kernel that uses them needs no
// code for others.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FUSEDRNN_HAS_CLUSTERS 1
#else
#define FUSEDRNN_HAS_CLUSTERS 0
#endif
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define FUSEDRNN_HAS_TENSOR_CORES 1
#else
#define FUSEDRNN_HAS_TENSOR_CORES 0
#endif

// T* name: all dynamic shared memory of the block; T name[N]: static shared memory.
#define FUSEDRNN_DYNAMIC_SHARED(T, name)                        \
  extern __shared__ __align__(128) unsigned char name##_raw_[]; \
  T* name = reinterpret_cast<T*>(name##_raw_)
#define FUSEDRNN_STATIC_SHARED(T, name, N) __shared__ __align__(128) T name[N]

namespace fusedrnn {

using Float64 = double;
using Float32 = float;
using BFloat16 = __nv_bfloat16;
using Float16 = __half;

__device__ inline float to_compute(BFloat16 x) { return __bfloat162float(x); }
__device__ inline float to_compute(Float16 x) { return __half2float(x); }

__device__ inline uint32_t float_to_bits(float x) { return __float_as_uint(x); }
__device__ inline float bits_to_float(uint32_t x) { return __uint_as_float(x); }
// Without the branches that rounding correctly takes; 0 above 2^126.
__device__ inline float reciprocal(float x) { return __fdividef(1.f, x); }

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- barriers ----

// All threads of the cluster, in two halves: what was written before a thread arrives is seen, in
// global and in anyone's shared memory, by all that have waited. Every thread does both, in turn,
// and the lanes of a warp together.
__device__ inline void cluster_arrive() {
  FUSEDRNN_SM90("barrier.cluster.arrive.release.aligned;" :: : "memory");
}
__device__ inline void cluster_wait() {
  FUSEDRNN_SM90("barrier.cluster.wait.acquire.aligned;" :: : "memory");
}

// ---- the cluster ----

// Where block `rank` has what this block has at `mine`, in shared memory. A block must not be
// reached before it has begun nor after it has ended.
__device__ inline uint32_t cluster_address(const void* mine, int rank) {
  uint32_t theirs = 0;
  FUSEDRNN_SM90("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(theirs) : "r"(shared_address(mine)),
                "r"(rank));
  return theirs;
}

// ---- flags in global memory, seen by the whole GPU ----

// What a thread wrote before it releases is seen by whoever acquires what it released.
__device__ inline int load_acquire(const int* p) {
  int value;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(p) : "memory");
  return value;
}
__device__ inline void store_release(int* p, int value) {
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}

// The GPU's clock.
__device__ inline uint64_t nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  return now;
}

// ---- values in global memory that are their own flags, seen by the whole GPU ----

// A place is filled with kMissing before the launch, in which one thread stores to it once. Others
// look until they find something else, which is the value. Loads and stores are relaxed and order
// nothing: no fence. By PTX's memory model this is no race, and needs no more: both are strong, of
// the same scope, and overlap completely, as the 16 bytes of Words are four scalars of 4 bytes to
// the model, each a flag of its own. T is Words or has 4 or 2 bytes.
constexpr uint32_t kMissing = 0xffffffff;

template <class T>
__device__ inline T load_value(const T* p) {
  static_assert(sizeof(T) == 16 || sizeof(T) == 4 || sizeof(T) == 2);
  T value;
  if constexpr (sizeof(T) == 16) {
    asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.word[0]), "=r"(value.word[1]), "=r"(value.word[2]),
                   "=r"(value.word[3])
                 : "l"(p)
                 : "memory");
  } else if constexpr (sizeof(T) == 4) {
    uint32_t bits;
    asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(bits) : "l"(p) : "memory");
    memcpy(&value, &bits, 4);
  } else {
    uint16_t bits;
    asm volatile("ld.relaxed.gpu.global.b16 %0, [%1];" : "=h"(bits) : "l"(p) : "memory");
    memcpy(&value, &bits, 2);
  }
  return value;
}
// Of a value that is kMissing, or has a part of 4 bytes that is, another NaN is stored.
template <class T>
__device__ inline void store_value(T* p, T value) {
  static_assert(sizeof(T) == 16 || sizeof(T) == 4 || sizeof(T) == 2);
  auto other = [](uint32_t bits) { return bits == kMissing ? 0x7fffffff : bits; };
  if constexpr (sizeof(T) == 16) {
    asm volatile("st.relaxed.gpu.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p),
                 "r"(other(value.word[0])), "r"(other(value.word[1])), "r"(other(value.word[2])),
                 "r"(other(value.word[3]))
                 : "memory");
  } else if constexpr (sizeof(T) == 4) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(p), "r"(other(bits)) : "memory");
  } else {
    uint16_t bits;
    memcpy(&bits, &value, 2);
    if (bits == 0xffff) bits = 0x7fff;
    asm volatile("st.relaxed.gpu.global.b16 [%0], %1;" ::"l"(p), "h"(bits) : "memory");
  }
}
// Brings the place to the L2 cache, from which it may have gone since it was filled. Only a hint.
__device__ inline void prefetch(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}
// To memory of the host's.
__device__ inline void store_to_host(int* p, int value) {
  asm volatile("st.relaxed.sys.global.s32 [%0], %1;" ::"l"(p), "r"(value) : "memory");
}

// __syncthreads; whether any thread of the block has said yes.
__device__ inline bool sync_any(bool yes) { return __syncthreads_or(yes); }

// ---- global memory ----

// Stores 16 bytes, aligned, at once: of an assignment nvcc may make four stores.
__device__ inline void store_words(Words* global, const Words& w) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(w.word[0]),
               "r"(w.word[1]), "r"(w.word[2]), "r"(w.word[3])
               : "memory");
}

// ---- mbarriers: barriers in shared memory that count arrivals and bytes ----

// A phase ends when all arrivals have come, and all bytes that were announced; the next one begins
// at once. The first phase has parity 0. There are at most 2^20 - 1 arrivals, and as many bytes on
// their way. A block initialises, announces and waits in its own shared memory.
using Mbarrier = uint64_t;

__device__ inline void mbarrier_init(Mbarrier* m, int arrivals) {
  FUSEDRNN_SM90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(m)),
                "r"(arrivals) : "memory");
}
// After the initialisations, before the barrier that tells the cluster of them.
__device__ inline void mbarrier_init_fence() {
  FUSEDRNN_SM90("fence.mbarrier_init.release.cluster;" :: : "memory");
}
// Arrives, and announces `bytes` that stores will bring in this phase.
__device__ inline void mbarrier_arrive(Mbarrier* m, int bytes) {
  FUSEDRNN_SM90("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(m)),
                "r"(bytes) : "memory");
}
// True once the phase of this parity has ended; waits for that, but not for ever.
__device__ inline bool mbarrier_try_wait(Mbarrier* m, int parity) {
  uint32_t done = 0;
  FUSEDRNN_SM90(
      "{ .reg .pred p;\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p; }" : "=r"(done) : "r"(shared_address(m)),
      "r"(parity) : "memory");
  return done;
}

// The same until it has. One that has not for 10 seconds ends the launch, and with it all that the
// process does on this GPU, with an error: that is better than a program that hangs.
__device__ inline void mbarrier_wait(Mbarrier* m, int parity) {
  Patience patience;
  for (int looks = 1; !mbarrier_try_wait(m, parity); looks++)
    if (looks % kLooksAtMbarrier == 0 && patience.over(nanoseconds())) __trap();
}

// Stores 16 bytes, aligned, to where block `rank` has `mine`, and counts them where it has m. The
// cluster has two blocks or more. The store is seen by whoever waits for the bytes, and orders
// nothing else that this thread did: see Arrivals in persistent/team.h.
__device__ inline void store_async(Words* mine, const Words& w, Mbarrier* m, int rank) {
  FUSEDRNN_SM90(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(cluster_address(mine, rank)),
      "r"(w.word[0]), "r"(w.word[1]), "r"(w.word[2]), "r"(w.word[3]),
      "r"(cluster_address(m, rank)) : "memory");
}

// ---- matrix products of a warp, all 32 lanes together: d += a b ----

// With g = lane / 4 and t = lane % 4, of bfloat16 and float16 (K = 16; the lower half of a register
// is the first of two):
//   a[0], a[1]  row g, g + 8 of A at columns 2t, 2t + 1      a[2], a[3]  the same at columns + 8
//   b[0]        column g of B at rows 2t, 2t + 1             b[1]        the same at rows + 8
//   d[0], d[1]  row g of D at columns 2t, 2t + 1             d[2], d[3]  the same at row g + 8
// and of TF32 (K = 8), which is a float whose 13 lowest bits do not count:
//   a[0], a[1]  row g, g + 8 of A at column t                a[2], a[3]  the same at column t + 4
//   b[0]        column g of B at row t                       b[1]        the same at row t + 4
__device__ inline void mma(BFloat16, float (&d)[4], const uint32_t (&a)[4],
                           const uint32_t (&b)[2]) {
  FUSEDRNN_SM80(
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                   "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" : "+f"(d[0]),
                   "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),
                   "r"(b[0]), "r"(b[1])));
}
__device__ inline void mma(Float16, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  FUSEDRNN_SM80(
      asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                   "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" : "+f"(d[0]),
                   "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),
                   "r"(b[0]), "r"(b[1])));
}
__device__ inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  FUSEDRNN_SM80(
      asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                   "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" : "+f"(d[0]),
                   "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]),
                   "r"(b[0]), "r"(b[1])));
}
// The nearest TF32, ties away from zero, as a register of mma_tf32.
__device__ inline uint32_t to_tf32(float x) {
  uint32_t bits = 0;
  FUSEDRNN_SM80(asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x)));
  return bits;
}

}  // namespace fusedrnn
#else
#define FUSEDRNN_HAS_CLUSTERS 1
#define FUSEDRNN_HAS_TENSOR_CORES 1
#include "emulator/primitives.h"
#endif

namespace fusedrnn {

// ---- storage types, of the names in plan/dtypes.inc ----

// The type in which a storage type is computed.
template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

__device__ inline float to_compute(float x) { return x; }
__device__ inline double to_compute(double x) { return x; }

// Rounds to nearest even; NaN stays NaN and what is too large becomes infinity.
template <class S>
__device__ inline S from_compute(Compute<S> x) {
  return S(x);
}

// ---- waiting for what other blocks write to global memory ----

// Whether a value of global memory has come, all of it.
template <class T>
__device__ inline bool has_come(const T& value) {
  if constexpr (sizeof(T) == 16) {
    return value.word[0] != kMissing && value.word[1] != kMissing && value.word[2] != kMissing &&
           value.word[3] != kMissing;
  } else if constexpr (sizeof(T) == 4) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits != kMissing;
  } else {
    uint16_t bits;
    memcpy(&bits, &value, 2);
    return bits != uint16_t(kMissing);
  }
}

template <class T>
__device__ inline T missing() {
  T value;
  memset(&value, 0xff, sizeof value);
  return value;
}

// Both end with false, too late, where what they wait for has not come for 10 seconds or another
// block has waited so long, which `given_up` says once a value has come there.
//
// Looks at from[i * stride] for every values[i] that has not come, all at once and again, until all
// have. The caller sets those that it wants to missing(), or to what it has found there before.
template <class T, int N>
__device__ inline bool wait_for_values(T (&values)[N], const T* from, int64_t stride,
                                       const uint32_t* given_up) {
  Patience patience;
  for (int looks = 1;; looks++) {
    bool all = true;
#pragma unroll
    for (int i = 0; i < N; i++)
      if (!has_come(values[i])) values[i] = load_value(from + i * stride);
#pragma unroll
    for (int i = 0; i < N; i++) all &= has_come(values[i]);
    if (all) return true;
    if (looks % kLooksAtFlag == 0 &&
        (has_come(load_value(given_up)) || patience.over(nanoseconds())))
      return false;
  }
}
// Acquires a flag once it has come to `value`.
__device__ inline bool wait_until(const int* p, int value, const uint32_t* given_up) {
  Patience patience;
  for (int looks = 1; load_acquire(p) < value; looks++)
    if (looks % kLooksAtFlag == 0 &&
        (has_come(load_value(given_up)) || patience.over(nanoseconds())))
      return false;
#if !defined(__CUDACC__)
  simt::reached(p, value);
#endif
  return true;
}

// ---- mathematics of one value, for the cells ----

struct ScalarMath {
  // Good to some 3 ulp with CUDA's own functions; below -87, where the answer is under 1e-38, 0.
  static __device__ inline float sigmoid(float x) { return reciprocal(1 + expf(-x)); }
  static __device__ inline double sigmoid(double x) { return 1 / (1 + exp(-x)); }
  static __device__ inline float tanh(float x) { return tanhf(x); }
  static __device__ inline double tanh(double x) { return ::tanh(x); }
};

// ---- launch ----

constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

struct Grid {
  dim3 blocks, threads;
  int cluster = 1;          // blocks of a cluster, along x
  size_t shared_bytes = 0;  // dynamic shared memory of a block
  bool cooperative = false;
};

#if defined(__CUDACC__)
inline const char* error_name(int error) { return cudaGetErrorString(cudaError_t(error)); }

// Enqueues `kernel`; returns a cudaError_t, and leaves none behind for whoever asks next.
template <class... P, class... A>
int launch(void (*kernel)(P...), const Grid& grid, void* stream, const A&... args) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks;
  config.blockDim = grid.threads;
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  if (grid.cluster > 1) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim = {unsigned(grid.cluster), 1, 1};
  }
  if (grid.cooperative) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeCooperative;
    a.val.cooperative = 1;
  }
  cudaError_t error = cudaSuccess;
  // Above these a kernel has to ask: 48 KiB serve every GPU, clusters of 8 every GPU that has them.
  // What was asked for holds for launches of other threads too: so always the most there is.
  if (grid.shared_bytes > 48 * 1024) {
    int device = 0, most = 0;
    error = cudaGetDevice(&device);
    if (error == cudaSuccess)
      error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess)
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  }
  if (error == cudaSuccess && grid.cluster > 8)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, P(args)...);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

// How many clusters of `size` blocks of the kernel the current device has room for; 0: none.
template <class... P>
int at_once(void (*kernel)(P...), int size, dim3 threads, size_t shared_bytes) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(size), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(size));
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &attribute, config.numAttrs = 1;
  int count = 0;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
  if (error == cudaSuccess && size > 8)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
  if (error != cudaSuccess) cudaGetLastError(), count = 0;
  return count;
}
#else
inline const char* error_name(int) { return "emulated launch failure"; }

template <class... P, class... A>
int launch(void (*kernel)(P...), const Grid& grid, void*, const A&... args) {
  return simt::run({grid.blocks, grid.threads, grid.cluster, grid.shared_bytes, grid.cooperative},
                   [&] { kernel(P(args)...); });
}
template <class... P>
int at_once(void (*)(P...), int size, dim3, size_t) {
  return simt::kProcessors / size;
}
#endif

}  // namespace fusedrnn
