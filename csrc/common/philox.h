// Philox4x32-10, a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011):
// a block of 128 random bits is a pure function of key and counter, so the same on every device and in every order.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace sslops {

// Who draws: one seed gives each op a stream of its own.
enum class RandomStream : uint32_t {
  ema_update = 1,
  random_mask = 2,
  random_token_corruption = 3,
  sigreg = 4,
  mask_blocks = 5,
  multi_block_mask = 6,
  negatives = 7  // drawn in Python alone
};

struct Random4 {
  uint32_t word[4];
};

SSLOPS_HOST_DEVICE Random4 philox(uint64_t key, uint64_t block, RandomStream stream) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
  uint32_t c2 = static_cast<uint32_t>(stream), c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace sslops
