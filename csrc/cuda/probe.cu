#include "launch.cuh"
#include "probe.h"

namespace sslops {
namespace {

__global__ void iota(int32_t* out, int64_t n) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t k = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; k < n; k += stride) out[k] = static_cast<int32_t>(k);
}

}  // namespace

void cuda_iota(int32_t* out, int64_t n, void* stream) { launch(iota, 64, 256, stream, out, n); }

}  // namespace sslops
