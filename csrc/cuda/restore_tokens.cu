#include <cassert>

#include "restore_tokens.h"
#include "vector.cuh"

namespace sslops::restore_tokens {
namespace {

constexpr unsigned kThreads = 256, kWarp = 32;
constexpr int kSize = 4;  // elements that a lane takes at a time

// A warp for each row of out.
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

// A thread adds up the batch for kSize columns of a position.
__global__ void __launch_bounds__(kThreads)
    reduce(Array grad, const int64_t* ids, Shape s, double* parts, float* positions) {
  const int64_t groups = (s.d + kSize - 1) / kSize, index = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int64_t rows = s.prefix + s.length, t = index / groups, j = index % groups * kSize;
  if (t >= rows) return;
  const int size = static_cast<int>(s.d - j < kSize ? s.d - j : kSize);
  double masked[kSize] = {}, visible[kSize] = {};
#pragma unroll 4
  for (int64_t b = 0; b < s.batch; ++b) {
    const bool of_mask = t >= s.prefix && is_masked(s, b, ids[b * s.length + t - s.prefix]);
    if (!of_mask && !positions) continue;
    float value[kSize];
    read(grad.data, grad.dtype, (b * rows + t) * s.d + j, size, value);
    for (int e = 0; e < kSize; ++e) {  // a choice of arrays would put both in memory
      masked[e] += of_mask ? value[e] : 0.f;
      visible[e] += of_mask ? 0.f : value[e];
    }
  }
#pragma unroll
  for (int e = 0; e < kSize; ++e) {
    if (e >= size) break;
    parts[t * s.d + j + e] = masked[e];
    if (positions) positions[t * s.d + j + e] = static_cast<float>(masked[e] + visible[e]);
  }
}

}  // namespace

void cuda_forward(Array visible, Array mask_token, Array positions, const int64_t* ids, Shape s, Array out,
                  void* stream) {
  const int64_t blocks = (s.batch * (s.prefix + s.length) + kThreads / kWarp - 1) / (kThreads / kWarp);
  if (blocks > 0) launch(restore, blocks, kThreads, stream, visible, mask_token, positions, ids, s, out);
}

void cuda_reduce(Array grad, const int64_t* ids, Shape s, double* parts, float* positions, void* stream) {
  const int64_t threads = (s.prefix + s.length) * ((s.d + kSize - 1) / kSize);
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  if (blocks > 0) launch(reduce, blocks, kThreads, stream, grad, ids, s, parts, positions);
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
