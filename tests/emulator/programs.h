// Small kernels that show what the emulator does, and what it catches: tests/test_emulator.py.
#pragma once
#include <cstdint>

namespace fusedrnn {

// What the program `demands` does wrong: each breaks one demand that the PTX ISA has of a
// primitive.
enum class Fault : int64_t {
  kNone,
  kStoreInClusterOfOne,
  kStoreOutsideCluster,
  kStoreFromGlobal,
  kStoreMisaligned,
  kStoreUninitialised,
  kStoreUnfenced,
  kInitMisaligned,
  kInitInGlobal,
  kInitOfNoArrivals,
  kInitOfManyArrivals,
  kInitTwice,
  kArriveUninitialised,
  kArriveTwice,
  kExpectManyBytes,
  kWaitUninitialised,
  kWaitOddParity,
  kClusterArriveTwice,
  kClusterWaitAlone,
  kClusterArriveDivergent,
  kClusterWaitDivergent,
  kClusterArriveMissed,
  kMmaDivergent,
  kMmaMissed,
  kMmaOfFewLanes,
  kFlagInShared,
  kFlagMisaligned,
  kFlagReadInShared,
  kVectorInShared,
  kVectorMisaligned,
  kValueInShared,
  kValueMisaligned,
  kValueReadInShared,
  kValueReadMisaligned,
  kValueTwice,
  kPrefetchInShared,
  kHostWordInShared,
};

struct Program {
  const char* name;
  int64_t blocks, threads, cluster, shared_bytes;
  bool cooperative;
  int64_t bug;  // which of the faults that the program is there to show; 0: none
  const void *a, *b;
  void* out;
};

int program(const Program&, void* stream);

}  // namespace fusedrnn
