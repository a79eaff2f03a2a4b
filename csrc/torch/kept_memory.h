// Memory on the CPU that is reused from call to call: memory that is returned to the system costs a
// page fault for every page of the next call, which takes as long as small products.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <new>
#include <vector>

#include "torch/checks.h"
#include "torch/switches.h"

namespace fusedrnn {

// A pool of free blocks. Each block is a mapping of its own: pages that are evicted go back to the
// system, and cannot fragment malloc's heap. The pool holds little more than calls have recently
// used at one time, so that resident memory follows what the program needs.
class KeptMemory {
 public:
  struct Block {
    char* at;
    int64_t bytes;
    int64_t asked;  // of them, by the call that holds the block
  };

#ifdef __SANITIZE_ADDRESS__
  static constexpr int64_t kMostBytes = 0;  // AddressSanitizer has to see each block's end
#else
  static constexpr int64_t kMostBytes = 256 << 20;
#endif

  KeptMemory() { free_.reserve(kMostBlocks); }
  ~KeptMemory() {
    for (const Block& block : free_) unmap(block);
  }
  Block take(int64_t bytes) {
    if (bytes == 0) return {};
    auto best = free_.end();
    for (auto i = free_.begin(); i != free_.end(); ++i)  // larger blocks are left for larger needs
      if (i->bytes >= bytes && i->bytes / kLargestFit <= bytes &&
          (best == free_.end() || i->bytes < best->bytes))
        best = i;
    if (best == free_.end()) return fresh(bytes);
    const Block found{best->at, best->bytes, bytes};
    free_.erase(best), free_bytes_ -= found.bytes;
    used_ += bytes;
    return found;
  }
  void give(const Block& block) {
    if (block.bytes == 0) return;
    peak_ = std::max(peak_, used_.load(std::memory_order_relaxed));
    if (block.bytes > limit()) return release(block);
    used_ -= block.asked;
    free_.push_back(block), free_bytes_ += block.bytes;
    trim();
  }
  // Forgets the peak of the time before the last call of age().
  void age() {
    last_peak_ = peak_, peak_ = 0;
    trim();
  }

  // Without the pool's lists, from any thread.
  Block fresh(int64_t bytes) {
    const int64_t rounded = size_class(bytes);
    const Block block{map(rounded), rounded, bytes};
    STD_TORCH_CHECK(block.at, "fusedrnn: cannot allocate ", bytes, " bytes");
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

  // Four sizes for each power of two, so that lengths that differ a little share their blocks.
  static int64_t size_class(int64_t bytes) {
    int64_t step = kPage;
    if (bytes <= kMostBytes)
      step = std::max<int64_t>(step, std::bit_floor(uint64_t(bytes - 1)) / 4);
    return bytes > INT64_MAX - step ? bytes : (bytes + step - 1) / step * step;
  }

#ifdef __SANITIZE_ADDRESS__
  static char* map(int64_t bytes) {
    return static_cast<char*>(::operator new(bytes, std::align_val_t(kPage), std::nothrow));
  }
  static void unmap(const Block& block) { ::operator delete(block.at, std::align_val_t(kPage)); }
#else
  static char* map(int64_t bytes) {
    void* const at =
        mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return at == MAP_FAILED ? nullptr : static_cast<char*>(at);
  }
  static void unmap(const Block& block) { munmap(block.at, block.bytes); }
#endif

  // How much may be free.
  int64_t limit() const {
    const int64_t peak = std::max(peak_, last_peak_);
    return std::min(peak + peak / 4 + kSlack, kMostBytes);
  }
  void trim() {
    while (free_bytes_ > limit() || free_.size() == kMostBlocks) {
      free_bytes_ -= free_.front().bytes;  // unused for longest
      unmap(free_.front());
      free_.erase(free_.begin());
    }
  }

  std::vector<Block> free_;
  int64_t free_bytes_ = 0, peak_ = 0, last_peak_ = 0;  // peaks of used_ between calls of age()
  std::atomic<int64_t> used_{0};                       // that calls have asked for and hold
};

// The scratch memory of a thread's calls.
class ScratchPool : public KeptMemory {
 public:
  void give(const Block& block);  // also ages this pool, and that of reserves, every so often

 private:
  static constexpr int kWindow = 256;  // blocks
  int returned_ = 0;
};
inline thread_local ScratchPool scratch_pool;

// `count` parts of `bytes` each, in pages of their own, from what the calling thread keeps.
class ScratchMemory {
 public:
  ScratchMemory(int64_t count, int64_t bytes)
      : stride_((bytes + 4095) / 4096 * 4096), block_(scratch_pool.take(count * stride_)) {
    if (block_.at && poison_scratch()) std::memset(block_.at, 0xFF, count * stride_);
  }
  ~ScratchMemory() { scratch_pool.give(block_); }
  ScratchMemory(const ScratchMemory&) = delete;
  char* of(int64_t part = 0) const { return block_.at + part * stride_; }

 private:
  int64_t stride_;
  KeptMemory::Block block_;
};

// A reserve: bytes (rows, row) beside `like`. One of a megabyte and more on the CPU lies in memory
// that the process keeps, up to the same limit, where torch (from 2.11 on) takes it: it may die in
// another thread than it was made in.
Tensor make_reserve(const Tensor& like, int64_t rows, int64_t row);

}  // namespace fusedrnn
