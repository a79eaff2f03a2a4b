// Whether another process has taken the core of one of our threads. Threads that meet at every step
// of a few microseconds then wait milliseconds, until the scheduler gives the core back.
#pragma once
#include <atomic>
#include <chrono>
#include <cstdint>

namespace fusedrnn {

// Whether that happened so recently that the calling thread should work alone.
bool is_core_taken();

// Notes where a parallel loop takes much longer than a thread's share, which are about equal.
class LoopClock {
 public:
  using Clock = std::chrono::steady_clock;
  using Time = Clock::time_point;
  using Duration = Clock::duration;
  static Time now() { return Clock::now(); }

  // By each thread.
  void share_took(Duration time) {
    Duration::rep before = shortest_.load(std::memory_order_relaxed);
    while (time.count() < before &&
           !shortest_.compare_exchange_weak(before, time.count(), std::memory_order_relaxed)) {
    }
  }
  void loop_ended() const { note(Duration(shortest_.load()), now() - begin_); }

  static void note(Duration shortest_share, Duration loop);

 private:
  const Time begin_ = now();
  std::atomic<Duration::rep> shortest_{Duration::max().count()};
};

}  // namespace fusedrnn
