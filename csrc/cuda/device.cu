#include <mutex>

#include "cuda/device.h"
#include "cuda/persistent/persistent.h"
#include "cuda/primitives.h"

namespace fusedrnn {

#if defined(__CUDACC__)
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

}  // namespace

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
    asked[device] = true;
  }
  *spec = known[device];
  return 0;
}
#else
// The one that the emulator plays.
int device_spec(DeviceSpec* spec) {
  *spec = {90, simt::kProcessors, int(simt::kSharedPerBlock), {}};
  for (int size = 1; size <= kLargestCluster; size++)
    spec->clusters[size] = clusters_at_once(size, spec->shared_bytes);
  return 0;
}
#endif

}  // namespace fusedrnn
