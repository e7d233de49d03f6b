// Philox blocks side by side: those of common/philox.h, several at a time.
#pragma once
#include <cstdint>

#include "../common/philox.h"
#include "vec.h"

namespace sslops {
namespace {

constexpr int kBlocks = 16;

typedef uint64_t W __attribute__((vector_size(4 * kLanes)));

// Products of the low halves.
SSLOPS_INLINE W multiply_low(W a, W b) {
#if defined(__AVX512F__)
  return (W)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (W)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (W)_mm_mul_epu32((__m128i)a, (__m128i)b);
#elif defined(__ARM_NEON)
  return (W)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// The words of blocks `first`, `first` + 1, .. in their order.
SSLOPS_INLINE void draw_blocks(uint64_t key, uint64_t first, RandomStream stream, uint32_t (&words)[4 * kBlocks]) {
  constexpr int kStep = kLanes / 2;
  uint64_t low[kBlocks], high[kBlocks];  // words 0 and 1, 2 and 3 of each
  W block;
  for (int k = 0; k < kStep; ++k) block[k] = first + k;
  for (int k = 0; k < kBlocks; k += kStep, block += kStep) {
    // 32-bit words in 64-bit lanes; what is above them does not matter.
    W c0 = block, c1 = block >> 32, c2 = W{} + static_cast<uint32_t>(stream), c3{};
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < 10; ++round) {
      const W p0 = multiply_low(c0, W{} + 0xD2511F53u), p1 = multiply_low(c2, W{} + 0xCD9E8D57u);
      c0 = p1 >> 32 ^ c1 ^ k0;
      c2 = p0 >> 32 ^ c3 ^ k1;
      c1 = p1;
      c3 = p0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const W pair[2] = {(c0 & 0xffffffffu) | c1 << 32, (c2 & 0xffffffffu) | c3 << 32};
    std::memcpy(low + k, &pair[0], sizeof block);
    std::memcpy(high + k, &pair[1], sizeof block);
  }
  uint64_t pairs[2 * kBlocks];
  for (int k = 0; k < kBlocks; ++k) pairs[2 * k] = low[k], pairs[2 * k + 1] = high[k];
  std::memcpy(words, pairs, sizeof words);
}

}  // namespace
}  // namespace sslops
