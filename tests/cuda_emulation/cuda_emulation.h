// CUDA on CPU threads, for tests: launch.cuh includes this where there is no nvcc, so that the kernels' own sources run
// under sanitizers. One std::thread per CUDA thread; blocks one after another, so __shared__ may be static. All threads
// of a block must reach every __syncthreads(), all those of a warp every __ballot_sync() and __shfl_xor_sync().
#pragma once
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

struct CudaIndex {
  unsigned x = 0, y = 0, z = 0;
};
struct __attribute__((aligned(8), may_alias)) uint2 {
  unsigned x, y;
};
struct __attribute__((aligned(16), may_alias)) uint4 {
  unsigned x, y, z, w;
};

// cuda_fp16.h's. The compilers' own type is missing in some of them.
using __half = uint16_t;
inline __half __ushort_as_half(uint16_t bits) { return bits; }
inline uint16_t __half_as_ushort(__half x) { return x; }
inline float __half2float(__half x) {
  const int exponent = x >> 10 & 31, mantissa = x & 1023;
  const float magnitude = exponent == 31  ? (mantissa ? NAN : INFINITY)
                          : exponent == 0 ? std::ldexp(mantissa, -24)
                                          : std::ldexp(1024 + mantissa, exponent - 25);
  return x & 0x8000 ? -magnitude : magnitude;
}
inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  if (std::isnan(x)) return 0x7fff;
  if (std::isinf(x) || x == 0) return sign | (x == 0 ? 0 : 0x7c00);
  const int exponent = std::max(std::ilogb(x), -14);
  // Units of the last place; a carry goes into the exponent, and from the largest number to infinity.
  const int units = static_cast<int>(std::nearbyint(std::ldexp(std::fabs(x), 10 - std::min(exponent, 16))));
  const int bits = units + ((std::min(exponent, 16) + 14) << 10);
  return sign | static_cast<uint16_t>(std::min(bits, 0x7c00));
}

inline thread_local CudaIndex threadIdx, blockIdx;
inline CudaIndex blockDim, gridDim;

namespace cuda_emulation {

struct Warp {
  explicit Warp(unsigned lanes) : barrier(lanes) {}
  std::barrier<> barrier;
  unsigned vote[32] = {};
  uint64_t given[32] = {};
};

inline std::barrier<>* block_barrier;
inline std::deque<Warp> warps;

template <typename Body>
void run(unsigned grid, unsigned block, Body body) {
  gridDim = {grid, 1, 1};
  blockDim = {block, 1, 1};
  std::barrier<> barrier(block);
  block_barrier = &barrier;
  warps.clear();
  for (unsigned first = 0; first < block; first += 32) warps.emplace_back(std::min(32u, block - first));
  std::vector<std::thread> threads;
  for (unsigned thread = 0; thread < block; ++thread)
    threads.emplace_back([=, &barrier] {
      threadIdx.x = thread;
      for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) {
        body();
        barrier.arrive_and_wait();
      }
    });
  for (std::thread& thread : threads) thread.join();
}

}  // namespace cuda_emulation

inline void __syncthreads() { cuda_emulation::block_barrier->arrive_and_wait(); }

inline unsigned __ballot_sync(unsigned, bool vote) {
  cuda_emulation::Warp& warp = cuda_emulation::warps[threadIdx.x / 32];
  warp.vote[threadIdx.x % 32] = vote;
  warp.barrier.arrive_and_wait();
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) votes |= warp.vote[lane] << lane;
  warp.barrier.arrive_and_wait();
  return votes;
}
template <typename T>
T __shfl_xor_sync(unsigned, T x, unsigned apart) {
  cuda_emulation::Warp& warp = cuda_emulation::warps[threadIdx.x / 32];
  std::memcpy(&warp.given[threadIdx.x % 32], &x, sizeof x);
  warp.barrier.arrive_and_wait();
  std::memcpy(&x, &warp.given[threadIdx.x % 32 ^ apart], sizeof x);
  warp.barrier.arrive_and_wait();
  return x;
}
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
