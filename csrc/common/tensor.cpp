#include "tensor.h"

#include <stdexcept>
#include <string>

#include "torch_symbol.h"

namespace sslops {
namespace {

// An at::Tensor is one pointer to its implementation, and a handle is the address of an at::Tensor.
using Handle = const uintptr_t*;

struct Torch {
  int32_t (*data_ptr)(Handle, void**);
  int32_t (*dtype)(Handle, int32_t*);
  int32_t (*layout)(Handle, int32_t*);
  int32_t (*device_type)(Handle, int32_t*);
  int32_t (*device_index)(Handle, int32_t*);
  int32_t (*numel)(Handle, int64_t*);
  int32_t (*dim)(Handle, int64_t*);
  int32_t (*sizes)(Handle, int64_t**);
  int32_t (*strides)(Handle, int64_t**);
  size_t (*element_size)(int32_t dtype);
  int32_t strided, complex64, complex128;
  int32_t dtypes[kDTypes];  // torch's codes, in the order of DType
};

template <typename Fn>
void find(const char* name, Fn& fn) {
  fn = reinterpret_cast<Fn>(torch_symbol(name));
  if (!fn) throw std::runtime_error(std::string("torch's library has no ") + name);
}

int32_t constant(const char* name) {
  int32_t (*get)();
  find(name, get);
  return get();
}

Torch find_torch() {
  Torch t;
  find("aoti_torch_get_data_ptr", t.data_ptr);
  find("aoti_torch_get_dtype", t.dtype);
  find("aoti_torch_get_layout", t.layout);
  find("aoti_torch_get_device_type", t.device_type);
  find("aoti_torch_get_device_index", t.device_index);
  find("aoti_torch_get_numel", t.numel);
  find("aoti_torch_get_dim", t.dim);
  find("aoti_torch_get_sizes", t.sizes);
  find("aoti_torch_get_strides", t.strides);
  find("aoti_torch_dtype_element_size", t.element_size);
  t.strided = constant("aoti_torch_layout_strided");
  t.complex64 = constant("aoti_torch_dtype_complex64");
  t.complex128 = constant("aoti_torch_dtype_complex128");
  constexpr const char* kNames[kDTypes] = {"float32", "float16", "bfloat16", "float64", "uint8",
                                           "int64",   "int32",   "int16",    "int8",    "bool"};
  for (int k = 0; k < kDTypes; ++k) t.dtypes[k] = constant((std::string("aoti_torch_dtype_") + kNames[k]).c_str());
  return t;
}

}  // namespace

Tensor read_tensor(uintptr_t impl) {
  static const Torch torch = find_torch();
  Tensor x{};
  int32_t layout;
  int64_t *sizes, *strides;
  void* data;
  if (torch.dtype(&impl, &x.torch_dtype) || torch.layout(&impl, &layout) || torch.device_type(&impl, &x.device_type) ||
      torch.device_index(&impl, &x.device_index) || torch.numel(&impl, &x.numel) || torch.dim(&impl, &x.dim) ||
      torch.sizes(&impl, &sizes))
    return {};
  x.sizes = sizes;
  if (layout == torch.strided && !torch.strides(&impl, &strides) && !torch.data_ptr(&impl, &data)) {
    x.strides = strides;
    x.data = static_cast<char*>(data);
  }
  x.item_size = torch.element_size(x.torch_dtype);
  x.dtype = DType::other;
  for (int k = 0; k < kDTypes; ++k)
    if (x.torch_dtype == torch.dtypes[k]) x.dtype = DType(k);
  x.floating = x.dtype <= DType::f64;
  x.complex = x.torch_dtype == torch.complex64 || x.torch_dtype == torch.complex128;
  return x;
}

}  // namespace sslops
