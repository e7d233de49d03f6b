// Stores past the caches, of results that are too large to be read from there: a line that is written whole then needs
// not be fetched first, and displaces nothing.
#pragma once
#include "vec.h"

namespace sslops {
namespace {

constexpr int64_t kWorthStreaming = 16 << 20;  // bytes: half of what many cores' last cache holds

// Whether `bytes` at `data`, rows of `row` bytes each, are to be written by stream_from_float.
inline bool worth_streaming(const void* data, int64_t bytes, int64_t row) {
  constexpr uintptr_t kLine = 64;
  return bytes >= kWorthStreaming && (reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(row)) % kLine == 0;
}

// As store_from_float does a whole vector. A thread that has written so calls end_stream() before others read it.
SSLOPS_INLINE void stream_from_float(void* base, DType dtype, int64_t index, F v) {
#if defined(__AVX512F__)
  if (dtype == DType::f32) return _mm512_stream_ps(static_cast<float*>(base) + index, (__m512)v);
  const H raw = dtype == DType::bf16 ? narrow(bf16_bits(v)) : float_to_f16(v);
  _mm256_stream_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(base) + index), (__m256i)raw);
#elif defined(__AVX2__)
  if (dtype == DType::f32) return _mm256_stream_ps(static_cast<float*>(base) + index, (__m256)v);
  const H raw = dtype == DType::bf16 ? narrow(bf16_bits(v)) : float_to_f16(v);
  _mm_stream_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(base) + index), (__m128i)raw);
#else
  store_from_float(base, dtype, index, kLanes, v);
#endif
}

inline void end_stream() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

}  // namespace
}  // namespace sslops
