// Threads that take one task together, each with a share of the units, and meet after every step.
#pragma once
#include <atomic>
#include <cstdint>

namespace fusedrnn {

class Team;

// One thread's place in its team.
struct Member {
  Team* team = nullptr;
  int64_t index = 0, count = 1;
  int64_t met = 0;

  // Returns once all members have called it as often: what they wrote before can be read.
  void meet();
};

// A team has as many members as come in time. A thread pool may run two calls of a parallel loop
// one after the other on one thread, and the scheduler may let a thread wait for another process:
// who waited for a fixed number might wait for ever. Which units a member computes does not change
// a bit of them, so neither does their number.
class alignas(64) Team {
 public:
  // One thread's call for `places` of the `all` places; false: the others have begun without it.
  bool join(int64_t places, int64_t all, Member*);

 private:
  friend struct Member;
  static constexpr int64_t kClosed = int64_t(1) << 32;

  std::atomic<int64_t> members{0};  // and kClosed, once the first of them waits no longer
  std::atomic<int64_t> taken{0};    // places
  alignas(64) std::atomic<int64_t> meetings{0};  // calls of meet()
};

}  // namespace fusedrnn
