// Runs of elements between memory and registers, 16 bytes at a time where the address allows it.
#pragma once
#ifdef __CUDACC__
#include <cuda_fp16.h>
#endif

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/bits.h"
#include "../common/dtype.h"
#include "launch.cuh"

namespace sslops {

inline __device__ float bf16_to_float(uint16_t h) { return from_bits(uint32_t{h} << 16); }
inline __device__ float f16_to_float(uint16_t h) { return __half2float(__ushort_as_half(h)); }
inline __device__ uint16_t to_f16(float x) { return __half_as_ushort(__float2half_rn(x)); }

// The next `size` elements of a tensor, of which n are there: one access, or 16 bytes at a time, where all are and the
// address allows it.
template <typename T, int size>
using Access = std::conditional_t<size * sizeof(T) == 8, uint2, uint4>;

template <typename T, int size>
__device__ bool at_once(const T* p, int n) {
  return n == size && reinterpret_cast<uintptr_t>(p) % sizeof(Access<T, size>) == 0;
}

template <typename T, int size>
__device__ void load(const void* base, int64_t i, int n, T (&out)[size]) {
  using Wide = Access<T, size>;
  constexpr int count = size * sizeof(T) / sizeof(Wide);
  const T* const p = static_cast<const T*>(base) + i;
  if (at_once<T, size>(p, n)) {
    Wide wide[count];
    for (int k = 0; k < count; ++k) wide[k] = reinterpret_cast<const Wide*>(p)[k];
    memcpy(out, wide, sizeof out);
  } else {
    for (int k = 0; k < size; ++k) out[k] = k < n ? p[k] : T{};
  }
}

template <typename T, int size>
__device__ void store(void* base, int64_t i, int n, const T (&in)[size]) {
  using Wide = Access<T, size>;
  constexpr int count = size * sizeof(T) / sizeof(Wide);
  T* const p = static_cast<T*>(base) + i;
  if (at_once<T, size>(p, n)) {
    Wide wide[count];
    memcpy(wide, in, sizeof in);
    for (int k = 0; k < count; ++k) reinterpret_cast<Wide*>(p)[k] = wide[k];
  } else {
    for (int k = 0; k < size; ++k)
      if (k < n) p[k] = in[k];
  }
}

template <typename A, int size>
__device__ void read(const void* base, DType dtype, int64_t i, int n, A (&out)[size]) {
  if (dtype == DType::f32) {
    float raw[size];
    load(base, i, n, raw);
    for (int k = 0; k < size; ++k) out[k] = raw[k];
  } else if (dtype == DType::f64) {
    double raw[size];
    load(base, i, n, raw);
    for (int k = 0; k < size; ++k) out[k] = static_cast<A>(raw[k]);
  } else {
    uint16_t raw[size];
    load(base, i, n, raw);
    for (int k = 0; k < size; ++k) out[k] = dtype == DType::bf16 ? bf16_to_float(raw[k]) : f16_to_float(raw[k]);
  }
}

template <int size>
__device__ void write_half(void* base, DType dtype, int64_t i, int n, const float (&in)[size]) {
  uint16_t raw[size];
  for (int k = 0; k < size; ++k) raw[k] = dtype == DType::bf16 ? to_bf16(in[k]) : to_f16(in[k]);
  store(base, i, n, raw);
}

template <int size>
__device__ void write(void* base, DType dtype, int64_t i, int n, const float (&in)[size]) {
  dtype == DType::f32 ? store(base, i, n, in) : write_half(base, dtype, i, n, in);
}

}  // namespace sslops
