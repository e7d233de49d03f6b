// 16 float32 lanes in the compiler's own vector type: one source for SSE, AVX2, AVX-512 and NEON.
// Included by files that are compiled once per ISA, so everything here has internal linkage (no symbol may be shared
// between two instruction sets).
#pragma once
#include <cstdint>
#include <cstring>

#include "../common/dtype.h"

#pragma GCC diagnostic ignored "-Wunused-function"

namespace sslops {
namespace {

constexpr int kLanes = 16;
typedef float F __attribute__((vector_size(64)));
typedef double D __attribute__((vector_size(128)));
typedef int32_t I __attribute__((vector_size(64)));
typedef uint32_t U __attribute__((vector_size(64)));
typedef uint16_t H __attribute__((vector_size(32)));

#define SSLOPS_INLINE inline __attribute__((always_inline))

SSLOPS_INLINE F splat(float x) { return F{} + x; }
SSLOPS_INLINE F select(I mask, F a, F b) { return (F)(((I)a & mask) | ((I)b & ~mask)); }
SSLOPS_INLINE F max(F a, F b) { return select(a > b, a, b); }
SSLOPS_INLINE float max(float a, float b) { return a > b ? a : b; }

SSLOPS_INLINE F load(const float* p) {
  F v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
SSLOPS_INLINE void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }

// The first n < 16 lanes; the rest of a loaded vector is `fill`.
SSLOPS_INLINE F load(const float* p, int n, float fill) {
  F v = splat(fill);
  std::memcpy(&v, p, n * sizeof(float));
  return v;
}
SSLOPS_INLINE void store(float* p, int n, F v) { std::memcpy(p, &v, n * sizeof(float)); }

SSLOPS_INLINE float sum(F v) {
  float lane[kLanes];
  store(lane, v);
  for (int half = kLanes / 2; half; half /= 2)
    for (int k = 0; k < half; ++k) lane[k] += lane[k + half];
  return lane[0];
}
SSLOPS_INLINE double sum(D v) {
  double lane[kLanes];
  std::memcpy(lane, &v, sizeof v);
  for (int half = kLanes / 2; half; half /= 2)
    for (int k = 0; k < half; ++k) lane[k] += lane[k + half];
  return lane[0];
}
SSLOPS_INLINE float max(F v) {
  float lane[kLanes];
  store(lane, v);
  for (int half = kLanes / 2; half; half /= 2)
    for (int k = 0; k < half; ++k) lane[k] = max(lane[k], lane[k + half]);
  return lane[0];
}

// f(j, n): n = 16 lanes from column j, then the remainder. Lambdas see n as a constant in the main loop.
template <typename Fn>
SSLOPS_INLINE void for_each_vector(int64_t cols, Fn&& f) {
  int64_t j = 0;
  for (; j + kLanes <= cols; j += kLanes) f(j, kLanes);
  if (j < cols) f(j, static_cast<int>(cols - j));
}
SSLOPS_INLINE F load_lanes(const float* p, int n, float fill) { return n == kLanes ? load(p) : load(p, n, fill); }
SSLOPS_INLINE void store_lanes(float* p, int n, F v) { n == kLanes ? store(p, v) : store(p, n, v); }

// 2^x for x <= 0 (any x up to 127): relative error below 2e-7; 0 below 2^-126; NaN stays NaN.
SSLOPS_INLINE F exp2_nonpositive(F x) {
  const float magic = 12582912.f;  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  const F biased = x + magic;
  const F f = x - (biased - magic);  // in [-1/2, 1/2]
  // Minimax polynomial of 2^f, fitted for relative error (7.5e-8).
  F p = splat(0.0013276415411382914f);
  p = p * f + 0.009675528854131699f;
  p = p * f + 0.05550713464617729f;
  p = p * f + 0.24022120237350464f;
  p = p * f + 0.6931469440460205f;
  p = p * f + 1.0000001192092896f;
  const F scale = (F)(((U)biased + 127u) << 23);
  return select(x < -126.f, F{}, p * scale);
}

SSLOPS_INLINE F round_to_bf16(F v) {
  const U bits = (U)v;
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  return select(v == v, (F)rounded, v);
}

SSLOPS_INLINE F load_as_float(const void* base, DType dtype, int64_t index, int n) {
  if (dtype == DType::f32) return load_lanes(static_cast<const float*>(base) + index, n, 0.f);
  H raw{};
  std::memcpy(&raw, static_cast<const uint16_t*>(base) + index, n * sizeof(uint16_t));
  if (dtype == DType::bf16) return (F)(__builtin_convertvector(raw, U) << 16);
  F v;
  for (int k = 0; k < kLanes; ++k) {
    _Float16 h;
    const uint16_t bits = raw[k];
    std::memcpy(&h, &bits, sizeof h);
    v[k] = static_cast<float>(h);
  }
  return v;
}

SSLOPS_INLINE void store_from_float(void* base, DType dtype, int64_t index, int n, F v) {
  if (dtype == DType::f32) return store_lanes(static_cast<float*>(base) + index, n, v);
  H raw;
  if (dtype == DType::bf16) {
    raw = __builtin_convertvector((U)round_to_bf16(v) >> 16, H);
  } else {
    for (int k = 0; k < kLanes; ++k) {
      const _Float16 h = static_cast<_Float16>(v[k]);
      uint16_t bits;
      std::memcpy(&bits, &h, sizeof bits);
      raw[k] = bits;
    }
  }
  std::memcpy(static_cast<uint16_t*>(base) + index, &raw, n * sizeof(uint16_t));
}

// v as the operand of a matmul in `dtype` holds it.
SSLOPS_INLINE F round_to(DType dtype, F v) {
  if (dtype == DType::f32) return v;
  if (dtype == DType::bf16) return round_to_bf16(v);
  for (int k = 0; k < kLanes; ++k) v[k] = static_cast<float>(static_cast<_Float16>(v[k]));
  return v;
}

}  // namespace
}  // namespace sslops
