// Teams of threads as csrc/cpu/run/tasks.h uses them, for ThreadSanitizer, and the clock of loops.
#include "cpu/run/team.h"

#include <chrono>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu/run/taken_core.h"

namespace {

using fusedrnn::Member;
using fusedrnn::Team;

constexpr int kSteps = 500;

constexpr int64_t kLong = 60'000'000, kShort = 200;  // patience in us

// A recurrence: each member's next value is the sum of all members' last ones.
struct Work {
  Team team;

  explicit Work(int64_t patience) : team(patience) {}
  long values[2][16] = {};
  long wrong = 0, began = 0;

  // False if the team had begun without this call.
  bool take(int64_t places, int64_t all, bool skip_barrier = false) {
    Member me;
    if (!team.join(places, all, &me)) return false;
    values[0][me.index] = 1;
    me.barrier();
    long expected = 1;
    bool good = true;
    for (int step = 0; step < kSteps; step++) {
      long sum = 0;
      for (int64_t i = 0; i < me.count; i++) sum += values[step % 2][i] % 1000;
      expected = expected % 1000 * me.count;
      good = good && sum == expected;
      values[(step + 1) % 2][me.index] = sum;
      if (!skip_barrier) me.barrier();
    }
    if (me.index == 0) wrong += !good, began = me.count;
    return true;
  }
};

// `calls` threads take `places` each of `all`; how many members there were, or -1.
long run(int64_t calls, int64_t places, int64_t all, int64_t patience) {
  Work work(patience);
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < calls; i++) threads.emplace_back([&] { work.take(places, all); });
  for (std::thread& thread : threads) thread.join();
  return work.wrong ? -1 : work.began;
}

// Whether a core counts as taken after a loop in which one thread takes `share` for its share and
// another `loop`.
bool taken_after(std::chrono::microseconds share, std::chrono::microseconds loop) {
  fusedrnn::LoopClock clock;
  std::thread other([&] {
    std::this_thread::sleep_for(loop);
    clock.share_took(loop);
  });
  clock.share_took(share);
  other.join();
  clock.loop_ended();
  return fusedrnn::is_core_taken();
}

bool passes(const char* what) {
  using std::chrono::microseconds, std::chrono::milliseconds;
  if (!std::strcmp(what, "long shares")) return !taken_after(milliseconds(60), milliseconds(80));
  if (!std::strcmp(what, "taken")) {  // for ten times as long as the loop waited
    if (fusedrnn::is_core_taken() || !taken_after(microseconds(20), milliseconds(4))) return false;
    std::this_thread::sleep_for(milliseconds(1100));
    return !fusedrnn::is_core_taken();
  }
  if (!std::strcmp(what, "short wait")) {
    fusedrnn::LoopClock::note(microseconds(20), microseconds(300));
    return !fusedrnn::is_core_taken();
  }
  if (!std::strcmp(what, "all")) {
    for (int64_t n : {1, 2, 3, 7, 16})
      if (run(n, 1, n, kLong) != n) return false;
    return true;
  }
  if (!std::strcmp(what, "some")) {  // as many as come in time: never wrong, never stuck
    for (int i = 0; i < 100; i++)
      if (const long count = run(3, 1, 3, i); count < 1 || count > 3) return false;
    return true;
  }
  if (!std::strcmp(what, "serial")) return run(1, 5, 5, kLong) == 1;   // one thread has every place
  if (!std::strcmp(what, "absent")) return run(1, 1, 2, kShort) == 1;  // the other never comes
  if (!std::strcmp(what, "grouped")) return run(2, 3, 6, kLong) == 2;
  if (!std::strcmp(what, "late")) {
    Work work(kShort);
    return work.take(1, 2) && !work.take(1, 2) && !work.wrong;
  }
  if (!std::strcmp(what, "bug")) {
    Work work(kLong);
    std::thread other([&] { work.take(1, 2, true); });
    work.take(1, 2, true);
    other.join();
    return true;
  }
  return false;
}

}  // namespace

int main(int, char** argv) {
  const bool good = passes(argv[1]);
  std::printf("%s: %s\n", argv[1], good ? "good" : "wrong");
  return !good;
}
