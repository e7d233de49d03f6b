// A register of float32 in the compiler's own vector type, as wide as the ISA has it: one source for SSE, NEON, AVX2
// and AVX-512. Wider vectors would be legal, and their comparisons, selections and conversions scalar code. Included by
// files that are compiled once per ISA, so everything here has internal linkage (no symbol may be shared between two
// instruction sets).
#pragma once
#include <cstdint>
#include <cstring>

#include "../common/dtype.h"

#if defined(__x86_64__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of what intrinsics leave undefined on purpose
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#pragma GCC diagnostic ignored "-Wunused-function"

namespace sslops {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float F __attribute__((vector_size(4 * kLanes)));
typedef double D __attribute__((vector_size(8 * kLanes)));  // two registers
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));
typedef uint16_t H __attribute__((vector_size(2 * kLanes)));

#define SSLOPS_INLINE inline __attribute__((always_inline))

SSLOPS_INLINE F splat(float x) { return x - F{}; }  // x + 0 would be an addition: it is not x for -0
SSLOPS_INLINE F select(I mask, F a, F b) { return mask ? a : b; }
SSLOPS_INLINE F max(F a, F b) { return select(a > b, a, b); }
SSLOPS_INLINE float max(float a, float b) { return a > b ? a : b; }
SSLOPS_INLINE D widen(F v) { return __builtin_convertvector(v, D); }

// A bit for each lane, the first in the lowest.
SSLOPS_INLINE unsigned bits(I mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<unsigned>(_mm256_movemask_ps((__m256)mask));
#else
  unsigned found = 0;
  for (int lane = 0; lane < kLanes; ++lane) found |= (mask[lane] & 1u) << lane;
  return found;
#endif
}

SSLOPS_INLINE F load(const float* p) {
  F v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
SSLOPS_INLINE void store(float* p, F v) { std::memcpy(p, &v, sizeof v); }

SSLOPS_INLINE I below(int n) {  // the lanes k < n
  I lane;
  for (int k = 0; k < kLanes; ++k) lane[k] = k;
  return lane < n;
}

// The first n < kLanes lanes; the rest of a loaded vector is `fill`. By a mask where there is one: a copy would be a
// call, and what it writes piece by piece could not be forwarded to the load of a vector.
SSLOPS_INLINE F load(const float* p, int n, float fill) {
#if defined(__AVX512F__)
  return (F)_mm512_mask_loadu_ps((__m512)splat(fill), static_cast<__mmask16>((1u << n) - 1u), p);
#elif defined(__AVX2__)
  const I mask = below(n);
  return select(mask, (F)_mm256_maskload_ps(p, (__m256i)mask), splat(fill));
#else
  F v = splat(fill);
  std::memcpy(&v, p, n * sizeof(float));
  return v;
#endif
}
SSLOPS_INLINE void store(float* p, int n, F v) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), (__m512)v);
#elif defined(__AVX2__)
  _mm256_maskstore_ps(p, (__m256i)below(n), (__m256)v);
#else
  std::memcpy(p, &v, n * sizeof(float));
#endif
}

// Half to half until one lane is left. By types: of a loop over lanes in memory, GCC makes one at run time.
template <typename T, int kN>
struct Lanes {
  typedef T Vector __attribute__((vector_size(kN * sizeof(T))));
};
template <typename T, int kN>
SSLOPS_INLINE T fold(typename Lanes<T, kN>::Vector v) {
  if constexpr (kN == 2) return v[0] + v[1];
  if constexpr (kN > 2) {
    typename Lanes<T, kN / 2>::Vector half[2];
    std::memcpy(half, &v, sizeof half);
    return fold<T, kN / 2>(half[0] + half[1]);
  }
}
SSLOPS_INLINE float sum(F v) { return fold<float, kLanes>(v); }
SSLOPS_INLINE double sum(D v) { return fold<double, kLanes>(v); }
SSLOPS_INLINE float max(F v) {
  typedef float Quarter __attribute__((vector_size(16)));
  float lane[kLanes];
  store(lane, v);
  Quarter best, other;
  std::memcpy(&best, lane, sizeof best);
  for (int k = 4; k < kLanes; k += 4) {
    std::memcpy(&other, lane + k, sizeof other);
    best = other > best ? other : best;
  }
  std::memcpy(lane, &best, sizeof best);
  return max(max(lane[0], lane[1]), max(lane[2], lane[3]));
}

// Zeros for negative values. A register at a time: D has two, and its comparisons would be scalar code.
SSLOPS_INLINE D nonnegative(D v) {
  typedef double Half __attribute__((vector_size(4 * kLanes)));
  Half half[2];
  std::memcpy(half, &v, sizeof half);
  for (auto& h : half) h = h < 0. ? Half{} : h;
  std::memcpy(&v, half, sizeof half);
  return v;
}

// a b + c, rounded once.
SSLOPS_INLINE F fused(F a, F b, F c) {
#if defined(__AVX512F__)
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_NEON)
  return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  // fmaf would be a call for each lane. In double the product is exact, and a sum that is rounded to odd (towards the
  // neighbour with an odd last bit, unless it is exact) can be rounded again.
  typedef double Half __attribute__((vector_size(4 * kLanes)));
  typedef int64_t Bits __attribute__((vector_size(4 * kLanes)));
  const D wide_product = __builtin_convertvector(a, D) * __builtin_convertvector(b, D);
  D result = __builtin_convertvector(c, D);
  Half product[2], half[2];
  std::memcpy(product, &wide_product, sizeof product);
  std::memcpy(half, &result, sizeof half);
  for (int k = 0; k < 2; ++k) {
    const Half sum = product[k] + half[k], part = sum - product[k];
    const Half error = (product[k] - (sum - part)) + (half[k] - part);
    const Bits bits = (Bits)sum, away = (error > 0.) ^ (sum < 0.), inexact = (error > 0.) | (error < 0.);
    half[k] = (Half)(bits + ((~away | 1) & inexact & ((bits & 1) - 1)));
  }
  std::memcpy(&result, half, sizeof half);
  return __builtin_convertvector(result, F);
#endif
}

SSLOPS_INLINE D fused(D a, D b, D c) {
  typedef double Half __attribute__((vector_size(4 * kLanes)));
  Half x[2], y[2], z[2];
  std::memcpy(x, &a, sizeof a);
  std::memcpy(y, &b, sizeof b);
  std::memcpy(z, &c, sizeof c);
  for (int k = 0; k < 2; ++k) {
#if defined(__AVX512F__)
    z[k] = (Half)_mm512_fmadd_pd((__m512d)x[k], (__m512d)y[k], (__m512d)z[k]);
#elif defined(__FMA__)
    z[k] = (Half)_mm256_fmadd_pd((__m256d)x[k], (__m256d)y[k], (__m256d)z[k]);
#elif defined(__ARM_NEON)
    z[k] = (Half)vfmaq_f64((float64x2_t)z[k], (float64x2_t)x[k], (float64x2_t)y[k]);
#else
    for (int lane = 0; lane < kLanes / 2; ++lane) z[k][lane] = __builtin_fma(x[k][lane], y[k][lane], z[k][lane]);
#endif
  }
  std::memcpy(&c, z, sizeof c);
  return c;
}

constexpr int64_t at_most(int64_t x, int64_t most) { return x < most ? x : most; }
constexpr int64_t ceil_div(int64_t x, int64_t by) { return (x + by - 1) / by; }
constexpr int64_t round_up(int64_t x, int64_t to) { return ceil_div(x, to) * to; }

// f(j, n): n = kLanes lanes from column j, then the remainder. Lambdas see n as a constant in the main loop.
template <typename Fn>
SSLOPS_INLINE void for_each_vector(int64_t cols, Fn&& f) {
  int64_t j = 0;
  for (; j + kLanes <= cols; j += kLanes) f(j, kLanes);
  if (j < cols) f(j, static_cast<int>(cols - j));
}

// visit(j, k, lanes) over n elements in vectors, for four chains k = 0 .. 3 of sums or maxima.
template <typename Visit>
SSLOPS_INLINE void in_chains(int64_t n, Visit&& visit) {
  int64_t j = 0;
  for (; j + 4 * kLanes <= n; j += 4 * kLanes)
#pragma GCC unroll 4  // the chains would lie in memory
    for (int k = 0; k < 4; ++k) visit(j + k * kLanes, k, kLanes);
  for_each_vector(n - j, [&](int64_t i, int lanes) { visit(j + i, 0, lanes); });
}
SSLOPS_INLINE float sum(const F (&chains)[4]) { return sum((chains[0] + chains[1]) + (chains[2] + chains[3])); }

SSLOPS_INLINE F load_lanes(const float* p, int n, float fill) { return n == kLanes ? load(p) : load(p, n, fill); }
SSLOPS_INLINE void store_lanes(float* p, int n, F v) { n == kLanes ? store(p, v) : store(p, n, v); }

// 16-bit integers and back; values fit. GCC converts halves of vectors where there is an instruction for the whole.
SSLOPS_INLINE U widen(H v) {
#if defined(__AVX512F__)
  return (U)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
  return (U)_mm256_cvtepu16_epi32((__m128i)v);
#else
  return __builtin_convertvector(v, U);
#endif
}
SSLOPS_INLINE H narrow(U v) {
#if defined(__AVX512F__)
  return (H)_mm512_cvtepi32_epi16((__m512i)v);
#elif defined(__AVX2__)
  return (H)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
#else
  return __builtin_convertvector(v, H);
#endif
}

SSLOPS_INLINE U to_nearest_bf16(F v) { return (U)v + 0x7fffu + ((U)v >> 16 & 1u); }  // in the high bits; of no NaN
SSLOPS_INLINE U bf16_bits(F v) { return (U)select(v == v, (F)to_nearest_bf16(v), (F)((U)v | 0x400000u)) >> 16; }
SSLOPS_INLINE F round_to_bf16(F v) { return (F)(bf16_bits(v) << 16); }

#if defined(__AVX512F__)
SSLOPS_INLINE F f16_to_float(H half) { return (F)_mm512_maskz_cvtph_ps(0xffff, (__m256i)half); }
SSLOPS_INLINE H float_to_f16(F v) { return (H)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__F16C__)
SSLOPS_INLINE F f16_to_float(H half) { return (F)_mm256_cvtph_ps((__m128i)half); }
SSLOPS_INLINE H float_to_f16(F v) { return (H)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
// In integers: the compilers' own type is missing in some of them.
SSLOPS_INLINE F f16_to_float(H half) {
  const U bits = widen(half);
  const U sign = (bits & 0x8000u) << 16, magnitude = (bits & 0x7fffu) << 13, normal = magnitude + (112u << 23);
  const F tiny = (F)(magnitude + (113u << 23)) - (F)(U{} + (113u << 23));
  const F finite = select((I)magnitude < 1 << 23, tiny, (F)normal);
  const F v = select((I)magnitude >= 0x1f << 23, (F)(normal + (112u << 23)), finite);
  return (F)((U)v | sign);
}

SSLOPS_INLINE H float_to_f16(F v) {
  const U bits = (U)v, sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  const U normal = (magnitude + 0xfffu + (magnitude >> 13 & 1u) - (112u << 23)) >> 13;
  const U tiny = (U)((F)magnitude + 0.5f) - 0x3f000000u;  // 0.5 has the unit of the smallest float16 in its last place
  const U finite = (U)select((I)magnitude < 0x38800000, (F)tiny, (F)normal);
  const U nan = (magnitude >> 13 & 0x3ffu) | 0x7e00u;
  const U large = (U)select((I)magnitude > 0x7f800000, (F)nan, (F)(U{} + 0x7c00u));
  return narrow((U)select((I)magnitude >= 0x477ff000, (F)large, (F)finite) | sign);
}
#endif

SSLOPS_INLINE F load_as_float(const void* base, DType dtype, int64_t index, int n) {
  if (dtype == DType::f32) return load_lanes(static_cast<const float*>(base) + index, n, 0.f);
  H raw{};
  std::memcpy(&raw, static_cast<const uint16_t*>(base) + index, n * sizeof(uint16_t));
  return dtype == DType::bf16 ? (F)(widen(raw) << 16) : f16_to_float(raw);
}

SSLOPS_INLINE void store_from_float(void* base, DType dtype, int64_t index, int n, F v) {
  if (dtype == DType::f32) return store_lanes(static_cast<float*>(base) + index, n, v);
  const H raw = dtype == DType::bf16 ? narrow(bf16_bits(v)) : float_to_f16(v);
  std::memcpy(static_cast<uint16_t*>(base) + index, &raw, n * sizeof(uint16_t));
}

// v as the operand of a matmul in `dtype` holds it.
SSLOPS_INLINE F round_to(DType dtype, F v) {
  return dtype == DType::f32 ? v : dtype == DType::bf16 ? round_to_bf16(v) : f16_to_float(float_to_f16(v));
}

}  // namespace
}  // namespace sslops
