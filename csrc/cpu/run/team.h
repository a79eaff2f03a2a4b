// Threads that take one task together, each with a share of the units, with a barrier at every
// step.
#pragma once
#include <atomic>
#include <cstdint>

#include "cpu/call.h"

namespace fusedrnn {

// A team has as many members as come in time. A thread pool may run two calls of a parallel loop
// one after the other on one thread, and the scheduler may let a thread wait for another process:
// who waited for a fixed number might wait for ever. Which units a member computes does not change
// a bit of them, so neither does their number.
class alignas(64) Team {
 public:
  // The patience of the first member: several times what a sleeping thread takes to wake.
  explicit Team(int64_t microseconds = 200) : patience(microseconds) {}

  // One thread's call for `places` of the `all` places; false: the others have begun without it.
  bool join(int64_t places, int64_t all, Member*);

 private:
  friend struct Member;
  static constexpr int64_t kClosed = int64_t(1) << 32;

  const int64_t patience;
  std::atomic<int64_t> members{0};  // and kClosed, once the first of them waits no longer
  std::atomic<int64_t> taken{0};    // places
  alignas(64) std::atomic<int64_t> arrivals{0};  // calls of barrier()
};

// Waits for `left`, whose last change is followed by notify_all(). Soon sleeps: an idle core then
// takes over a thread that waits for another process, and on that thread this one may be waiting.
void wait_for_zero(const std::atomic<int>& left);

}  // namespace fusedrnn
