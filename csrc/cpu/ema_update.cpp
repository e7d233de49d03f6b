#include "ema_update.h"

#include <algorithm>

#ifdef __F16C__
#include <immintrin.h>
#endif

#include "../common/parallel.h"

namespace sslops::ema_update {
namespace {

constexpr int kBlock = 256;                 // elements that are converted at a time: 1024 took a third longer
constexpr int64_t kThreadElements = 32768;  // below it, a second thread costs more than it brings

void widen(const uint16_t* in, int n, bool bf16, float* out) {
  int i = 0;
#ifdef __F16C__
  for (; !bf16 && i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
#endif
  if (bf16)
    for (; i < n; ++i) out[i] = bf16_to_float(in[i]);
  else
    for (; i < n; ++i) out[i] = f16_to_float(in[i]);
}

void narrow(const float* in, int n, bool bf16, uint16_t* out) {
  int i = 0;
#ifdef __F16C__
  for (; !bf16 && i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  if (bf16)
    for (; i < n; ++i) out[i] = to_bf16(in[i]);
  else
    for (; i < n; ++i) out[i] = to_f16(in[i]);
}

// index: of in[0] in the whole table, a multiple of kGroup.
void narrow(const float* in, int n, bool bf16, uint16_t* out, uint64_t seed, int64_t index) {
  uint32_t words[kBlock / 2];
  for (int g = 0; g < (n + kGroup - 1) / kGroup; ++g) {
    const Random4 r = noise(seed, index / kGroup + g);
    for (int k = 0; k < 4; ++k) words[4 * g + k] = r.word[k];
  }
  uint16_t random[kBlock];
  for (int i = 0; i < kBlock / 2; ++i) {
    random[2 * i] = static_cast<uint16_t>(words[i]);
    random[2 * i + 1] = static_cast<uint16_t>(words[i] >> 16);
  }
  if (bf16)
    for (int i = 0; i < n; ++i) out[i] = to_bf16(in[i], random[i]);
  else
    for (int i = 0; i < n; ++i) out[i] = to_f16(in[i], random[i]);
}

// n elements as A: where they are if they are that already, otherwise converted into the buffer.
template <typename A>
const A* read(const void* base, DType dtype, int64_t i, int n, A* buffer) {
  if (dtype == (sizeof(A) == 8 ? DType::f64 : DType::f32)) return static_cast<const A*>(base) + i;
  if (dtype == DType::f32) {
    std::copy_n(static_cast<const float*>(base) + i, n, buffer);
  } else if (dtype == DType::f64) {
    for (int k = 0; k < n; ++k) buffer[k] = static_cast<A>(static_cast<const double*>(base)[i + k]);
  } else if constexpr (sizeof(A) == 4) {
    widen(static_cast<const uint16_t*>(base) + i, n, dtype == DType::bf16, buffer);
  } else {
    float narrower[kBlock];
    widen(static_cast<const uint16_t*>(base) + i, n, dtype == DType::bf16, narrower);
    std::copy_n(narrower, n, buffer);
  }
  return buffer;
}

// The fused multiply-add is written out: whether it is one must not depend on the compiler.
template <typename A>
void average(A* __restrict target, const A* __restrict source, int64_t n, Blend<A> b) {
  for (int64_t k = 0; k < n; ++k) target[k] = apply(b, target[k], source[k]);
}

void update_float(const Row& row, int64_t begin, int64_t end, Blend<float> b, const uint64_t* seed) {
  const bool half = row.target_dtype != DType::f32, bf16 = row.target_dtype == DType::bf16;
  float targets[kBlock], sources[kBlock];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int n = static_cast<int>(std::min<int64_t>(kBlock, end - i));
    const float* source = read(row.source, row.source_dtype, i, n, sources);
    float* target = const_cast<float*>(read(row.target, row.target_dtype, i, n, targets));
    average(target, source, n, b);
    if (half) {
      uint16_t* const out = static_cast<uint16_t*>(row.target) + i;
      seed ? narrow(target, n, bf16, out, *seed, row.first_chunk * kChunk + i) : narrow(target, n, bf16, out);
    } else if (row.shadow) {
      narrow(target, n, row.shadow_dtype == DType::bf16, static_cast<uint16_t*>(row.shadow) + i);
    }
  }
}

void update_double(const Row& row, int64_t begin, int64_t end, Blend<double> b) {
  double sources[kBlock];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int n = static_cast<int>(std::min<int64_t>(kBlock, end - i));
    average(static_cast<double*>(row.target) + i, read(row.source, row.source_dtype, i, n, sources), n, b);
  }
}

void update(const Pairs& pairs, double momentum, const uint64_t* seed) {
  const Blend<float> b = blend<float>(momentum);
  const Blend<double> b64 = blend<double>(momentum);
  const int64_t count = pairs.chunks - pairs.first_chunk;
  const int64_t grain = std::max<int64_t>(1, kThreadElements * count / std::max<int64_t>(1, pairs.elements));
  parallel_for(count, grain, [&](int64_t first, int64_t last) {
    first += pairs.first_chunk, last += pairs.first_chunk;
    auto row = std::upper_bound(pairs.rows.begin(), pairs.rows.end(), first,
                                [](int64_t chunk, const Row& r) { return chunk < r.first_chunk; }) -
               1;
    for (; row != pairs.rows.end() && row->first_chunk < last; ++row) {
      const int64_t begin = std::max<int64_t>(0, first - row->first_chunk) * kChunk;
      const int64_t end = std::min(row->numel, (last - row->first_chunk) * kChunk);
      if (row->target_dtype == DType::f64)
        update_double(*row, begin, end, b64);
      else
        update_float(*row, begin, end, b, seed);
    }
  });
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{update};
}

}  // namespace sslops::ema_update
