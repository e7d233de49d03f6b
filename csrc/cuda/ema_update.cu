#include <algorithm>

#include "ema_update.h"
#include "launch.cuh"

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

struct alignas(16) Quad {
  uint32_t word[4];
};

// kGroup elements at p, of which n are there: in 16-byte accesses where all are and p is aligned.
template <typename T>
__device__ void load(const void* base, int64_t i, int n, T (&out)[kGroup]) {
  const T* const p = static_cast<const T*>(base) + i;
  if (n == kGroup && reinterpret_cast<uintptr_t>(p) % sizeof(Quad) == 0) {
    Quad quads[sizeof out / sizeof(Quad)];
    for (unsigned q = 0; q < sizeof out / sizeof(Quad); ++q) quads[q] = reinterpret_cast<const Quad*>(p)[q];
    memcpy(out, quads, sizeof out);
  } else {
    for (int k = 0; k < kGroup; ++k) out[k] = k < n ? p[k] : T{};
  }
}

template <typename T>
__device__ void store(void* base, int64_t i, int n, const T (&in)[kGroup]) {
  T* const p = static_cast<T*>(base) + i;
  if (n == kGroup && reinterpret_cast<uintptr_t>(p) % sizeof(Quad) == 0) {
    Quad quads[sizeof in / sizeof(Quad)];
    memcpy(quads, in, sizeof in);
    for (unsigned q = 0; q < sizeof in / sizeof(Quad); ++q) reinterpret_cast<Quad*>(p)[q] = quads[q];
  } else {
    for (int k = 0; k < kGroup; ++k)
      if (k < n) p[k] = in[k];
  }
}

template <typename A>
__device__ void read(const void* base, DType dtype, int64_t i, int n, A (&out)[kGroup]) {
  if (dtype == DType::f32) {
    float raw[kGroup];
    load(base, i, n, raw);
    for (int k = 0; k < kGroup; ++k) out[k] = raw[k];
  } else if (dtype == DType::f64) {
    double raw[kGroup];
    load(base, i, n, raw);
    for (int k = 0; k < kGroup; ++k) out[k] = static_cast<A>(raw[k]);
  } else {
    uint16_t raw[kGroup];
    load(base, i, n, raw);
    for (int k = 0; k < kGroup; ++k) out[k] = dtype == DType::bf16 ? bf16_to_float(raw[k]) : f16_to_float(raw[k]);
  }
}

__device__ void write_half(void* base, DType dtype, int64_t i, int n, const float (&in)[kGroup]) {
  uint16_t raw[kGroup];
  for (int k = 0; k < kGroup; ++k) raw[k] = dtype == DType::bf16 ? to_bf16(in[k]) : to_f16(in[k]);
  store(base, i, n, raw);
}

__device__ void write_half(void* base, DType dtype, int64_t i, int n, const float (&in)[kGroup], const Random4& r) {
  uint16_t raw[kGroup];
  for (int k = 0; k < kGroup; ++k)
    raw[k] = dtype == DType::bf16 ? to_bf16(in[k], noise_of(r, k)) : to_f16(in[k], noise_of(r, k));
  store(base, i, n, raw);
}

// Elements i .. i + n - 1 of a row.
template <typename A>
__device__ void update_group(const Row& row, int64_t i, int n, Blend<A> b, const Seed& seed) {
  A target[kGroup], source[kGroup];
  read(row.target, row.target_dtype, i, n, target);
  read(row.source, row.source_dtype, i, n, source);
  for (int k = 0; k < kGroup; ++k) target[k] = apply(b, target[k], source[k]);
  if constexpr (sizeof(A) == 8) {
    store(row.target, i, n, target);
  } else if (row.target_dtype == DType::f32) {
    store(row.target, i, n, target);
    if (row.shadow) write_half(row.shadow, row.shadow_dtype, i, n, target);
  } else if (seed.stochastic) {
    const uint64_t group = static_cast<uint64_t>(row.first_chunk * kChunk + i) / kGroup;
    write_half(row.target, row.target_dtype, i, n, target, noise(seed.value, group));
  } else {
    write_half(row.target, row.target_dtype, i, n, target);
  }
}

template <typename A>
__device__ void update_chunk(const Row& row, int64_t begin, double momentum, const Seed& seed) {
  const Blend<A> b = blend<A>(momentum);
  const int64_t end = begin + kChunk < row.numel ? begin + kChunk : row.numel;
  for (int64_t i = begin + kGroup * threadIdx.x; i < end; i += kGroup * blockDim.x)
    update_group(row, i, static_cast<int>(end - i < kGroup ? end - i : kGroup), b, seed);
}

__global__ void __launch_bounds__(kThreads)
    update(const Row* rows, int64_t count, int64_t first_chunk, Momentum momentum, Seed seed) {
  // One thread finds its row to hold this block's chunk: two steps, where a search by halves waits for memory ten
  // times.
  __shared__ int64_t found;
  const int64_t chunk = first_chunk + blockIdx.x;
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
  if (row.target_dtype == DType::f64)
    update_chunk<double>(row, begin, m, seed);
  else
    update_chunk<float>(row, begin, m, seed);
}

}  // namespace

void cuda_upload(const Pairs& pairs, Row* device_rows, void* stream) {
  for (size_t at = 0; at < pairs.rows.size(); at += kPacketRows) {
    Packet packet{};
    const int count = static_cast<int>(std::min<size_t>(kPacketRows, pairs.rows.size() - at));
    std::copy_n(pairs.rows.begin() + at, count, packet.rows);
    launch(put, 1, kPacketRows, stream, packet, count, device_rows + at);
  }
}

void cuda_update(const Pairs& pairs, const Row* device_rows, Momentum momentum, Seed seed, void* stream) {
  if (pairs.rows.empty()) return;
  launch(update, static_cast<unsigned>(pairs.chunks - pairs.first_chunk), kThreads, stream, device_rows,
         static_cast<int64_t>(pairs.rows.size()), pairs.first_chunk, momentum, seed);
}

}  // namespace sslops::ema_update
