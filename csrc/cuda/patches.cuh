// Pixels of patches: where they are, found without a division, and one at a time.
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

// n / by for n < 2^31 as (n + n factor / 2^32) / 2^shift (Granlund and Montgomery, 1994).
struct Divisor {
  uint32_t by, factor, shift;
};

inline Divisor divisor(int64_t by) {
  uint32_t shift = 0;
  while (int64_t{1} << shift < by) ++shift;
  const uint64_t short_of = (uint64_t{1} << shift) - by;
  return {static_cast<uint32_t>(by), static_cast<uint32_t>((short_of << 32) / by + 1), shift};
}

inline __device__ uint32_t divided(uint32_t n, const Divisor& d) {
  return (static_cast<uint32_t>(uint64_t{n} * d.factor >> 32) + n) >> d.shift;
}

struct Divisors {
  Divisor area, channels, width, height;
};

inline Divisors divisors(const Patches& p) {
  return {divisor(patch_area(p)), divisor(p.channels), divisor(p.width), divisor(p.height)};
}

// From value e of a patch in `layout` on to the next ones: the channel, and where the pixel is from the corner.
struct Walk {
  uint32_t channel, column, row, frame;
  int64_t offset;

  __device__ Walk(const Patches& p, const Divisors& by, Layout layout, uint32_t e) {
    const uint32_t part = divided(e, layout == Layout::chw ? by.area : by.channels);
    channel = layout == Layout::chw ? part : e - part * by.channels.by;
    const uint32_t pixel = layout == Layout::chw ? e - part * by.area.by : part;
    const uint32_t line = divided(pixel, by.width);
    column = pixel - line * by.width.by;
    frame = divided(line, by.height);
    row = line - frame * by.height.by;
    offset = channel * p.channel_stride + frame * p.frame_stride + row * p.row_stride + column * p.pixel_stride;
  }

  __device__ void next(const Patches& p, Layout layout) {
    if (layout == Layout::hwc) {
      offset += p.channel_stride;
      if (++channel < p.channels) return;
      channel = 0;
      offset -= p.channels * p.channel_stride;
    }
    offset += p.pixel_stride;
    if (++column < p.width) return;
    column = 0;
    offset += p.row_stride - p.width * p.pixel_stride;
    if (++row < p.height) return;
    row = 0;
    offset += p.frame_stride - p.height * p.row_stride;
    if (++frame < p.frames || layout == Layout::hwc) return;
    frame = 0;
    ++channel;
    offset += p.channel_stride - p.frames * p.frame_stride;
  }
};

inline __device__ float scaled(const Factors& f, float x, int64_t channel) {
  return f.used ? x * f.scale[channel] + f.shift[channel] : x;
}

inline __device__ float to_float(float x, DType) { return x; }
inline __device__ float to_float(uint8_t x, DType) { return x; }
inline __device__ float to_float(uint16_t x, DType dtype) {
  return dtype == DType::bf16 ? bf16_to_float(x) : f16_to_float(x);
}

inline __device__ float pixel(const void* images, DType dtype, int64_t i) {
  if (dtype == DType::f32) return static_cast<const float*>(images)[i];
  if (dtype == DType::u8) return static_cast<const uint8_t*>(images)[i];
  return to_float(static_cast<const uint16_t*>(images)[i], dtype);
}

inline __device__ void set_pixel(void* images, DType dtype, int64_t i, float x) {
  if (dtype == DType::f32)
    static_cast<float*>(images)[i] = x;
  else
    static_cast<uint16_t*>(images)[i] = dtype == DType::bf16 ? to_bf16(x) : to_f16(x);
}

}  // namespace sslops
