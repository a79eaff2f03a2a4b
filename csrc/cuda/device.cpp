// Compiled by nvcc, which knows where the runtime's header is, and by the emulator.
#include "cuda/device.h"

#if defined(__NVCC__)
#include <cuda_runtime_api.h>
#else
#include "emulator/simt.h"
#endif

#include <cstring>
#include <mutex>

#include "cuda/persistent/persistent.h"

namespace fusedrnn {

bool launch_was_refused(int error) {
  switch (error) {
    case 1:    // cudaErrorInvalidValue
    case 9:    // cudaErrorInvalidConfiguration
    case 98:   // cudaErrorInvalidDeviceFunction
    case 200:  // cudaErrorInvalidKernelImage
    case 209:  // cudaErrorNoKernelImageForDevice
    case 218:  // cudaErrorInvalidPtx
    case 221:  // cudaErrorJitCompilerNotFound
    case 222:  // cudaErrorUnsupportedPtxVersion
    case 223:  // cudaErrorJitCompilationDisabled
    case 701:  // cudaErrorLaunchOutOfResources
    case 720:  // cudaErrorCooperativeLaunchTooLarge
    case 800:  // cudaErrorNotPermitted
    case 801:  // cudaErrorNotSupported
    case 912:  // cudaErrorInvalidClusterSize
      return true;
    default:
      return false;
  }
}

#if defined(__NVCC__)
namespace {

int ask(int device, DeviceSpec* spec) {
  auto get = [&](cudaDeviceAttr attribute, int* value) {
    return cudaDeviceGetAttribute(value, attribute, device);
  };
  int major = 0, minor = 0, cooperative = 0, clusters = 0;
  cudaError_t error = get(cudaDevAttrComputeCapabilityMajor, &major);
  if (!error) error = get(cudaDevAttrComputeCapabilityMinor, &minor);
  if (!error) error = get(cudaDevAttrMultiProcessorCount, &spec->processors);
  if (!error) error = get(cudaDevAttrMaxSharedMemoryPerBlockOptin, &spec->shared_bytes);
  if (!error) error = get(cudaDevAttrCooperativeLaunch, &cooperative);
  if (!error) error = get(cudaDevAttrClusterLaunch, &clusters);
  if (error) return error;
  spec->capability = cooperative ? 10 * major + minor : 0;
  for (int size = 1; clusters && size <= kLargestCluster; size++)
    spec->clusters[size] = clusters_at_once(size, spec->shared_bytes);
  return 0;
}

int* words[kMostDevices];

// A graph that some thread captures does not mind memory that it knows nothing of.
int* allocate_word() {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaThreadExchangeStreamCaptureMode(&mode);
  void* word = nullptr;
  const unsigned flags = cudaHostAllocPortable | cudaHostAllocMapped;
  if (cudaHostAlloc(&word, sizeof(int), flags) != cudaSuccess) word = nullptr, cudaGetLastError();
  if (word) *static_cast<int*>(word) = 0;
  cudaThreadExchangeStreamCaptureMode(&mode);
  return static_cast<int*>(word);
}

// Of the current device: its word on the host.
int* host_word() {
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return cudaGetLastError(), nullptr;
  return device < kMostDevices ? words[device] : nullptr;
}

}  // namespace

int* lost_block_word() {
  int* const word = host_word();
  void* on_device = nullptr;
  if (word && cudaHostGetDevicePointer(&on_device, word, 0) != cudaSuccess) cudaGetLastError();
  return static_cast<int*>(on_device);
}
int take_lost_block() {
  int* const word = host_word();
  return word ? __atomic_exchange_n(word, 0, __ATOMIC_ACQUIRE) : 0;
}

int device_spec(DeviceSpec* spec) {
  static std::mutex mutex;
  static DeviceSpec known[kMostDevices];
  static bool asked[kMostDevices];
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (device >= kMostDevices) return cudaErrorInvalidDevice;
  const std::lock_guard<std::mutex> lock(mutex);
  if (!asked[device]) {
    if (const int error = ask(device, &known[device])) return error;
    words[device] = allocate_word();
    asked[device] = true;
  }
  *spec = known[device];
  return 0;
}

void library_versions(int* runtime, int* driver) {
  if (cudaRuntimeGetVersion(runtime) != cudaSuccess) *runtime = 0, cudaGetLastError();
  if (cudaDriverGetVersion(driver) != cudaSuccess) *driver = 0, cudaGetLastError();
}

bool is_capturing(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  const cudaError_t error = cudaStreamIsCapturing(static_cast<cudaStream_t>(stream), &status);
  if (error != cudaSuccess) cudaGetLastError();  // another stream's capture forbids to ask
  return error != cudaSuccess || status != cudaStreamCaptureStatusNone;
}
int fill_missing(void* data, int64_t bytes, void* stream) {
  return cudaMemsetAsync(data, 0xff, size_t(bytes), static_cast<cudaStream_t>(stream));
}
#else
bool is_capturing(void*) { return simt::capturing(); }
int fill_missing(void* data, int64_t bytes, void*) {
  memset(data, 0xff, size_t(bytes));
  return 0;
}

namespace {
int word = 0;
}  // namespace
int* lost_block_word() { return &word; }
int take_lost_block() { return __atomic_exchange_n(&word, 0, __ATOMIC_ACQUIRE); }

// The one that the emulator plays.
int device_spec(DeviceSpec* spec) {
  *spec = {90, simt::kProcessors, int(simt::kSharedPerBlock), {}, {}};
  for (int size = 1; size <= kLargestCluster; size++)
    spec->clusters[size] = clusters_at_once(size, spec->shared_bytes);
  return 0;
}
#endif

}  // namespace fusedrnn
