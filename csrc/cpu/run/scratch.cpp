#include "cpu/run/scratch.h"

#include <atomic>
#include <cstdlib>
#include <mutex>

namespace fusedrnn {
namespace {

using Block = ScratchPool::Block;

// A mutex for which nobody waits. std::mutex::try_lock is a symbol of glibc 2.34, wheels want 2.28.
struct Flag {
  bool try_lock() { return !taken.test_and_set(std::memory_order_acquire); }
  void unlock() { taken.clear(std::memory_order_release); }
  std::atomic_flag taken;
};

struct Shared {
  Flag flag;
  ScratchPool pool;
};
Shared& shared() {
  static Shared& made = *new Shared;  // its blocks may live on when the process ends
  return made;
}

}  // namespace

bool poison_scratch() {
  const char* found = std::getenv("FUSEDRNN_POISON");
  return found && !std::strcmp(found, "1");
}

// Nobody waits for the lock: in a child of fork a thread that is not there may hold it.
Block take_shared(int64_t bytes) {
  const std::unique_lock lock(shared().flag, std::try_to_lock);
  return lock ? shared().pool.take(bytes) : shared().pool.fresh(bytes);
}
void give_shared(const Block& block) {
  const std::unique_lock lock(shared().flag, std::try_to_lock);
  return lock ? shared().pool.give(block) : shared().pool.release(block);
}

void ThreadScratchPool::give(const Block& block) {
  ScratchPool::give(block);
  if (++returned_ % kWindow) return;
  returned_ = 0;
  age();
  const std::unique_lock lock(shared().flag, std::try_to_lock);
  if (lock) shared().pool.age();
}

void release_scratch() {
  thread_scratch_pool.clear();
  const std::unique_lock lock(shared().flag, std::try_to_lock);
  if (lock) shared().pool.clear();
}

}  // namespace fusedrnn
