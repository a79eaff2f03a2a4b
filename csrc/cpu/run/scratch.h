// Memory on the CPU that is kept from call to call: given back, most of it would be unmapped, and
// clearing the pages of the next call takes as long as small products.
#pragma once
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

namespace fusedrnn {

// Whether FUSEDRNN_POISON=1 asks for memory full of NaN: for tests.
bool poison_scratch();

// Blocks that nobody uses at the moment, up to a limit.
class KeptMemory {
 public:
  struct Block {
    char* at;
    int64_t bytes;
  };

  KeptMemory() { free_.reserve(kMostBlocks); }
  ~KeptMemory() {
    for (const Block& block : free_) release(block);
  }
  Block take(int64_t bytes) {
    if (bytes == 0) return {nullptr, 0};
    auto best = free_.end();
    for (auto i = free_.begin(); i != free_.end(); ++i)  // not one that a larger need comes for
      if (i->bytes >= bytes && i->bytes <= 2 * bytes &&
          (best == free_.end() || i->bytes < best->bytes))
        best = i;
    if (best == free_.end()) return fresh(bytes);
    const Block found = *best;
    free_.erase(best), kept_ -= found.bytes;
    return found;
  }
  void give(const Block& block) {
    if (block.bytes == 0) return;
    if (block.bytes > kMostBytes) return release(block);
    while (kept_ + block.bytes > kMostBytes || free_.size() == kMostBlocks) {
      kept_ -= free_.front().bytes;  // not asked for longest
      release(free_.front());
      free_.erase(free_.begin());
    }
    free_.push_back(block), kept_ += block.bytes;
  }

  static Block fresh(int64_t bytes) {
    void* const at = ::operator new(bytes, kPage, std::nothrow);
    if (!at)
      throw std::runtime_error("fusedrnn: cannot allocate " + std::to_string(bytes) + " bytes");
    return {static_cast<char*>(at), bytes};
  }
  static void release(const Block& block) { ::operator delete(block.at, kPage); }

 private:
  static constexpr std::align_val_t kPage{4096};
#ifdef __SANITIZE_ADDRESS__
  static constexpr int64_t kMostBytes = 0;  // what overruns a block is to be seen
#else
  static constexpr int64_t kMostBytes = 256 << 20;
#endif
  static constexpr size_t kMostBlocks = 64;

  std::vector<Block> free_;
  int64_t kept_ = 0;
};
inline thread_local KeptMemory kept_memory;

// `count` parts of `bytes` each, in pages of their own, from what the calling thread keeps.
class ScratchMemory {
 public:
  ScratchMemory(int64_t count, int64_t bytes)
      : stride_((bytes + 4095) / 4096 * 4096), block_(kept_memory.take(count * stride_)) {
    if (block_.at && poison_scratch()) std::memset(block_.at, 0xFF, count * stride_);
  }
  ~ScratchMemory() { kept_memory.give(block_); }
  ScratchMemory(const ScratchMemory&) = delete;
  char* of(int64_t part = 0) const { return block_.at + part * stride_; }

 private:
  int64_t stride_;
  KeptMemory::Block block_;
};

}  // namespace fusedrnn
