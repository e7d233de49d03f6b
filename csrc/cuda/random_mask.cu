#include "launch.cuh"
#include "random_mask.h"

namespace sslops::random_mask {
namespace {

constexpr unsigned kThreads = 256;
constexpr int64_t kTile = 1024;  // keys of a row that a block looks at together

// A choice of words; w[j % 4] itself would put them in memory.
__device__ uint32_t word_of(const Random4& random, int64_t j) {
  const uint32_t* const w = random.word;
  return j & 2 ? (j & 1 ? w[3] : w[2]) : (j & 1 ? w[1] : w[0]);
}

__device__ bool in_block(const Noise& noise, int64_t row, int64_t j) {
  const Blocks& blocks = noise.blocks;
  const int64_t width = blocks.width, top = j / width + blocks.size / 2, left = j % width + blocks.size / 2;
  Random4 random{};
  for (int64_t i = 0; i < blocks.count; ++i) {
    if (i % 4 == 0) random = draw_centers(noise, row, i / 4);
    const int64_t center = center_of(noise, word_of(random, i));
    const int64_t down = top - center / width, right = left - center % width;
    if (down >= 0 && down < blocks.size && right >= 0 && right < blocks.size) return true;
  }
  return false;
}

__device__ int32_t key_of(const Noise& noise, int64_t tokens, int64_t row, int64_t j) {
  if (j < noise.num_prefix) return kFirst;
  if (j >= tokens) return kLast;
  if (noise.values) return order(noise.values[row * noise.length + j]);
  const uint32_t word = word_of(draw(*noise.key, noise.length, row, j / 4), j);
  if (!noise.blocks.count) return static_cast<int32_t>(word);
  const bool later = in_block(noise, row, j) != noise.blocks.first;  // of signed numbers
  return static_cast<int32_t>(later ? word & ~(1u << 31) : word | 1u << 31);
}

// A thread finds the rank of one token: it counts those that come before it.
__global__ void __launch_bounds__(kThreads) rank(Noise noise, Mask out) {
  __shared__ int32_t keys[kTile];
  const int64_t length = noise.length, blocks = (length + kThreads - 1) / kThreads;
  const int64_t row = blockIdx.x / blocks, j = blockIdx.x % blocks * kThreads + threadIdx.x;
  const Share share = share_of(noise, out, row);
  const int32_t own = j < length ? key_of(noise, share.tokens, row, j) : 0;
  int64_t before = 0;
  for (int64_t first = 0; first < length; first += kTile) {
    const int count = static_cast<int>(length - first < kTile ? length - first : kTile);
    const int64_t own_place = j - first;
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += kThreads) keys[i] = key_of(noise, share.tokens, row, first + i);
    __syncthreads();
    int smaller = 0;
    for (int i = 0; i < count; ++i) smaller += keys[i] < own || (keys[i] == own && i < own_place);
    before += smaller;
  }
  if (j < length) place(out, share, length, row, j, before);
}

}  // namespace

void cuda_draw(const Noise& noise, int64_t batch, const Mask& out, void* stream) {
  if (batch == 0 || noise.length == 0) return;
  const int64_t blocks = batch * ((noise.length + kThreads - 1) / kThreads);
  launch(rank, blocks, kThreads, stream, noise, out);
}

const CudaTable& cuda_table() {
  static constexpr CudaTable table{[](Tensor noise, int64_t num_prefix, Tensor lengths, Tensor counts, int64_t blocks,
                                      int64_t size, int64_t width, bool first, Tensor ids_keep, Tensor ids_mask,
                                      Tensor mask, Tensor ids_restore, Stream stream) {
    cuda_draw(noise_of(noise, num_prefix, lengths, {blocks, size, width, first}, ids_restore), ids_restore.sizes[0],
              mask_of(counts, ids_keep, ids_mask, mask, ids_restore), stream.handle);
  }};
  return table;
}

}  // namespace sslops::random_mask
