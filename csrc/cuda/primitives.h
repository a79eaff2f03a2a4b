// All that kernels use beyond plain CUDA C++: storage types, mathematics, the launch, and one wrapper
// for each raw instruction. Kernels are also compiled for the CPU and run there thread by thread
// (tests/emulator): each name below has a twin in emulator/primitives.h that does the same.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace fusedrnn {
using BFloat16 = __nv_bfloat16;
using Float16 = __half;

__device__ inline float to_compute(BFloat16 x) { return __bfloat162float(x); }
__device__ inline float to_compute(Float16 x) { return __half2float(x); }
}  // namespace fusedrnn
#else
#include "emulator/primitives.h"
#endif

namespace fusedrnn {

// ---- storage types: float, double, BFloat16, Float16 ----

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

// ---- mathematics of one value, for the cells ----

struct ScalarMath {
  // Good to 2 ulp with CUDA's own functions. exp overflows only where 1 / inf = 0 is the answer.
  static __device__ inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }
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
  if (grid.shared_bytes > 48 * 1024)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(grid.shared_bytes));
  if (error == cudaSuccess && grid.cluster > 8)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, P(args)...);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}
#else
template <class... P, class... A>
int launch(void (*kernel)(P...), const Grid& grid, void*, const A&... args) {
  return simt::run({grid.blocks, grid.threads, grid.cluster, grid.shared_bytes, grid.cooperative},
                   [&] { kernel(P(args)...); });
}
#endif

}  // namespace fusedrnn
