#include <algorithm>
#include <type_traits>

#include "ema_update.h"
#include "launch.cuh"
#include "vector.cuh"

namespace sslops::ema_update {
namespace {

constexpr unsigned kThreads = 256;
constexpr int kPacketRows = 64;  // kernel arguments may take 4 KiB

struct Packet {
  Row rows[kPacketRows];
};

__global__ void put(Packet packet, int count, Row* out) {
  if (threadIdx.x < static_cast<unsigned>(count)) out[threadIdx.x] = packet.rows[threadIdx.x];
}

__device__ void write_half(void* base, DType dtype, int64_t i, int n, const float (&in)[kGroup], const Random4& r) {
  uint16_t raw[kGroup];
  for (int k = 0; k < kGroup; ++k)
    raw[k] = dtype == DType::bf16 ? to_bf16(in[k], noise_of(r, k)) : to_f16(in[k], noise_of(r, k));
  store(base, i, n, raw);
}

template <typename A, int size>
__device__ void write(const Row& row, int64_t i, int n, const A (&x)[size], const Seed& seed) {
  if constexpr (size < kGroup) {
    store(row.target, i, n, x);
    if constexpr (std::is_same_v<A, float>)
      if (row.shadow) sslops::write_half(row.shadow, row.shadow_dtype, i, n, x);
  } else if (seed.stochastic) {
    const uint64_t group = static_cast<uint64_t>(row.first_chunk * kChunk + i) / kGroup;
    write_half(row.target, row.target_dtype, i, n, x, noise(seed.value, group));
  } else {
    sslops::write_half(row.target, row.target_dtype, i, n, x);
  }
}

// A thread takes `size` elements at a time: 16 bytes of a float32 target or of a half-precision one.
template <typename A, int size>
__device__ void update_chunk(const Row& row, int64_t begin, double momentum, const Seed& seed) {
  const Blend<A> b = blend<A>(momentum);
  if (keeps_target(b) && !row.shadow) return;
  const int64_t end = begin + kChunk < row.numel ? begin + kChunk : row.numel;
  for (int64_t i = begin + size * threadIdx.x; i < end; i += size * blockDim.x) {
    const int n = static_cast<int>(end - i < size ? end - i : size);
    A target[size], source[size];
    read(row.target, row.target_dtype, i, n, target);
    read(row.source, row.source_dtype, i, n, source);
    for (int k = 0; k < size; ++k) target[k] = apply(b, target[k], source[k]);
    write(row, i, n, target, seed);
  }
}

__device__ void copy_chunk(const Row& row, int64_t begin) {
  constexpr int size = 16;
  const int64_t end = begin + kChunk < row.numel ? begin + kChunk : row.numel;
  for (int64_t i = begin + size * threadIdx.x; i < end; i += size * blockDim.x) {
    const int n = static_cast<int>(end - i < size ? end - i : size);
    unsigned char bytes[size];
    load(row.source, i, n, bytes);
    store(row.target, i, n, bytes);
  }
}

__global__ void __launch_bounds__(kThreads) update(const Row* rows, int64_t count, Momentum momentum, Seed seed) {
  // One thread finds its row to hold this block's chunk: two steps, where a search by halves waits for memory ten
  // times.
  __shared__ int64_t found;
  const int64_t chunk = blockIdx.x;
  for (int64_t r = threadIdx.x; r < count; r += blockDim.x) {
    const int64_t behind = chunk - rows[r].first_chunk;
    if (behind >= 0 && behind < chunks(rows[r])) found = r;
  }
  __syncthreads();
  const Row row = rows[found];
  double m = momentum.value;
  if (momentum.device)
    m = momentum.is_double ? *static_cast<const double*>(momentum.device) : *static_cast<const float*>(momentum.device);
  if (seed.device) seed.value = *seed.device;
  const int64_t begin = (chunk - row.first_chunk) * kChunk;
  if (row.copied)
    copy_chunk(row, begin);
  else if (row.target_dtype == DType::f64)
    update_chunk<double, 4>(row, begin, m, seed);
  else if (row.target_dtype == DType::f32)
    update_chunk<float, 4>(row, begin, m, seed);
  else
    update_chunk<float, kGroup>(row, begin, m, seed);
}

}  // namespace

void cuda_upload(const Work& work, Row* device_rows, void* stream) {
  for (size_t at = 0; at < work.rows.size(); at += kPacketRows) {
    Packet packet{};
    const int count = static_cast<int>(std::min<size_t>(kPacketRows, work.rows.size() - at));
    std::copy_n(work.rows.begin() + at, count, packet.rows);
    launch(put, 1, kPacketRows, stream, packet, count, device_rows + at);
  }
}

void cuda_update(const Work& work, const Row* device_rows, Momentum momentum, Seed seed, void* stream) {
  if (work.rows.empty()) return;
  launch(update, work.chunks, kThreads, stream, device_rows, static_cast<int64_t>(work.rows.size()), momentum, seed);
}

}  // namespace sslops::ema_update
