#include "launch.cuh"
#include "random_mask.h"

namespace sslops::random_mask {
namespace {

constexpr unsigned kThreads = 256;
constexpr int64_t kTile = 1024;  // keys of a row that a block looks at together

__device__ int32_t key_of(const Noise& noise, int64_t row, int64_t j) {
  if (j < noise.num_prefix) return kFirst;
  if (noise.values) return order(noise.values[row * noise.length + j]);
  const Random4 random = draw(*noise.key, noise.length, row, j / 4);
  const uint32_t* const w = random.word;  // w[j % 4] itself would put the words in memory
  return static_cast<int32_t>(j & 2 ? (j & 1 ? w[3] : w[2]) : (j & 1 ? w[1] : w[0]));
}

// A thread finds the rank of one token: it counts those that come before it.
__global__ void __launch_bounds__(kThreads) rank(Noise noise, Mask out) {
  __shared__ int32_t keys[kTile];
  const int64_t length = noise.length, blocks = (length + kThreads - 1) / kThreads;
  const int64_t row = blockIdx.x / blocks, j = blockIdx.x % blocks * kThreads + threadIdx.x;
  const int32_t own = j < length ? key_of(noise, row, j) : 0;
  int64_t before = 0;
  for (int64_t first = 0; first < length; first += kTile) {
    const int count = static_cast<int>(length - first < kTile ? length - first : kTile);
    const int64_t own_place = j - first;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += kThreads) keys[i] = key_of(noise, row, first + i);
    __syncthreads();
    int smaller = 0;
    for (int i = 0; i < count; ++i) smaller += keys[i] < own || (keys[i] == own && i < own_place);
    before += smaller;
  }
  if (j < length) place(out, length, row, j, before);
}

}  // namespace

void cuda_draw(const Noise& noise, int64_t batch, const Mask& out, void* stream) {
  if (batch == 0 || noise.length == 0) return;
  const int64_t blocks = batch * ((noise.length + kThreads - 1) / kThreads);
  launch(rank, blocks, kThreads, stream, noise, out);
}

const CudaTable& cuda_table() {
  static constexpr CudaTable table{[](Tensor noise, int64_t num_prefix, Tensor ids_keep, Tensor ids_mask, Tensor mask,
                                      Tensor ids_restore, Stream stream) {
    cuda_draw(noise_of(noise, num_prefix, ids_restore), ids_restore.sizes[0],
              mask_of(ids_keep, ids_mask, mask, ids_restore), stream.handle);
  }};
  return table;
}

}  // namespace sslops::random_mask
