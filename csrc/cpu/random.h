// Philox blocks side by side, of which the compiler makes lanes.
#pragma once
#include <cstdint>

#include "../common/philox.h"

namespace sslops {
namespace {

constexpr int kBlocks = 16;

// words[w][k] = word w of draw(k)
template <typename Draw>
inline __attribute__((always_inline)) void draw_blocks(uint32_t (&words)[4][kBlocks], Draw&& draw) {
  for (int k = 0; k < kBlocks; ++k) {
    const Random4 r = draw(k);
    for (int w = 0; w < 4; ++w) words[w][k] = r.word[w];
  }
}

}  // namespace
}  // namespace sslops
