// AMX's bf16 tiles in plain C++, so that their users run on a machine without them: eight tiles of 16 rows of 64 bytes
// for each thread. Included before anything else in a build with SSLOPS_EMULATE_AMX=1.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace amx_emulation {

struct Tiles {
  alignas(64) unsigned char bytes[8][16][64];
};
inline Tiles& tiles() {
  static thread_local Tiles all{};
  return all;
}

inline void load(int t, const void* from, int64_t stride) {
  for (int row = 0; row < 16; ++row)
    std::memcpy(tiles().bytes[t][row], static_cast<const char*>(from) + row * stride, 64);
}
inline void store(int t, void* to, int64_t stride) {
  for (int row = 0; row < 16; ++row)
    std::memcpy(static_cast<char*>(to) + row * stride, tiles().bytes[t][row], 64);
}
inline void zero(int t) { std::memset(tiles().bytes[t], 0, sizeof tiles().bytes[t]); }

// c [16, 16] float32 += a [16, 32] bf16 times b, of whose rows two lie side by side.
inline void multiply(int c, int a, int b) {
  const auto value = [](const unsigned char* p) {
    uint16_t half;
    std::memcpy(&half, p, 2);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  };
  Tiles& t = tiles();
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      float sum;
      std::memcpy(&sum, t.bytes[c][m] + 4 * n, 4);
      for (int k = 0; k < 16; ++k)
        for (int half = 0; half < 2; ++half)
          sum += value(t.bytes[a][m] + 4 * k + 2 * half) * value(t.bytes[b][k] + 4 * n + 2 * half);
      std::memcpy(t.bytes[c][m] + 4 * n, &sum, 4);
    }
}

}  // namespace amx_emulation

#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) ((void)(config))
#define _tile_storeconfig(config) ((config)->palette = 0)
#define _tile_release() ((void)0)
#define _tile_zero(t) amx_emulation::zero(t)
#define _tile_loadd(t, from, stride) amx_emulation::load(t, from, stride)
#define _tile_stored(t, to, stride) amx_emulation::store(t, to, stride)
#define _tile_dpbf16ps(c, a, b) amx_emulation::multiply(c, a, b)
