// Pixels of patches, one at a time.
#pragma once
#include <stdexcept>
#include <string>

#include "../common/patches.h"
#include "vector.cuh"

namespace sslops {

constexpr int kMaxChannels = 16;  // with factors: they travel as kernel arguments

// A pixel times `scale` plus `shift`, each of its channel.
struct Factors {
  bool used;
  float scale[kMaxChannels], shift[kMaxChannels];
};

// Of factors [2, C] on the host, or None.
inline Factors packed(const char* op, const Tensor& factors) {
  Factors f{bool(factors), {}, {}};
  if (!f.used) return f;
  const int64_t channels = factors.sizes[1];
  if (channels > kMaxChannels)
    throw std::invalid_argument(op + std::string(": mean, std: wanted at most ") + std::to_string(kMaxChannels) +
                                " channels, got " + std::to_string(channels));
  for (int64_t c = 0; c < channels; ++c) {
    f.scale[c] = factors.as<float>()[c];
    f.shift[c] = factors.as<float>()[channels + c];
  }
  return f;
}

inline __device__ float scaled(const Factors& f, float x, int64_t channel) {
  return f.used ? x * f.scale[channel] + f.shift[channel] : x;
}

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
