// Pixels of patches, one at a time.
#pragma once
#include "../common/patches.h"
#include "vector.cuh"

namespace sslops {

inline __device__ float pixel(const void* images, DType dtype, int64_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(images)[i];
  if (dtype == DType::u8) return static_cast<const uint8_t*>(images)[i];
  const uint16_t raw = static_cast<const uint16_t*>(images)[i];
  return dtype == DType::bf16 ? bf16_to_float(raw) : f16_to_float(raw);
}

inline __device__ void set_pixel(void* images, DType dtype, int64_t i, float x) {
  if (dtype == DType::f32)
    static_cast<float*>(images)[i] = x;
  else
    static_cast<uint16_t*>(images)[i] = dtype == DType::bf16 ? to_bf16(x) : to_f16(x);
}

}  // namespace sslops
