// The kernels in this binary, and those that a call gets on this processor.
#pragma once
#include "cpu/call.h"
#include "plan/inspection.h"

namespace fusedrnn {

// All in the binary, best first.
const InstalledVariant* installed_variants(int* count);

// This processor, with so many threads. Its first variant is the best that it runs, or the one that
// FUSEDRNN_CPU names; an exception where that cannot run. FUSEDRNN_THREADS=all divides even the
// smallest work, for tests.
CpuMachine this_machine(int64_t threads);

// The plan of a call on this machine, which may turn out to lack tiles.
CpuPlan plan_cpu_here(const Problem&, const CpuRequest&, CpuMachine*);

const Kernels& kernels_of(const CpuPlan&);

}  // namespace fusedrnn
