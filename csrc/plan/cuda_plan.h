// Which kernels run the recurrence of a call on a GPU, and how they divide it: a pure function of
// its shape and of the device.
#pragma once
#include <string>
#include <vector>

#include "plan/families.h"
#include "plan/persistent.h"

namespace fusedrnn {

enum class CudaBackend : int { kStepwise, kGrid, kCluster, kCount };
// What FUSEDRNN_PLAN calls them.
inline constexpr const char* kCudaBackendNames[] = {"stepwise", "grid", "cluster"};

struct DeviceSpec {
  int capability;  // 90 for 9.0
  int processors;
  int shared_bytes;  // that a block may ask for
  // How many clusters of so many blocks run at once, a block a processor; 0: none can.
  int clusters[kLargestCluster + 1];
  // Families that must not run on it: refused, or found wrong.
  Families struck;
};

struct CudaRequest {
  int64_t steps, batch;
  bool backward;
  bool tf32;             // float32 may be multiplied in TF32
  bool tangent = false;  // the derivative of that pass in one direction, which runs stepwise
  int64_t members = 1;   // weights that differ; row b of the batch has weights b % members
};

// What the estimate of a plan's time is made of.
struct CudaModel {
#define CONSTANT(name, value) double name = value;
#include "plan/cuda_model.inc"
#undef CONSTANT
};

struct CudaPlan {
  CudaBackend backend;
  int layers;  // that run in one go: several are stages of one persistent launch
  // Of persistent backends:
  Engine engine;
  PersistentShape shape;
  int slices;           // of the batch, all in all; the rows of one have the same weights
  int at_once;          // of one launch
  double microseconds;  // what the choice was made by; an estimate

  int launches() const { return (slices + at_once - 1) / at_once; }
};

Exchange exchange_of(const CudaPlan&);
Family family_of(const Problem&, const CudaRequest&, const CudaPlan&);

// The plan with the shortest estimate. `forced` is the value of FUSEDRNN_PLAN: the name of a
// backend, and after commas what else is not to be chosen, of units=, rows=, layers= and engine=; a
// part between semicolons that begins with forward: or backward: is for that direction. Null or
// empty: all is chosen. False, with a reason, where nothing that was asked for can run.
bool plan_cuda(const Problem&, const CudaRequest&, const DeviceSpec&, const char* forced, CudaPlan*,
               std::string* reason);

// Whether `forced` leaves less than everything open for a direction. Wrong words count as such.
bool forces(const char* forced, bool backward);

// All plans that can run, by their estimates. False, with a reason, where `forced` is wrong.
bool plans_cuda(const Problem&, const CudaRequest&, const DeviceSpec&, const char* forced,
                const CudaModel&, std::vector<CudaPlan>*, std::string* reason);

// What FUSEDRNN_PLAN has to be for just this plan.
std::string forcing(const CudaPlan&);

// The plan in words.
std::string describe(const CudaPlan&);

}  // namespace fusedrnn
