#include "info_nce.h"

#include <math.h>

#include "../common/parallel.h"
#include "rows.h"
#include "vec.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace sslops::info_nce {
namespace {

constexpr double kLog2e = 1.44269504088896340736;
constexpr float kInf = __builtin_inff();
constexpr int64_t kPad = 32;  // of bf16 weights: gemm::kBlock

// exp(s / tau) = 2^(s scale). Never 0: at an infinite temperature all pairs weigh the same, but -inf stays -inf.
float log2_scale(double tau) {
  const double scale = kLog2e / tau;
  return static_cast<float>(scale < __FLT_MIN__ ? __FLT_MIN__ : scale);
}

SSLOPS_INLINE F row_at(const Rows& rows, int64_t i, int64_t j, int lanes) {
  return load_as_float(rows.x, rows.dtype, i * rows.d + j, lanes) * rows.inv_norm[i];
}

void positives(Rows query, const void* key, const float* key_inv_norm, float* positive) {
  const Rows keys{key, query.dtype, query.n, query.d, key_inv_norm};
  parallel_for(query.n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      F product{};
      for_each_vector(query.d,
                      [&](int64_t j, int lanes) { product += row_at(query, i, j, lanes) * row_at(keys, i, j, lanes); });
      positive[i] = sum(product);
    }
  });
}

// -inf here is a term of exactly 0 below.
SSLOPS_INLINE void exclude(const Tile& t, const Excluded& excluded, int64_t row) {
  float* s = t.s + row * t.ld;
  if (excluded.query_ids) {
    const int64_t id = excluded.query_ids[t.i0 + row];
    const int64_t* ids = excluded.negative_ids + t.j0;
    for (int64_t j = 0; j < t.cols; ++j) s[j] = ids[j] == id ? -kInf : s[j];
  }
  const int64_t positive = excluded.first + t.i0 + row - t.j0;
  if (excluded.first >= 0 && positive >= 0 && positive < t.cols) s[positive] = -kInf;
}

void raise_maximum(const Tile& t, const State& state, int64_t row, float scale) {
  const float* s = t.s + row * t.ld;
  const int64_t i = t.i0 + row;
  F best = splat(state.max[i]);
  for_each_vector(t.cols, [&](int64_t j, int lanes) {
    best = max(load_lanes(s + j, lanes, -kInf) * load_lanes(t.inv_norm + j, lanes, 1.f), best);
  });
  const float top = max(best);
  if (!(top > state.max[i])) return;
  const float shrink = exp2f((state.max[i] - top) * scale);
  state.max[i] = top;
  state.sum[i] *= shrink;
  if (state.o)
    for_each_vector(state.d, [&](int64_t j, int lanes) {
      float* o = state.o + i * state.ld + j;
      store_lanes(o, lanes, load_lanes(o, lanes, 0.f) * shrink);
    });
}

SSLOPS_INLINE void store_bf16(uint16_t* p, int lanes, F v) {
#ifdef __AVX512BF16__
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &rounded, lanes * sizeof *p);
#else
  store_from_float(p, DType::bf16, 0, lanes, v);
#endif
}

enum class Store { none, f32, bf16 };

// kRows rows at once share what belongs to the columns.
template <Store kStore, int kRows>
SSLOPS_INLINE void weigh(const Tile& t, const Weights& weights, const State& state, int64_t row, float scale) {
  F total[kRows]{}, base[kRows], bar[kRows];
  I above[kRows]{};
  for (int k = 0; k < kRows; ++k) {
    base[k] = splat(state.max[t.i0 + row + k]);
    bar[k] = splat(state.positive[t.i0 + row + k]);
  }
  const auto out = [&](int k) { return (row + k) * weights.ld; };
  for_each_vector(t.cols, [&](int64_t j, int lanes) {
    const F inv_norm = load_lanes(t.inv_norm + j, lanes, 1.f);
    for (int k = 0; k < kRows; ++k) {
      const F x = load_lanes(t.s + (row + k) * t.ld + j, lanes, -kInf) * inv_norm;
      const F e = exp2_nonpositive((x - base[k]) * scale);
      total[k] += e;
      above[k] = x > bar[k] ? above[k] + 1 : above[k];
      if (kStore == Store::f32) store_lanes(static_cast<float*>(weights.w) + out(k) + j, lanes, e * inv_norm);
      if (kStore == Store::bf16) store_bf16(static_cast<uint16_t*>(weights.w) + out(k) + j, lanes, e * inv_norm);
    }
  });
  for (int k = 0; k < kRows; ++k) {
    const int64_t i = t.i0 + row + k;
    state.sum[i] += sum(total[k]);
    state.above[i] += sum(__builtin_convertvector(above[k], F));
    if (kStore == Store::bf16)
      for (int64_t j = t.cols; j % kPad; ++j) static_cast<uint16_t*>(weights.w)[out(k) + j] = 0;
  }
}

template <Store kStore>
void forward_tile_as(const Tile& t, const Excluded& excluded, const Weights& weights, const State& state, double tau,
                     bool fixed) {
  const float scale = log2_scale(tau);
  parallel_for(t.rows, 8, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      exclude(t, excluded, row);
      if (!fixed) raise_maximum(t, state, row, scale);
    }
    int64_t row = begin;
    for (; row + 4 <= end; row += 4) weigh<kStore, 4>(t, weights, state, row, scale);
    for (; row < end; ++row) weigh<kStore, 1>(t, weights, state, row, scale);
  });
}

void forward_tile(Tile t, Excluded excluded, Weights weights, State state, double tau, bool fixed) {
  const auto run = !weights.w                     ? forward_tile_as<Store::none>
                   : weights.dtype == DType::bf16 ? forward_tile_as<Store::bf16>
                                                  : forward_tile_as<Store::f32>;
  run(t, excluded, weights, state, tau, fixed);
}

// v [d], the gradient of the unit row, becomes that of the row as it is stored; returns <unit row, v>.
SSLOPS_INLINE float normalize_backward(const Rows& rows, int64_t i, bool normalize, const float* v, void* out,
                                       DType dtype, int64_t offset) {
  const float inv = rows.inv_norm[i];
  F product{};
  for_each_vector(rows.d,
                  [&](int64_t j, int lanes) { product += row_at(rows, i, j, lanes) * load_lanes(v + j, lanes, 0.f); });
  const float dot = sum(product);
  // At a clamped norm F.normalize is a plain scaling: nothing to project out.
  const bool project = normalize && inv < 1.f / kNormEps;
  for_each_vector(rows.d, [&](int64_t j, int lanes) {
    F g = load_lanes(v + j, lanes, 0.f);
    if (project) g -= row_at(rows, i, j, lanes) * dot;
    store_from_float(out, dtype, offset + j, lanes, g * inv);
  });
  return dot;
}

void finish_forward(Rows query, const void* key, const float* key_inv_norm, bool normalize, double tau, State state,
                    float* losses, float* stats, float* dquery, float* dtemperature) {
  const float scale = log2_scale(tau), inv_tau = static_cast<float>(1.0 / tau);
  const int64_t n = query.n, d = query.d;
  const Rows keys{key, query.dtype, n, d, key_inv_norm};
  parallel_for(n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float s = state.positive[i], m = state.max[i], top = max(s, m), shrink = exp2f((m - top) * scale);
      const float r_neg = state.sum[i] * shrink, e_pos = exp2f((s - top) * scale), total = r_neg + e_pos;
      losses[i] = r_neg < e_pos ? log1pf(r_neg / e_pos) : logf(total) + static_cast<float>((top - s) / tau);
      const float share = r_neg / total;
      stats[i] = top;
      stats[n + i] = 1.f / total;
      stats[2 * n + i] = share;
      if (!dquery) continue;
      float* v = dquery + i * d;
      for_each_vector(d, [&](int64_t j, int lanes) {
        const F o = load_lanes(state.o + i * state.ld + j, lanes, 0.f) * (shrink / total);
        store_lanes(v + j, lanes, (o - share * row_at(keys, i, j, lanes)) * inv_tau);
      });
      // dL/d(1/tau) = tau <q, dq>
      dtemperature[i] = -inv_tau * normalize_backward(query, i, normalize, v, dquery, DType::f32, i * d);
    }
  });
}

void backward_tile(Tile t, Excluded excluded, double tau, const float* max, const float* a) {
  const float scale = log2_scale(tau);
  parallel_for(t.rows, 8, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      exclude(t, excluded, row);
      float* s = t.s + row * t.ld;
      const float base = max[t.i0 + row], weight = a[t.i0 + row];
      for_each_vector(t.cols, [&](int64_t j, int lanes) {
        const F x = load_lanes(s + j, lanes, -kInf) * load_lanes(t.inv_norm + j, lanes, 1.f);
        store_lanes(s + j, lanes, exp2_nonpositive((x - base) * scale) * weight);
      });
    }
  });
}

void finish_candidates(Rows candidates, int64_t j0, int64_t rows, bool normalize, float* dc, int64_t ld, Rows query,
                       const float* pull, int64_t first, double tau, void* out) {
  const float inv_tau = static_cast<float>(1.0 / tau);
  const int64_t d = candidates.d;
  parallel_for(rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t i = j0 + row - first;
      const bool positive = first >= 0 && i >= 0 && i < query.n;
      float* v = dc + row * ld;
      for_each_vector(d, [&](int64_t j, int lanes) {
        F g = load_lanes(v + j, lanes, 0.f);
        if (positive) g -= row_at(query, i, j, lanes) * pull[i];
        store_lanes(v + j, lanes, g * inv_tau);
      });
      normalize_backward(candidates, j0 + row, normalize, v, out, candidates.dtype, (j0 + row) * d);
    }
  });
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{positives, forward_tile, finish_forward, backward_tile, finish_candidates};
}

}  // namespace sslops::info_nce
