#include "ema_update.h"

#include <algorithm>

#include "../common/parallel.h"
#include "random.h"
#include "vec.h"

namespace sslops::ema_update {
namespace {

constexpr int kBlock = kGroup * kBlocks;    // elements that get their noise at a time
constexpr int64_t kThreadElements = 32768;  // below it, a second thread costs more than it brings

// A target's own precision, in which its average is taken.
template <DType>
struct Wide {
  typedef F Vector;
  typedef float Scalar;
};
template <>
struct Wide<DType::f64> {
  typedef D Vector;
  typedef double Scalar;
};

template <typename V, DType kDType>
SSLOPS_INLINE V load_from(const void* base, int64_t i, int lanes) {
  if constexpr (kDType != DType::f64) return __builtin_convertvector(load_as_float(base, kDType, i, lanes), V);
  D v{};
  std::memcpy(&v, static_cast<const double*>(base) + i, lanes * sizeof(double));
  return __builtin_convertvector(v, V);
}

SSLOPS_INLINE void store_to(void* base, DType dtype, int64_t i, int lanes, F v) {
  store_from_float(base, dtype, i, lanes, v);
}
SSLOPS_INLINE void store_to(void* base, DType, int64_t i, int lanes, D v) {
  std::memcpy(static_cast<double*>(base) + i, &v, lanes * sizeof(double));
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

SSLOPS_INLINE I not_finite(F v) { return ((I)v & 0x7fffffff) >= 0x7f800000; }

// Between finite ends, to the nearest: what nearly all vectors are, in two thirds of the instructions.
SSLOPS_INLINE bool step_to_bf16(F weight, F near, F far, void* base, int64_t i, int lanes) {
  const F difference = far - near;
  if (__builtin_expect(bits(not_finite(difference)), false)) return false;
  const H rounded = narrow(to_nearest_bf16(sslops::fused(weight, difference, near)) >> 16);  // at most infinite
  std::memcpy(static_cast<uint16_t*>(base) + i, &rounded, lanes * sizeof(uint16_t));
  return true;
}

// The vectors of apply. The selects are of bits: NaN and infinities alone have no difference.
SSLOPS_INLINE F step(F weight, F near, F far) {
  const F difference = far - near;
  const I none = not_finite(difference);
  const F share = select(none, splat(1.f) - weight, splat(1.f));
  return sslops::fused(weight, select(none, far, difference), share * near);
}
SSLOPS_INLINE D step(D weight, D near, D far) {
  typedef double Half __attribute__((vector_size(4 * kLanes)));  // a register
  typedef int64_t Bits __attribute__((vector_size(4 * kLanes)));
  D difference = far - near, share;
  Half w[2], f[2], d[2], rest[2];
  std::memcpy(w, &weight, sizeof w);
  std::memcpy(f, &far, sizeof f);
  std::memcpy(d, &difference, sizeof d);
  for (int k = 0; k < 2; ++k) {
    const Bits none = ((Bits)d[k] & 0x7fffffffffffffff) >= 0x7ff0000000000000;
    d[k] = none ? f[k] : d[k];
    rest[k] = none ? 1. - w[k] : Half{} + 1.;
  }
  std::memcpy(&difference, d, sizeof d);
  std::memcpy(&share, rest, sizeof rest);
  return sslops::fused(weight, difference, share * near);
}

template <Step kStep, DType kTarget, DType kSource>
void update_row(const Row& row, int64_t begin, int64_t end, double by, const uint64_t* seed) {
  constexpr bool kHalf = kTarget == DType::bf16 || kTarget == DType::f16;
  typedef typename Wide<kTarget>::Vector V;
  const V weight = V{} + static_cast<typename Wide<kTarget>::Scalar>(by);
  const bool random = kHalf && seed;
  const int64_t block = row.shadow || random ? kBlock : end - begin;
  for (int64_t i = begin; i < end; i += block) {
    const int64_t n = std::min<int64_t>(block, end - i);
    uint32_t noise[kBlock / 2];  // 16 bits for each element
    if (random) draw_blocks(*seed, (row.first_chunk * kChunk + i) / kGroup, RandomStream::ema_update, noise);
    for_each_vector(n, [&](int64_t j, int lanes) {
      V v = load_from<V, kSource>(row.source, i + j, lanes);
      if (kStep != Step::copy) {
        const V target = load_from<V, kTarget>(row.target, i + j, lanes);
        if constexpr (kTarget == DType::bf16) {
          const bool back = kStep == Step::from_source;
          if (!random && step_to_bf16(weight, back ? v : target, back ? target : v, row.target, i + j, lanes)) return;
        }
        v = kStep == Step::from_source ? step(weight, v, target) : step(weight, target, v);
      }
      if constexpr (kHalf) {
        if (random) {
          H r;
          std::memcpy(&r, reinterpret_cast<const uint16_t*>(noise) + j, sizeof r);
          const H rounded = round_stochastically(kTarget, v, widen(r));
          std::memcpy(static_cast<uint16_t*>(row.target) + i + j, &rounded, lanes * sizeof(uint16_t));
          return;
        }
      }
      store_to(row.target, kTarget, i + j, lanes, v);
    });
    if (kTarget == DType::f32 && row.shadow)
      for_each_vector(n, [&](int64_t j, int lanes) {
        const F v = load_as_float(row.target, DType::f32, i + j, lanes);
        store_from_float(row.shadow, row.shadow_dtype, i + j, lanes, v);
      });
  }
}

template <Step kStep, DType kTarget>
auto row_update(DType source) {
  return source == DType::f32    ? update_row<kStep, kTarget, DType::f32>
         : source == DType::bf16 ? update_row<kStep, kTarget, DType::bf16>
         : source == DType::f16  ? update_row<kStep, kTarget, DType::f16>
                                 : update_row<kStep, kTarget, DType::f64>;
}

template <Step kStep>
auto row_update(DType target, DType source) {
  return target == DType::f32    ? row_update<kStep, DType::f32>(source)
         : target == DType::bf16 ? row_update<kStep, DType::bf16>(source)
         : target == DType::f16  ? row_update<kStep, DType::f16>(source)
                                 : row_update<kStep, DType::f64>(source);
}

void update_row(Row row, int64_t begin, int64_t end, Blend<double> b, const uint64_t* seed) {
  const bool copy = row.target_dtype == DType::f64 ? b.weight == 0. : static_cast<float>(b.weight) == 0.f;
  if (copy && !b.from_source) {  // the target stays: every bit of it
    if (!row.shadow) return;
    row.source = row.target, row.source_dtype = row.target_dtype;
  }
  const auto run = copy            ? row_update<Step::copy>
                   : b.from_source ? row_update<Step::from_source>
                                   : row_update<Step::from_target>;
  run(row.target_dtype, row.source_dtype)(row, begin, end, b.weight, seed);
}

void update(const Work& work, double momentum, const uint64_t* seed) {
  const Blend<double> b = blend<double>(momentum);
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
      else
        update_row(*row, begin, end, b, seed);
    }
  });
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{update};
}

}  // namespace sslops::ema_update
