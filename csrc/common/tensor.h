// What a torch tensor is made of, asked of libtorch's C interface, which is stable across torch versions. Found in the
// process at run time, as the thread pool is: 20 ns a tensor, where Python needs 50 for each attribute.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace sslops {

struct Tensor {
  char* data;  // null for None and for tensors without memory of their own: empty, meta, fake, sparse
  int64_t numel, dim;
  const int64_t *sizes, *strides;  // [dim], torch's own: valid until the tensor changes; no strides: nothing to read
  int64_t item_size;
  int32_t device_type, device_index, torch_dtype;
  DType dtype;
  bool floating;  // dtype is a floating-point type
  bool complex;   // of two float32 or float64; dtype is `other`

  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data);
  }
  explicit operator bool() const { return data != nullptr; }
};

// A list of them.
struct Tensors {
  const Tensor* data;
  int64_t count;
};

// impl: the tensor's `_cdata` in Python. Throws std::runtime_error where libtorch lacks the interface.
Tensor read_tensor(uintptr_t impl);

}  // namespace sslops
