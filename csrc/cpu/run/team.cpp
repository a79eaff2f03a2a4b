#include "cpu/run/team.h"

#include <chrono>
#include <thread>

namespace fusedrnn {
namespace {

// Looks before a waiting thread offers its core to others, one to three microseconds.
constexpr int kLooks = 200;

// The same of one that then goes to sleep: some tens of microseconds, about what waking it takes.
constexpr int kLooksAwake = 2000;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("isb");
#endif
}

// Calls done() until it is true.
template <class Done>
void wait_until(const Done& done) {
  for (int64_t look = 1; !done(); look++) {
    if (look % kLooks == 0) std::this_thread::yield();
    pause();
  }
}

}  // namespace

void wait_for_zero(const std::atomic<int>& left) {
  for (int look = 0; look < kLooksAwake; look++) {
    if (left.load(std::memory_order_acquire) == 0) return;
    pause();
  }
  for (int now; (now = left.load(std::memory_order_acquire)) != 0;) left.wait(now);
}

bool Team::join(int64_t places, int64_t all, Member* me) {
  int64_t before = members.load(std::memory_order_relaxed);
  do {
    if (before & kClosed) return false;
  } while (!members.compare_exchange_weak(before, before + 1, std::memory_order_relaxed));
  taken.fetch_add(places, std::memory_order_relaxed);
  if (before == 0) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(patience);
    wait_until([&] {
      return taken.load(std::memory_order_relaxed) == all || std::chrono::steady_clock::now() > end;
    });
    members.fetch_or(kClosed, std::memory_order_acq_rel);
  }
  wait_until([&] { return members.load(std::memory_order_acquire) & kClosed; });
  *me = {this, before, members.load(std::memory_order_relaxed) & ~kClosed};
  return true;
}

void Member::barrier() {
  if (count == 1) return;
  passed += count;
  team->arrivals.fetch_add(1, std::memory_order_acq_rel);
  wait_until([&] { return team->arrivals.load(std::memory_order_acquire) >= passed; });
}

}  // namespace fusedrnn
