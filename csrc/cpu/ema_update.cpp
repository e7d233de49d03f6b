#include "ema_update.h"

#include <algorithm>

#include "../common/parallel.h"
#include "vec.h"

namespace sslops::ema_update {
namespace {

constexpr int kBlock = 256;                 // elements that are converted at a time: 1024 took a third longer
constexpr int64_t kThreadElements = 32768;  // below it, a second thread costs more than it brings

void widen(const uint16_t* in, int n, DType dtype, float* out) {
  for_each_vector(n, [&](int64_t j, int lanes) { store_lanes(out + j, lanes, load_as_float(in, dtype, j, lanes)); });
}

void narrow(const float* in, int n, DType dtype, uint16_t* out) {
  for_each_vector(
      n, [&](int64_t j, int lanes) { store_from_float(out, dtype, j, lanes, load_lanes(in + j, lanes, 0.f)); });
}

// index: of in[0] in the whole table, a multiple of kGroup.
void narrow(const float* in, int n, DType dtype, uint16_t* out, uint64_t seed, int64_t index) {
  uint32_t words[kBlock / 2] = {};
  for (int g = 0; g < (n + kGroup - 1) / kGroup; ++g) {
    const Random4 r = noise(seed, index / kGroup + g);
    for (int k = 0; k < 4; ++k) words[4 * g + k] = r.word[k];
  }
  uint16_t random[kBlock];
  for (int i = 0; i < kBlock / 2; ++i) {
    random[2 * i] = static_cast<uint16_t>(words[i]);
    random[2 * i + 1] = static_cast<uint16_t>(words[i] >> 16);
  }
  if (dtype == DType::bf16)
    for (int i = 0; i < n; ++i) out[i] = to_bf16(in[i], random[i]);
  else
    for (int i = 0; i < n; ++i) out[i] = to_f16(in[i], random[i]);
}

// n elements as A: where they are if they are that already, otherwise converted into the buffer.
template <typename A>
const A* read(const void* base, DType dtype, int64_t i, int n, A* buffer) {
  if (dtype == (sizeof(A) == 8 ? DType::f64 : DType::f32)) return static_cast<const A*>(base) + i;
  if (dtype == DType::f32) {
    std::copy_n(static_cast<const float*>(base) + i, n, buffer);
  } else if (dtype == DType::f64) {
    for (int k = 0; k < n; ++k) buffer[k] = static_cast<A>(static_cast<const double*>(base)[i + k]);
  } else if constexpr (sizeof(A) == 4) {
    widen(static_cast<const uint16_t*>(base) + i, n, dtype, buffer);
  } else {
    float narrower[kBlock];
    widen(static_cast<const uint16_t*>(base) + i, n, dtype, narrower);
    std::copy_n(narrower, n, buffer);
  }
  return buffer;
}

// The fused multiply-add is written out: whether it is one must not depend on the compiler.
template <typename A>
void average(A* __restrict target, const A* __restrict source, int64_t n, Blend<A> b) {
  for (int64_t k = 0; k < n; ++k) target[k] = apply(b, target[k], source[k]);
}

void update_float(const Row& row, int64_t begin, int64_t end, Blend<float> b, const uint64_t* seed) {
  const DType dtype = row.target_dtype;
  float targets[kBlock], sources[kBlock];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int n = static_cast<int>(std::min<int64_t>(kBlock, end - i));
    const float* source = read(row.source, row.source_dtype, i, n, sources);
    float* target = const_cast<float*>(read(row.target, row.target_dtype, i, n, targets));
    average(target, source, n, b);
    if (dtype != DType::f32) {
      uint16_t* const out = static_cast<uint16_t*>(row.target) + i;
      seed ? narrow(target, n, dtype, out, *seed, row.first_chunk * kChunk + i) : narrow(target, n, dtype, out);
    } else if (row.shadow) {
      narrow(target, n, row.shadow_dtype, static_cast<uint16_t*>(row.shadow) + i);
    }
  }
}

void update_double(const Row& row, int64_t begin, int64_t end, Blend<double> b) {
  double sources[kBlock];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int n = static_cast<int>(std::min<int64_t>(kBlock, end - i));
    average(static_cast<double*>(row.target) + i, read(row.source, row.source_dtype, i, n, sources), n, b);
  }
}

void update(const Work& work, double momentum, const uint64_t* seed) {
  const Blend<float> b = blend<float>(momentum);
  const Blend<double> b64 = blend<double>(momentum);
  const int64_t grain = std::max<int64_t>(1, kThreadElements * work.chunks / std::max<int64_t>(1, work.elements));
  parallel_for(work.chunks, grain, [&](int64_t first, int64_t last) {
    auto row = std::upper_bound(work.rows.begin(), work.rows.end(), first,
                                [](int64_t chunk, const Row& r) { return chunk < r.first_chunk; }) -
               1;
    for (; row != work.rows.end() && row->first_chunk < last; ++row) {
      const int64_t begin = std::max<int64_t>(0, first - row->first_chunk) * kChunk;
      const int64_t end = std::min(row->numel, (last - row->first_chunk) * kChunk);
      if (row->copied)
        std::copy_n(static_cast<const char*>(row->source) + begin, end - begin,
                    static_cast<char*>(row->target) + begin);
      else if (row->target_dtype == DType::f64)
        update_double(*row, begin, end, b64);
      else
        update_float(*row, begin, end, b, seed);
    }
  });
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{update};
}

}  // namespace sslops::ema_update
