#include "cpu/run/taken_core.h"

#include <algorithm>
#include <atomic>

namespace fusedrnn {
namespace {

using Clock = LoopClock::Clock;
using Duration = LoopClock::Duration;

// Several times what a sleeping thread takes to wake. Turns of the scheduler are milliseconds.
constexpr Duration kLongWait = std::chrono::microseconds(500);
// How often the other threads are tried again: waiting for them takes a tenth of the time.
constexpr int kTimesAlone = 10;
constexpr Duration kLongestAlone = std::chrono::seconds(1);

std::atomic<Clock::rep> alone_until{0};

}  // namespace

bool is_core_taken() {
  const Clock::rep until = alone_until.load(std::memory_order_relaxed);
  return until != 0 && Clock::now().time_since_epoch().count() < until;
}

void LoopClock::note(Duration shortest_share, Duration loop) {
  const Duration wait = loop - shortest_share;
  if (wait <= kLongWait || wait <= shortest_share) return;
  const Duration alone = std::min(kTimesAlone * wait, kLongestAlone);
  alone_until.store((Clock::now() + alone).time_since_epoch().count(), std::memory_order_relaxed);
}

}  // namespace fusedrnn
