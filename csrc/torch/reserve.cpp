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

OptionalTensor make_pooled(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  constexpr size_t kMostDims = 3;
  constexpr int64_t kLeastBytes = 1 << 18;  // less has few pages
  FUSEDRNN_EXPECT(sizes.size() <= kMostDims, "fusedrnn: too many dimensions");
  int64_t bytes = type == ScalarType::Byte ? 1 : fusedrnn::bytes(dtype_of(type)),
          strides[kMostDims];
  const int64_t size = bytes;
  for (size_t i = sizes.size(); i-- > 0; bytes = checked_product(bytes, sizes[i]))
    strides[i] = bytes / size;
  if (!torch_from_blob || !like.is_cpu() || bytes < kLeastBytes) return std::nullopt;
  auto block = std::make_unique<ScratchPool::Block>(take_shared(bytes));
  if (poison_scratch()) std::memset(block->data, 0xFF, bytes);
  AtenTensorHandle made;
  const AOTITorchError error = torch_from_blob(
      block->data, sizes.size(), sizes.data(), strides, 0,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), -1, &made, aoti_torch_layout_strided(), nullptr, 0,
      [](void*, void* context) {
        const std::unique_ptr<ScratchPool::Block> owned(static_cast<ScratchPool::Block*>(context));
        give_shared(*owned);
      },
      block.get());
  block.release();  // even then: who knows whether the deleter ran
  FUSEDRNN_EXPECT_TORCH(error, "make a tensor of pooled memory");
  return Tensor(made);
}

}  // namespace fusedrnn
