// The momentum update, target <- m target + (1 - m) source: the work's description and the arithmetic, for every
// device.
#pragma once
#include <cstdint>

#include "bits.h"
#include "dtype.h"
#include "host_device.h"
#include "philox.h"

namespace sslops::ema_update {

constexpr int64_t kChunk = 16384;  // elements of one tensor that one CUDA block takes; CPU threads take runs of chunks
constexpr int kGroup = 8;          // elements that share a Philox block

// A pair of tensors whose elements lie in memory in the same order.
struct Row {
  void* target;
  const void* source;
  void* shadow;  // gets the new target in shadow_dtype too, or null
  int64_t numel, first_chunk;
  DType target_dtype, source_dtype, shadow_dtype;
  bool copied;  // whatever the momentum: `numel` bytes of the source replace the target's
};

SSLOPS_HOST_DEVICE int64_t chunks(const Row& row) { return (row.numel + kChunk - 1) / kChunk; }

// Bits for the stochastic rounding of elements 8 g .. 8 g + 7 of the whole table: 16 for each.
SSLOPS_HOST_DEVICE Random4 noise(uint64_t seed, uint64_t group) {
  return philox(seed, group, RandomStream::ema_update);
}
SSLOPS_HOST_DEVICE uint32_t noise_of(const Random4& r, int k) { return r.word[k / 2] >> (k % 2 * 16) & 0xffffu; }

// m t + (1 - m) s as a step from the nearer end, near + w (far - near) with w <= 1/2. The weights then add up to one
// exactly (m and 1 - m, each rounded, would not: a bias of 1e-5 of the average at m = 0.999 in float32), t = s is a
// fixed point, and the step is the only thing rounded besides the result. w = 0 (m = 0 or 1) is a copy whatever the far
// end is; of a target itself nothing needs to be written, which leaves it every bit, a NaN's too.
template <typename A>
struct Blend {
  bool from_source;
  A weight;
};

template <typename A>
SSLOPS_HOST_DEVICE bool keeps_target(Blend<A> b) {
  return b.weight == A{0} && !b.from_source;
}

template <typename A>
SSLOPS_HOST_DEVICE Blend<A> blend(double m) {
  // Values on a device are not checked: they are clamped to [0, 1], and NaN stays NaN.
  m = m < 0. ? 0. : m > 1. ? 1. : m;
  const bool from_source = m < 0.5;
  return {from_source, static_cast<A>(from_source ? m : 1. - m)};
}

SSLOPS_HOST_DEVICE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
SSLOPS_HOST_DEVICE double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }

template <typename A>
SSLOPS_HOST_DEVICE A apply(Blend<A> b, A target, A source) {
  const A near = b.from_source ? source : target, far = b.from_source ? target : source, difference = far - near;
  // The weighted sum where there is no difference: infinities have none, nor have ends that are too far apart. By
  // masks: of a condition, compilers make branches that they cannot vectorise.
  const auto inf = bits(static_cast<A>(__builtin_inf()));
  const auto none = static_cast<decltype(inf)>(0) - static_cast<decltype(inf)>((bits(difference) & inf) == inf);
  const A step = from_bits((bits(difference) & ~none) | (bits(far) & none));
  const A share = from_bits((bits(A{1}) & ~none) | (bits(A{1} - b.weight) & none));
  const A moved = fused(b.weight, step, share * near);
  return b.weight == A{0} ? near : moved;
}

SSLOPS_HOST_DEVICE bool finite(uint32_t b) { return (b & 0x7f800000u) != 0x7f800000u; }

// Up with the probability of the part that is cut off, r uniform in [0, 2^16): exact for bf16.
SSLOPS_HOST_DEVICE uint16_t to_bf16(float x, uint32_t r) {
  const uint32_t b = bits(x);
  return finite(b) ? static_cast<uint16_t>((b + r) >> 16) : sslops::to_bf16(x);
}

SSLOPS_HOST_DEVICE uint16_t to_f16(float x, uint32_t r) {
  const uint32_t b = bits(x), sign = b >> 16 & 0x8000u, magnitude = b & 0x7fffffffu;
  if (!finite(b)) return static_cast<uint16_t>(sign | (magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u));
  // In units of the last place: 13 bits are cut off a normal number, more (24 - 13 and up) where the result is
  // subnormal.
  const uint32_t exponent = magnitude >> 23;
  const bool normal = exponent >= 113;
  const uint32_t wanted = normal ? 13 : 126 - (exponent ? exponent : 1), shift = wanted < 31 ? wanted : 31;
  const uint32_t mantissa = normal ? magnitude - (112u << 23) : (magnitude & 0x7fffffu) | (exponent ? 0x800000u : 0u);
  const uint32_t lost = wanted - shift < 31 ? wanted - shift : 31;
  const uint32_t up = shift < 16 ? r >> (16 - shift) : r << (shift - 16);
  const uint32_t h = ((mantissa >> lost) + up) >> shift;
  return static_cast<uint16_t>(sign | (h < 0x7c00u ? h : 0x7c00u));
}

}  // namespace sslops::ema_update
