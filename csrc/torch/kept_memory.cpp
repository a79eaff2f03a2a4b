#include "torch/kept_memory.h"

#include <memory>
#include <mutex>

// Null in torch 2.10.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* made,
    int32_t layout, const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
    void (*deleter)(void* data, void* context), void* context);

namespace fusedrnn {
namespace {

using Block = KeptMemory::Block;

constexpr int64_t kLeastKept = 1 << 20;  // less has few pages

struct Shared {
  std::mutex mutex;
  KeptMemory memory;
};
Shared& shared() {
  static Shared& made = *new Shared;  // tensors may live on when the process ends
  return made;
}
// Nobody waits for the lock: in a child of fork it may be held by a thread that is not there.
Block take(int64_t bytes) {
  const std::unique_lock lock(shared().mutex, std::try_to_lock);
  return lock ? shared().memory.take(bytes) : shared().memory.fresh(bytes);
}
void give(const Block& block) {
  const std::unique_lock lock(shared().mutex, std::try_to_lock);
  return lock ? shared().memory.give(block) : shared().memory.release(block);
}

}  // namespace

void ScratchPool::give(const Block& block) {
  KeptMemory::give(block);
  if (++returned_ % kWindow) return;
  returned_ = 0;
  age();
  const std::unique_lock lock(shared().mutex, std::try_to_lock);
  if (lock) shared().memory.age();
}

Tensor make_reserve(const Tensor& like, int64_t rows, int64_t row) {
  const int64_t bytes = checked_product(rows, row);
  // Through the dispatcher: what is never written of it torch fills where it is told to.
  if (!torch_from_blob || !like.is_cpu() || bytes < kLeastKept)
    return torch::stable::new_empty(like, {rows, row}, ScalarType::Byte);
  auto block = std::make_unique<Block>(take(bytes));
  if (poison_scratch()) std::memset(block->at, 0xFF, bytes);
  const int64_t sizes[] = {rows, row}, strides[] = {row, 1};
  AtenTensorHandle made;
  const AOTITorchError error = torch_from_blob(
      block->at, 2, sizes, strides, 0, aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu(), -1,
      &made, aoti_torch_layout_strided(), nullptr, 0,
      [](void*, void* context) {
        const std::unique_ptr<Block> mine(static_cast<Block*>(context));
        give(*mine);
      },
      block.get());
  block.release();  // even then: who knows whether the deleter ran
  STABLE_TORCH_ERROR_CODE_CHECK(error);
  return Tensor(made);
}

}  // namespace fusedrnn
