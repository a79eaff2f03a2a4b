#include "torch/reserve.h"

#include <cstring>
#include <memory>

#include "cpu/run/scratch.h"

// Null in torch 2.10.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* made,
    int32_t layout, const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
    void (*deleter)(void* data, void* context), void* context);

namespace fusedrnn {
namespace {

constexpr int64_t kLeastPooled = 1 << 20;  // bytes; less has few pages

}  // namespace

Tensor make_reserve(const Tensor& like, int64_t rows, int64_t row) {
  const int64_t bytes = checked_product(rows, row);
  // Through the dispatcher: what is never written of it torch fills where it is told to.
  if (!torch_from_blob || !like.is_cpu() || bytes < kLeastPooled)
    return torch::stable::new_empty(like, {rows, row}, ScalarType::Byte);
  auto block = std::make_unique<ScratchPool::Block>(take_shared(bytes));
  if (poison_scratch()) std::memset(block->data, 0xFF, bytes);
  const int64_t sizes[] = {rows, row}, strides[] = {row, 1};
  AtenTensorHandle made;
  const AOTITorchError error = torch_from_blob(
      block->data, 2, sizes, strides, 0, aoti_torch_dtype_uint8(), aoti_torch_device_type_cpu(), -1,
      &made, aoti_torch_layout_strided(), nullptr, 0,
      [](void*, void* context) {
        const std::unique_ptr<ScratchPool::Block> owned(static_cast<ScratchPool::Block*>(context));
        give_shared(*owned);
      },
      block.get());
  block.release();  // even then: who knows whether the deleter ran
  FUSEDRNN_EXPECT_TORCH(error, "make a tensor of a reserve's memory");
  return Tensor(made);
}

}  // namespace fusedrnn
