// Patches in float32, one at a time: pixels of any dtype and strides in, planes [C, frames * height * width] out.
#pragma once
#include <cstdint>
#include <cstring>

#include "../common/dtype.h"
#include "../common/patches.h"
#include "buffer.h"
#include "vec.h"

namespace sslops {
namespace {

SSLOPS_INLINE F load_pixels(const void* base, DType dtype, int64_t index, int n) {
  if (dtype != DType::u8) return load_as_float(base, dtype, index, n);
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
  Bytes raw{};
  std::memcpy(&raw, static_cast<const uint8_t*>(base) + index, n);
  return __builtin_convertvector(__builtin_convertvector(raw, I), F);  // in one step it would be scalar
}

SSLOPS_INLINE void prefetch(const void* base, DType dtype, int64_t index) {
  const int64_t size = dtype == DType::f32 ? 4 : dtype == DType::u8 ? 1 : 2;
  __builtin_prefetch(static_cast<const char*>(base) + index * size);
}

// body(from, at, channel): where each row of a patch's pixels begins, from its corner and in planes.
template <typename Body>
SSLOPS_INLINE void for_each_row(const Patches p, const Body& body) {
  int64_t at = 0;
  for (int64_t c = 0; c < p.channels; ++c)
    for (int64_t frame = 0; frame < p.frames; ++frame) {
      int64_t from = c * p.channel_stride + frame * p.frame_stride;
      for (int64_t row = 0; row < p.height; ++row, from += p.row_stride, at += p.width) body(from, at, c);
    }
}

// kWidth: that of a patch where it is a constant, else 0. `next`: the corner of the patch that comes after; a patch's
// rows lie too far apart for the hardware to see what will be read, and asking for them is a fifth of the time.
template <DType kDType, typename T, int kWidth, bool kContiguous>
void load_planes(const void* images, const Patches& p, int64_t corner, int64_t next, float* planes) {
  const int64_t width = kWidth ? kWidth : p.width, ahead = next - corner;
  for_each_row(p, [&](int64_t row, int64_t at, int64_t) {
    const int64_t from = corner + row;
    prefetch(images, kDType, from + ahead);
    for_each_vector(width, [&](int64_t j, int lanes) {
      if constexpr (kContiguous)
        return store_lanes(planes + at + j, lanes, load_pixels(images, kDType, from + j, lanes));
      T raw[kLanes];
      for (int k = 0; k < lanes; ++k) raw[k] = static_cast<const T*>(images)[from + (j + k) * p.pixel_stride];
      store_lanes(planes + at + j, lanes, load_pixels(raw, kDType, 0, lanes));
    });
  });
}

template <DType kDType, typename T>
void load_planes(const void* images, const Patches& p, int64_t corner, int64_t next, float* planes) {
  if (p.pixel_stride != 1) return load_planes<kDType, T, 0, false>(images, p, corner, next, planes);
  if (p.width == 16) return load_planes<kDType, T, 16, true>(images, p, corner, next, planes);
  load_planes<kDType, T, 0, true>(images, p, corner, next, planes);
}

inline void load_planes(const void* images, DType dtype, const Patches& p, int64_t corner, int64_t next,
                        float* planes) {
  if (dtype == DType::f32) return load_planes<DType::f32, float>(images, p, corner, next, planes);
  if (dtype == DType::u8) return load_planes<DType::u8, uint8_t>(images, p, corner, next, planes);
  if (dtype == DType::bf16) return load_planes<DType::bf16, uint16_t>(images, p, corner, next, planes);
  load_planes<DType::f16, uint16_t>(images, p, corner, next, planes);
}

// factors [2, C]: each pixel times the first row, plus the second.
inline void scale_planes(float* planes, const Patches& p, const float* factors) {
  const int64_t area = patch_area(p);
  for (int64_t c = 0; c < p.channels; ++c, planes += area)
    for_each_vector(area, [&](int64_t j, int lanes) {
      const F v = load_lanes(planes + j, lanes, 0.f) * factors[c];
      store_lanes(planes + j, lanes, v + factors[p.channels + c]);
    });
}

// A constant number of channels lets the compiler shuffle vectors.
template <int64_t kChannels>
SSLOPS_INLINE void interleave(const float* __restrict planes, int64_t channels, int64_t area, float* __restrict out) {
  const int64_t n = kChannels ? kChannels : channels;
  for (int64_t k = 0; k < area; ++k)
    for (int64_t c = 0; c < n; ++c) out[k * n + c] = planes[c * area + k];
}

// Planes to `layout`: where they are, or in `out`.
inline const float* arrange(const float* planes, const Patches& p, Layout layout, float* out) {
  if (layout == Layout::chw || p.channels == 1) return planes;
  const auto ordered = p.channels == 3 ? interleave<3> : interleave<0>;
  ordered(planes, p.channels, patch_area(p), out);
  return out;
}

// And back.
inline const float* planes_of(const float* x, const Patches& p, Layout layout, float* out) {
  if (layout == Layout::chw || p.channels == 1) return x;
  const int64_t area = patch_area(p);
  for (int64_t c = 0; c < p.channels; ++c)
    for (int64_t k = 0; k < area; ++k) out[c * area + k] = x[k * p.channels + c];
  return out;
}

}  // namespace
}  // namespace sslops
