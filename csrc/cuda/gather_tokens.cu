#include <cassert>

#include "gather_tokens.h"
#include "vector.cuh"

namespace sslops::gather_tokens {
namespace {

constexpr unsigned kThreads = 256, kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;

__device__ char* at(const Rows& rows, int64_t b, int64_t n) {
  return rows.data + b * rows.batch_stride + n * rows.row_stride;
}

__device__ int64_t warp_index() { return (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp; }

// Words of row ids[b, k] of `rows` to the row (b, k) of `dense`, or from it to there.
template <typename Word, bool scatter>
__global__ void __launch_bounds__(kThreads) move(Rows rows, Ids ids, int64_t words, char* dense) {
  const int64_t k = warp_index();
  if (k >= ids.batch * ids.count) return;
  const int64_t b = k / ids.count, n = ids.ids[k];
  const bool named = k - b * ids.count < count_of(ids.counts, b, ids.count), there = named && n >= 0 && n < ids.rows;
  assert(there || !named);
  Word* const __restrict__ packed = reinterpret_cast<Word*>(dense) + k * words;
  Word* const __restrict__ picked = reinterpret_cast<Word*>(at(rows, b, there ? n : 0));
#pragma unroll 4
  for (int64_t w = threadIdx.x % kWarp; w < words; w += kWarp) {
    if (scatter) {
      if (there) picked[w] = packed[w];
    } else {
      Word word;
      if (there)
        word = picked[w];
      else
        memset(&word, named ? 0xff : 0, sizeof word);
      packed[w] = word;
    }
  }
}

template <bool scatter>
void launch_move(Rows rows, Ids ids, int64_t row, char* dense, void* stream) {
  const int64_t blocks = (ids.batch * ids.count + kThreads / kWarp - 1) / (kThreads / kWarp);
  if (blocks == 0 || row == 0) return;
  const uint64_t all = reinterpret_cast<uintptr_t>(rows.data) | reinterpret_cast<uintptr_t>(dense) |
                       static_cast<uint64_t>(rows.batch_stride | rows.row_stride | row);
  if (all % sizeof(uint4) == 0)
    launch(move<uint4, scatter>, blocks, kThreads, stream, rows, ids, row / 16, dense);
  else
    launch(move<uint16_t, scatter>, blocks, kThreads, stream, rows, ids, row / 2, dense);
}

// A lane adds up kSize elements at a time.
template <int kSize>
__global__ void __launch_bounds__(kThreads)
    sum(Rows grad, DType grad_dtype, Ids ids, int64_t d, Rows out, DType out_dtype) {
  const int64_t row = warp_index();
  if (row >= ids.batch * ids.rows) return;
  const int64_t b = row / ids.rows, n = row % ids.rows, lane = threadIdx.x % kWarp;
  const int64_t* const named = ids.ids + b * ids.count;
  // Most rows are named once or never: where the first one is, then whether there are more.
  const int64_t count = count_of(ids.counts, b, ids.count);
  int64_t first = count, names = 0;
  for (int64_t k = 0; k < count; k += kWarp) {
    const unsigned found = __ballot_sync(kAll, k + lane < count && named[k + lane] == n);
    if (found && names == 0) first = k + __ffs(found) - 1;
    names += __popc(found);
  }
  for (int64_t j = kSize * lane; j < d; j += kSize * kWarp) {
    const int size = static_cast<int>(d - j < kSize ? d - j : kSize);
    float total[kSize] = {}, value[kSize];
    int64_t left = names;
    for (int64_t k = first; left > 0; ++k) {
      if (named[k] != n) continue;
      read(at(grad, b, k), grad_dtype, j, size, value);
      for (int e = 0; e < kSize; ++e) total[e] += value[e];
      --left;
    }
    write(at(out, b, n), out_dtype, j, size, total);
  }
}

}  // namespace

void cuda_forward(Rows tokens, Ids ids, int64_t row, char* out, void* stream) {
  launch_move<false>(tokens, ids, row, out, stream);
}

void cuda_scatter(const char* grad, Ids ids, int64_t row, Rows out, void* stream) {
  launch_move<true>(out, ids, row, const_cast<char*>(grad), stream);
}

void cuda_backward(Rows grad, DType grad_dtype, Ids ids, int64_t d, Rows out, DType out_dtype, void* stream) {
  const int64_t blocks = (ids.batch * ids.rows + kThreads / kWarp - 1) / (kThreads / kWarp);
  if (blocks > 0)
    launch(grad_dtype == DType::f32 ? sum<4> : sum<8>, blocks, kThreads, stream, grad, grad_dtype, ids, d, out,
           out_dtype);
}

const CudaTable& cuda_table() {
  static constexpr CudaTable table{[](Tensor tokens, Tensor ids, Tensor counts, Tensor out, Stream stream) {
                                     cuda_forward(rows_of(tokens), ids_of(ids, counts, tokens),
                                                  out.sizes[2] * out.item_size, out.data, stream.handle);
                                   },
                                   [](Tensor grad, Tensor ids, Tensor counts, Tensor d_tokens, Stream stream) {
                                     cuda_scatter(grad.data, ids_of(ids, counts, d_tokens),
                                                  grad.sizes[2] * grad.item_size, rows_of(d_tokens), stream.handle);
                                   },
                                   [](Tensor grad, Tensor ids, Tensor counts, Tensor d_tokens, Stream stream) {
                                     cuda_backward(rows_of(grad), grad.dtype, ids_of(ids, counts, d_tokens),
                                                   grad.sizes[2], rows_of(d_tokens), d_tokens.dtype, stream.handle);
                                   }};
  return table;
}

}  // namespace sslops::gather_tokens
