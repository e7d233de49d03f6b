#include <cassert>

#include "restore_tokens.h"
#include "vector.cuh"

namespace sslops::restore_tokens {
namespace {

constexpr unsigned kThreads = 128, kWarp = 32, kWarps = kThreads / kWarp;

// A warp for each row of out; a lane takes kSize elements at a time.
template <int kSize>
__global__ void __launch_bounds__(kThreads)
    restore(Array visible, Array mask_token, Array positions, const int64_t* ids, Shape s, Array out) {
  const int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp, rows = s.prefix + s.length;
  if (row >= s.batch * rows) return;
  const int64_t b = row / rows, t = row % rows;
  const int64_t id = t < s.prefix ? t - s.prefix : ids[b * s.length + t - s.prefix];
  const bool there = t < s.prefix || (id >= 0 && id < s.length), masked = t >= s.prefix && is_masked(s, b, id);
  assert(there);
  const Array from = masked ? mask_token : visible;
  const int64_t first = masked || !there ? 0 : (b * (s.prefix + s.kept) + s.prefix + id) * s.d;
  for (int64_t j = kSize * (threadIdx.x % kWarp); j < s.d; j += kSize * kWarp) {
    const int size = static_cast<int>(s.d - j < kSize ? s.d - j : kSize);
    float value[kSize], position[kSize] = {};
    if (there) read(from.data, from.dtype, first + j, size, value);
    if (positions.data) read(positions.data, positions.dtype, t * s.d + j, size, position);
    for (int e = 0; e < kSize; ++e) value[e] = there ? value[e] + position[e] : from_bits(0x7fc00000u);
    write(out.data, out.dtype, row * s.d + j, size, value);
  }
}

// A block for kSize columns a lane of a position: each of its warps adds up a share of the batch, and these are joined
// in their order.
template <int kSize>
__global__ void __launch_bounds__(kThreads)
    reduce(Array grad, const int64_t* ids, Shape s, double* parts, float* positions) {
  __shared__ double shares[kWarps][kSize][kWarp];
  const int64_t rows = s.prefix + s.length, blocks = (s.d + kSize * kWarp - 1) / (kSize * kWarp);
  const unsigned lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t t = blockIdx.x / blocks, j = (blockIdx.x % blocks * kWarp + lane) * kSize;
  const int size = static_cast<int>(s.d - j < kSize ? s.d - j : kSize);
  double masked[kSize] = {}, visible[kSize] = {};
  for (int64_t b = warp; b < s.batch; b += kWarps) {
    const bool of_mask = t >= s.prefix && is_masked(s, b, ids[b * s.length + t - s.prefix]);
    if (size <= 0 || (!of_mask && !positions)) continue;
    float value[kSize];
    read(grad.data, grad.dtype, (b * rows + t) * s.d + j, size, value);
    if (of_mask)
      for (int e = 0; e < kSize; ++e) masked[e] += value[e];
    else
      for (int e = 0; e < kSize; ++e) visible[e] += value[e];
  }
  const auto join = [&](const double (&found)[kSize]) {
    __syncthreads();
    for (int e = 0; e < kSize; ++e) shares[warp][e][lane] = found[e];
    __syncthreads();
  };
  const auto joined = [&](int e) {
    double total = 0.;
    for (unsigned k = 0; k < kWarps; ++k) total += shares[k][e][lane];
    return total;
  };
  double sums[kSize / kWarps];  // of every kWarps-th of the lane's columns, from `warp` on
  join(masked);
  for (unsigned k = 0; k < kSize / kWarps; ++k) {
    const int e = warp + k * kWarps;
    sums[k] = joined(e);
    if (e < size) parts[t * s.d + j + e] = sums[k];
  }
  if (!positions) return;
  join(visible);
  for (unsigned k = 0; k < kSize / kWarps; ++k) {
    const int e = warp + k * kWarps;
    if (e < size) positions[t * s.d + j + e] = static_cast<float>(sums[k] + joined(e));
  }
}

// As many of them as are 16 bytes.
bool by_eight(DType dtype) { return dtype != DType::f32; }

}  // namespace

void cuda_forward(Array visible, Array mask_token, Array positions, const int64_t* ids, Shape s, Array out,
                  void* stream) {
  const int64_t blocks = (s.batch * (s.prefix + s.length) + kWarps - 1) / kWarps;
  if (blocks > 0)
    launch(by_eight(out.dtype) ? restore<8> : restore<4>, blocks, kThreads, stream, visible, mask_token, positions, ids,
           s, out);
}

void cuda_reduce(Array grad, const int64_t* ids, Shape s, double* parts, float* positions, void* stream) {
  const int64_t columns = kWarp * (by_eight(grad.dtype) ? 8 : 4);
  const int64_t blocks = (s.prefix + s.length) * ((s.d + columns - 1) / columns);
  if (blocks > 0)
    launch(by_eight(grad.dtype) ? reduce<8> : reduce<4>, blocks, kThreads, stream, grad, ids, s, parts, positions);
}

const CudaTable& cuda_table() {
  static constexpr CudaTable table{
      [](Tensor visible, Tensor mask_token, Tensor positions, Tensor ids, Tensor counts, int64_t kept, Tensor out,
         Stream stream) {
        cuda_forward(array(visible), array(mask_token), array(positions), ids.as<int64_t>(),
                     shape(ids, counts, kept, out), array(out), stream.handle);
      },
      [](Tensor grad, Tensor ids, Tensor counts, int64_t kept, Tensor parts, Tensor positions, Stream stream) {
        cuda_reduce(array(grad), ids.as<int64_t>(), shape(ids, counts, kept, grad), parts.as<double>(),
                    positions.as<float>(), stream.handle);
      }};
  return table;
}

}  // namespace sslops::restore_tokens
