// Tensors as Python hands them over.
#pragma once
#include <array>

#include "common/tensor.h"

namespace sslops {

template <size_t kDim>
struct Contiguous {
  std::array<int64_t, kDim> sizes, strides;
  Tensor tensor;

  // Without elements there is no address, as torch has it.
  Contiguous(DType dtype, int64_t item_size, const std::array<int64_t, kDim>& sizes, void* data = nullptr)
      : sizes(sizes), tensor{} {
    tensor.numel = 1;
    for (size_t k = kDim; k-- > 0; tensor.numel *= sizes[k]) strides[k] = tensor.numel;
    tensor.data = tensor.numel ? static_cast<char*>(data) : nullptr;
    tensor.dim = kDim;
    tensor.sizes = this->sizes.data();
    tensor.strides = strides.data();
    tensor.item_size = item_size;
    tensor.dtype = dtype;
  }
  Contiguous(const Contiguous&) = delete;
  operator Tensor() const { return tensor; }
};

}  // namespace sslops
