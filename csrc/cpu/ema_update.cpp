#include "ema_update.h"

#include <algorithm>

#include "../common/parallel.h"
#include "random.h"
#include "vec.h"

namespace sslops::ema_update {
namespace {

constexpr int kBlock = kGroup * kBlocks;    // elements that get their noise at a time
constexpr int64_t kThreadElements = 32768;  // below it, a second thread costs more than it brings

template <DType kDType>
SSLOPS_INLINE F load_from(const void* base, int64_t i, int lanes) {
  if constexpr (kDType != DType::f64) return load_as_float(base, kDType, i, lanes);
  D v{};
  std::memcpy(&v, static_cast<const double*>(base) + i, lanes * sizeof(double));
  return __builtin_convertvector(v, F);
}

// Which end the step starts from, as apply in common/ema_update.h has it; a step of 0 is a copy.
enum class Step { from_target, from_source, copy };

// The vectors of to_bf16 and to_f16.
SSLOPS_INLINE H round_stochastically(DType dtype, F v, U r) {
  const U bits = (U)v, magnitude = bits & 0x7fffffffu;
  const I finite = (I)magnitude < 0x7f800000;
  const auto pick = [](I mask, U a, U b) { return (U)select(mask, (F)a, (F)b); };
  if (dtype == DType::bf16) return narrow(pick(finite, (bits + r) >> 16, bf16_bits(v)));
  const U normal = (magnitude - (112u << 23) + (r >> 3)) >> 13;
  const U units = (U) __builtin_convertvector((F)magnitude * 0x1p40f, I);  // 2^16 to the last place of a subnormal one
  const U rounded = pick((I)magnitude < 113 << 23, (units + r) >> 16, pick((I)normal < 0x7c00, normal, U{} + 0x7c00u));
  const U special = pick((I)magnitude > 0x7f800000, U{} + 0x7e00u, U{} + 0x7c00u);
  return narrow(pick(finite, rounded, special) | (bits >> 16 & 0x8000u));
}

// The vectors of apply. The selects are of bits: NaN and infinities alone have no difference.
SSLOPS_INLINE F step(F weight, F near, F far) {
  const F difference = far - near;
  const I none = ((I)difference & 0x7fffffff) >= 0x7f800000;
  const F share = select(none, splat(1.f) - weight, splat(1.f));
  return sslops::fused(weight, select(none, far, difference), share * near);
}

template <Step kStep, DType kTarget, DType kSource>
void update_float(const Row& row, int64_t begin, int64_t end, float by, const uint64_t* seed) {
  const F weight = splat(by);
  const int64_t block = row.shadow || seed ? kBlock : end - begin;
  for (int64_t i = begin; i < end; i += block) {
    const int64_t n = std::min<int64_t>(block, end - i);
    uint32_t random[kBlock / 2];  // 16 bits for each element
    if (kTarget != DType::f32 && seed)
      draw_blocks(*seed, (row.first_chunk * kChunk + i) / kGroup, RandomStream::ema_update, random);
    for_each_vector(n, [&](int64_t j, int lanes) {
      F v = load_from<kSource>(row.source, i + j, lanes);
      if (kStep != Step::copy) {
        const F target = load_from<kTarget>(row.target, i + j, lanes);
        v = kStep == Step::from_source ? step(weight, v, target) : step(weight, target, v);
      }
      if (kTarget == DType::f32 || !seed) return store_from_float(row.target, kTarget, i + j, lanes, v);
      H r;
      std::memcpy(&r, reinterpret_cast<const uint16_t*>(random) + j, sizeof r);
      const H rounded = round_stochastically(kTarget, v, widen(r));
      std::memcpy(static_cast<uint16_t*>(row.target) + i + j, &rounded, lanes * sizeof(uint16_t));
    });
    if (kTarget == DType::f32 && row.shadow)
      for_each_vector(n, [&](int64_t j, int lanes) {
        const F v = load_as_float(row.target, DType::f32, i + j, lanes);
        store_from_float(row.shadow, row.shadow_dtype, i + j, lanes, v);
      });
  }
}

template <Step kStep, DType kTarget>
auto float_update(DType source) {
  return source == DType::f32    ? update_float<kStep, kTarget, DType::f32>
         : source == DType::bf16 ? update_float<kStep, kTarget, DType::bf16>
         : source == DType::f16  ? update_float<kStep, kTarget, DType::f16>
                                 : update_float<kStep, kTarget, DType::f64>;
}

template <Step kStep>
auto float_update(DType target, DType source) {
  return target == DType::f32    ? float_update<kStep, DType::f32>(source)
         : target == DType::bf16 ? float_update<kStep, DType::bf16>(source)
                                 : float_update<kStep, DType::f16>(source);
}

void update_float(Row row, int64_t begin, int64_t end, Blend<float> b, const uint64_t* seed) {
  if (keeps_target(b)) {
    if (!row.shadow) return;
    row.source = row.target, row.source_dtype = row.target_dtype;
  }
  const auto run = b.weight == 0.f ? float_update<Step::copy>
                   : b.from_source ? float_update<Step::from_source>
                                   : float_update<Step::from_target>;
  run(row.target_dtype, row.source_dtype)(row, begin, end, b.weight, seed);
}

// The fused multiply-add is written out: whether it is one must not depend on the compiler.
template <typename Source>
void update_double(double* __restrict target, const Source* __restrict source, int64_t n, Blend<double> b) {
  for (int64_t k = 0; k < n; ++k) target[k] = apply(b, target[k], static_cast<double>(source[k]));
}

void update_double(const Row& row, int64_t begin, int64_t end, Blend<double> b) {
  if (keeps_target(b)) return;
  double* const target = static_cast<double*>(row.target);
  if (row.source_dtype == DType::f64)
    return update_double(target + begin, static_cast<const double*>(row.source) + begin, end - begin, b);
  if (row.source_dtype == DType::f32)
    return update_double(target + begin, static_cast<const float*>(row.source) + begin, end - begin, b);
  float wider[kBlock];
  for (int64_t i = begin; i < end; i += kBlock) {
    const int64_t n = std::min<int64_t>(kBlock, end - i);
    for_each_vector(n, [&](int64_t j, int lanes) {
      store_lanes(wider + j, lanes, load_as_float(row.source, row.source_dtype, i + j, lanes));
    });
    update_double(target + i, wider, n, b);
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
