// CUDA on CPU threads, for tests: launch.cuh includes this where there is no nvcc, so that the kernels' own sources run
// under sanitizers. One std::thread per CUDA thread; blocks one after another, so __shared__ may be static. All threads
// of a block must reach every __syncthreads().
#pragma once
#include <barrier>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(threads)

struct CudaIndex {
  unsigned x = 0, y = 0, z = 0;
};
struct __attribute__((aligned(8), may_alias)) uint2 {
  unsigned x, y;
};
struct __attribute__((aligned(16), may_alias)) uint4 {
  unsigned x, y, z, w;
};
inline thread_local CudaIndex threadIdx, blockIdx;
inline CudaIndex blockDim, gridDim;

namespace cuda_emulation {

inline std::barrier<>* block_barrier;

template <typename Body>
void run(unsigned grid, unsigned block, Body body) {
  gridDim = {grid, 1, 1};
  blockDim = {block, 1, 1};
  std::barrier<> barrier(block);
  block_barrier = &barrier;
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
