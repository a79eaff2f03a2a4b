// Memory on the CPU that is reused from call to call: memory that is returned to the system costs a
// page fault for every page of the next call, which takes as long as small products.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <chrono>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace fusedrnn {

// Whether FUSEDRNN_POISON=1 asks for memory full of NaN: for tests.
bool poison_scratch();

// A pool of free blocks. Each block is a mapping of its own: pages that are evicted go back to the
// system, and cannot fragment malloc's heap. The pool holds little more than calls have recently
// used at one time, so that resident memory follows what the program needs.
class ScratchPool {
 public:
  struct Block {
    char* data;
    int64_t bytes;
    int64_t asked;  // of them, by the call that holds the block
  };

#ifdef __SANITIZE_ADDRESS__
  static constexpr int64_t kMostBytes = 0;  // AddressSanitizer has to see each block's end
#else
  static constexpr int64_t kMostBytes = 256 << 20;
#endif

  ScratchPool() { free_.reserve(kMostBlocks); }
  ~ScratchPool() { clear(); }
  Block take(int64_t bytes) {
    if (bytes == 0) return {};
    auto best = free_.end();
    for (auto i = free_.begin(); i != free_.end(); ++i)  // larger blocks are left for larger needs
      if (i->bytes >= bytes && i->bytes / kLargestFit <= bytes &&
          (best == free_.end() || i->bytes < best->bytes))
        best = i;
    if (best == free_.end()) return fresh(bytes);
    const Block found{best->data, best->bytes, bytes};
    free_.erase(best), free_bytes_ -= found.bytes;
    used_ += bytes;
    return found;
  }
  void give(const Block& block) {
    if (block.bytes == 0) return;
    peak_ = std::max(peak_, used_.load(std::memory_order_relaxed));
    used_ -= block.asked;
    if (block.bytes > limit()) return unmap(block);
    free_.push_back(block), free_bytes_ += block.bytes;
    trim();
  }
  // Forgets the peak of the time before the last age, unless that has just begun: hundreds of small
  // calls between two large ones take milliseconds.
  void age() {
    const auto now = std::chrono::steady_clock::now();
    if (now - aged_ < kShortestAge) return;
    aged_ = now;
    last_peak_ = peak_, peak_ = 0;
    trim();
  }

  // Returns all that is free to the system.
  void clear() {
    for (const Block& block : free_) unmap(block);
    free_.clear(), free_bytes_ = 0;
  }

  // Without the pool's lists, from any thread.
  Block fresh(int64_t bytes) {
    const int64_t rounded = size_class(bytes);
    const Block block{map(rounded), rounded, bytes};
    if (!block.data)
      throw std::runtime_error("fusedrnn: cannot allocate " + std::to_string(bytes) + " bytes");
    used_ += bytes;
    return block;
  }
  void release(const Block& block) {
    used_ -= block.asked;
    unmap(block);
  }

 private:
  static constexpr size_t kMostBlocks = 64;
  static constexpr int64_t kPage = 4096;
  static constexpr int64_t kLargestFit = 8;   // times what is asked for
  static constexpr int64_t kSlack = 4 << 20;  // for the blocks of other, smaller calls
  static constexpr std::chrono::milliseconds kShortestAge{250};

  // Four sizes for each power of two, so that lengths that differ a little share their blocks.
  static int64_t size_class(int64_t bytes) {
    if (kMostBytes == 0) return bytes;
    int64_t step = kPage;
    if (bytes <= kMostBytes)
      step = std::max<int64_t>(step, std::bit_floor(uint64_t(bytes - 1)) / 4);
    return bytes > INT64_MAX - step ? bytes : (bytes + step - 1) / step * step;
  }

#ifdef __SANITIZE_ADDRESS__
  static char* map(int64_t bytes) {
    return static_cast<char*>(::operator new(bytes, std::align_val_t(kPage), std::nothrow));
  }
  static void unmap(const Block& block) { ::operator delete(block.data, std::align_val_t(kPage)); }
#else
  static char* map(int64_t bytes) {
    void* const mapped =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return mapped == MAP_FAILED ? nullptr : static_cast<char*>(mapped);
  }
  static void unmap(const Block& block) { munmap(block.data, block.bytes); }
#endif

  // How much may be free, beside what calls hold.
  int64_t limit() const {
    const int64_t peak = std::max(peak_, last_peak_);
    return std::clamp<int64_t>(peak + peak / 4 + kSlack - used_, 0, kMostBytes);
  }
  void trim() {
    while (free_bytes_ > limit() || free_.size() == kMostBlocks) {
      free_bytes_ -= free_.front().bytes;  // unused for longest
      unmap(free_.front());
      free_.erase(free_.begin());
    }
  }

  std::vector<Block> free_;
  int64_t free_bytes_ = 0, peak_ = 0, last_peak_ = 0;  // peaks of used_ in this age and the last
  std::chrono::steady_clock::time_point aged_;
  std::atomic<int64_t> used_{0};  // that calls have asked for and hold
};

// The pool of all threads, for memory that may be returned by another thread than took it.
ScratchPool::Block take_shared(int64_t bytes);
void give_shared(const ScratchPool::Block&);

// The pool of one thread's calls.
class ThreadScratchPool : public ScratchPool {
 public:
  void give(const Block& block);  // also ages this pool, and the shared one, every so often

 private:
  static constexpr int kWindow = 256;  // blocks
  int returned_ = 0;
};
inline thread_local ThreadScratchPool thread_scratch_pool;

// `count` parts of `bytes` each, in pages of their own, from the calling thread's pool.
class ScratchMemory {
 public:
  ScratchMemory(int64_t count, int64_t bytes)
      : stride_((bytes + 4095) / 4096 * 4096), block_(thread_scratch_pool.take(count * stride_)) {
    if (block_.data && poison_scratch()) std::memset(block_.data, 0xFF, count * stride_);
  }
  ~ScratchMemory() { thread_scratch_pool.give(block_); }
  ScratchMemory(const ScratchMemory&) = delete;
  char* data(int64_t part = 0) const { return block_.data + part * stride_; }

 private:
  int64_t stride_;
  ScratchPool::Block block_;
};

// Returns to the system what is free in the pools of the process and of the calling thread.
void release_scratch();

}  // namespace fusedrnn
