#include "relic.h"

#include <math.h>

#include "../common/parallel.h"
#include "vec.h"

namespace sslops::relic {
namespace {

constexpr double kLog2e = 1.44269504088896340736;
constexpr float kLowest = -__FLT_MAX__;
constexpr int64_t kChunk = 32;  // rows of a tile that one thread takes; fixed, so that sums do not depend on threads
constexpr int64_t kMaxChunks = (kMaxTile + kChunk - 1) / kChunk;

enum Sum { kA, kB, kY, kE, kV, kAbove, kTerms, kMaxA = kTerms, kMaxB };
static_assert(kMaxB + 1 == kSums);
enum Stat { kTopA, kInvA, kTopB, kInvB, kC, kPull, kPositive, kExceeded };

// exp(s / tau) = 2^(s scale). Never 0: at an infinite temperature all pairs weigh the same.
float log2_scale(double tau) {
  const double scale = kLog2e / tau;
  return static_cast<float>(scale < __FLT_MIN__ ? __FLT_MIN__ : scale);
}

// Zero beyond the first n lanes.
SSLOPS_INLINE F first(F v, int n) {
  if (n == kLanes) return v;
  I lane;
  for (int k = 0; k < kLanes; ++k) lane[k] = k;
  return select(lane < n, v, F{});
}

// fn(chunk, first row, end row), chunks in parallel.
template <typename Fn>
void for_each_chunk(const Tile& t, Fn&& fn) {
  parallel_for((t.rows + kChunk - 1) / kChunk, 1, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      const int64_t last = (c + 1) * kChunk;
      fn(c, c * kChunk, last < t.rows ? last : t.rows);
    }
  });
}

// fn(first column, end column) where a row of the tile has negatives: at most twice, as the order is cyclic.
template <typename Fn>
SSLOPS_INLINE void for_each_range(const Tile& t, const Batch& x, int64_t row, Fn&& fn) {
  if (t.mirrored) return fn(0, t.cols);
  for (int64_t after : {int64_t{0}, x.n}) {
    const int64_t i = t.i0 + row - after - t.j0;
    const int64_t begin = i + 1 > 0 ? i + 1 : 0, end = i + x.negatives + 1 < t.cols ? i + x.negatives + 1 : t.cols;
    if (begin < end) fn(begin, end);
  }
}

// Raises the maxima of row i to at least these and scales its sums down accordingly.
SSLOPS_INLINE void raise(float* sums, int64_t n, int64_t i, float scale, float a, float b) {
  const auto at = [&](Sum k) -> float& { return sums[k * n + i]; };
  if (a > at(kMaxA)) {
    const float factor = exp2f((at(kMaxA) - a) * scale);
    for (Sum k : {kA, kY, kE}) at(k) *= factor;
    at(kMaxA) = a;
  }
  if (b > at(kMaxB)) {
    at(kB) *= exp2f((at(kMaxB) - b) * scale);
    at(kMaxB) = b;
  }
}

void raise_maxima(const Tile& t, const Batch& x, float scale, float* sums) {
  float columns[kMaxChunks][2][kMaxTile];
  for_each_chunk(t, [&](int64_t chunk, int64_t begin, int64_t end) {
    float *down_a = columns[chunk][0], *down_b = columns[chunk][1];
    if (t.mirrored)
      for (int64_t j = 0; j < t.cols; ++j) down_a[j] = down_b[j] = kLowest;
    for (int64_t row = begin; row < end; ++row) {
      F best_a = splat(kLowest), best_b = best_a;
      for_each_range(t, x, row, [&](int64_t from, int64_t to) {
        for_each_vector(to - from, [&](int64_t k, int lanes) {
          const int64_t j = from + k;
          const F a = load_lanes(t.a + row * t.ld + j, lanes, kLowest);
          const F b = load_lanes(t.b + row * t.ld + j, lanes, kLowest);
          best_a = max(a, best_a);
          best_b = max(b, best_b);
          if (!t.mirrored) return;
          store_lanes(down_a + j, lanes, max(b, load_lanes(down_a + j, lanes, kLowest)));
          store_lanes(down_b + j, lanes, max(a, load_lanes(down_b + j, lanes, kLowest)));
        });
      });
      raise(sums, x.n, t.i0 + row, scale, max(best_a), max(best_b));
    }
  });
  if (!t.mirrored) return;
  for (int64_t j = 0; j < t.cols; ++j) {
    float best_a = kLowest, best_b = kLowest;
    for (int64_t c = 0; c * kChunk < t.rows; ++c) {
      best_a = max(columns[c][0][j], best_a);
      best_b = max(columns[c][1][j], best_b);
    }
    raise(sums, x.n, t.j0 + j, scale, best_a, best_b);
  }
}

// Adds columns [from, to) of kRows rows to their own sums and, where the tile is mirrored, to their columns' [kTerms].
template <bool kFixed, bool kCount, bool kMirrored, int kRows>
SSLOPS_INLINE void add_rows(const Tile& t, const Batch& x, float scale, int64_t row, int64_t from, int64_t to,
                            const float* s_pos, float* sums, float (*columns)[kMaxTile]) {
  const float inv_tau = static_cast<float>(1. / x.tau);
  const float *max_a = sums + kMaxA * x.n, *max_b = sums + kMaxB * x.n;
  F total[kRows][kTerms]{};
  for_each_vector(to - from, [&](int64_t k, int lanes) {
    const int64_t j = from + k;
    const auto of_column = [&](const float* values) { return load_lanes(values + t.j0 + j, lanes, 0.f); };
    F down[kTerms]{};
    for (int r = 0; r < kRows; ++r) {
      const int64_t i = t.i0 + row + r;
      const F a = load_lanes(t.a + (row + r) * t.ld + j, lanes, 0.f);
      const F b = load_lanes(t.b + (row + r) * t.ld + j, lanes, 0.f);
      const auto power = [&](F s, auto top) { return first(exp2_nonpositive((s - top) * scale), lanes); };
      const F d = (b - a) * inv_tau, p = power(a, kFixed ? 1.f : max_a[i]), q = power(b, kFixed ? 1.f : max_b[i]);
      F* own = total[r];
      own[kA] += p;
      own[kB] += q;
      own[kY] += p * (b - s_pos[i]);
      own[kE] += p * d;
      if (kCount) own[kAbove] += first(select(a > s_pos[i], splat(1.f), F{}), lanes);
      F p_down = q, q_down = p;  // the mirror image has b for a
      if (kMirrored) {
        if (!kFixed) p_down = power(b, of_column(max_a)), q_down = power(a, of_column(max_b));
        down[kA] += p_down;
        down[kB] += q_down;
        down[kY] += p_down * (a - of_column(s_pos));
        down[kE] -= p_down * d;
        if (kCount) down[kAbove] += first(select(b > of_column(s_pos), splat(1.f), F{}), lanes);
      }
      if (kFixed) {
        // exp(d) - 1 - d = even(d) + odd(d): by their series where the difference would lose digits.
        const F z = d * d;
        const F even = z * (z * (z * 0.0013981894f + 0.041665795f) + 0.5f);
        const F odd = z * d * (z * (z * (1.f / 5040) + 1.f / 120) + 1.f / 6), gap = q - p;
        own[kV] += select(z < 0.25f, p * (even + odd), gap - p * d);
        if (kMirrored) down[kV] += select(z < 0.25f, q * (even - odd), q * d - gap);
      }
    }
    if (kMirrored)
      for (int k = 0; k < kTerms; ++k)
        if (k != kAbove || kCount) store_lanes(columns[k] + j, lanes, load_lanes(columns[k] + j, lanes, 0.f) + down[k]);
  });
  for (int r = 0; r < kRows; ++r)
    for (int k = 0; k < kTerms; ++k) sums[k * x.n + t.i0 + row + r] += sum(total[r][k]);
}

template <bool kFixed, bool kCount>
void forward_tile_as(const Tile& t, const Batch& x, float scale, const float* s_pos, float* sums) {
  if (!t.mirrored)
    return for_each_chunk(t, [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        for_each_range(t, x, row, [&](int64_t from, int64_t to) {
          add_rows<kFixed, kCount, false, 1>(t, x, scale, row, from, to, s_pos, sums, nullptr);
        });
    });
  float column_sum[kMaxChunks][kTerms][kMaxTile];
  for_each_chunk(t, [&](int64_t chunk, int64_t begin, int64_t end) {
    auto* columns = column_sum[chunk];
    std::memset(columns, 0, sizeof column_sum[0]);
    int64_t row = begin;
    for (; row + 2 <= end; row += 2)
      add_rows<kFixed, kCount, true, 2>(t, x, scale, row, 0, t.cols, s_pos, sums, columns);
    for (; row < end; ++row) add_rows<kFixed, kCount, true, 1>(t, x, scale, row, 0, t.cols, s_pos, sums, columns);
  });
  for (int k = 0; k < kTerms; ++k)
    for (int64_t j = 0; j < t.cols; ++j) {
      float total = 0.f;
      for (int64_t c = 0; c * kChunk < t.rows; ++c) total += column_sum[c][k][j];
      sums[k * x.n + t.j0 + j] += total;
    }
}

void forward_tile(Tile t, Batch x, bool count, const float* s_pos, float* sums) {
  const float scale = log2_scale(x.tau);
  if (!x.fixed) raise_maxima(t, x, scale, sums);
  const auto add = x.fixed ? count ? forward_tile_as<true, true> : forward_tile_as<true, false>
                   : count ? forward_tile_as<false, true>
                           : forward_tile_as<false, false>;
  add(t, x, scale, s_pos, sums);
}

void finish_forward(Batch x, const float* s_pos, const float* sums, float* losses, float* stats) {
  const double scale = log2_scale(x.tau);
  struct Softmax {
    double top, shrink, total, negatives, loss;  // relative to the maximum; shares; -log of the positive's share
  };
  const auto softmax = [&](float s, float negatives, float top_negative) {
    const double top = x.fixed ? 1. : max(s, top_negative),
                 shrink = exp2(((x.fixed ? 1. : top_negative) - top) * scale);
    const double rest = negatives * shrink, positive = exp2((s - top) * scale), total = rest + positive;
    const double loss = rest < positive ? log1p(rest / positive) : log(total) + (top - s) / x.tau;
    return Softmax{top, shrink, total, rest / total, loss};
  };
  parallel_for(x.n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto at = [&](Sum k) { return sums[k * x.n + i]; };
      const Softmax p = softmax(s_pos[i], at(kA), at(kMaxA)), q = softmax(s_pos[i], at(kB), at(kMaxB));
      const double to_mean = p.shrink / p.total, y = at(kY) * to_mean / x.tau;
      // KL = log E_p[exp(d)] - E_p[d], d = b - a; where p and q are close, a difference of numbers of its own size.
      const double u = x.fixed ? (q.total - p.total) / p.total : 1.;
      const double divergence =
          u > -0.5 && u < 0.5 ? at(kV) * to_mean - (u - log1p(u)) : q.loss - p.loss - at(kE) * to_mean;
      losses[i] = static_cast<float>(x.alpha * p.loss + x.beta * divergence);
      const double pull = x.alpha * p.negatives - x.beta * ((1. - p.negatives) * y + p.negatives - q.negatives);
      const double kept[kStats] = {p.top, 1. / p.total, q.top,     1. / q.total, x.alpha + x.beta * y,
                                   pull,  s_pos[i],     at(kAbove)};
      for (int k = 0; k < kStats; ++k) stats[k * x.n + i] = static_cast<float>(kept[k]);
    }
  });
}

template <bool kFixed, bool kMirrored>
SSLOPS_INLINE void backward_row(const Tile& t, const Batch& x, float scale, int64_t row, int64_t from, int64_t to,
                                const float* grad, const float* stats) {
  const float kappa = static_cast<float>(x.beta / x.tau);
  const int64_t i = t.i0 + row;
  const auto of_row = [&](Stat k) { return stats[k * x.n + i]; };
  const float top_a = of_row(kTopA), top_b = of_row(kTopB), c = of_row(kC), s = of_row(kPositive);
  const float weight_p = grad[i] * of_row(kInvA), weight_q = grad[i] * of_row(kInvB);
  for_each_vector(to - from, [&](int64_t k, int lanes) {
    const int64_t j = from + k;
    float *at_a = t.a + row * t.ld + j, *at_b = t.b + row * t.ld + j;
    const F a = load_lanes(at_a, lanes, 0.f), b = load_lanes(at_b, lanes, 0.f);
    const auto power = [&](F v, auto top) { return exp2_nonpositive((v - top) * scale); };
    const F e_a = power(a, kFixed ? 1.f : top_a), e_b = power(b, kFixed ? 1.f : top_b);
    const F p = e_a * weight_p;
    F w_a = p * (c - kappa * (b - s)), w_b = x.beta * (e_b * weight_q - p);
    if (kMirrored) {
      const auto of_column = [&](Stat k) { return load_lanes(stats + k * x.n + t.j0 + j, lanes, 0.f); };
      const F g = load_lanes(grad + t.j0 + j, lanes, 0.f);
      const F p_down = (kFixed ? e_b : power(b, of_column(kTopA))) * (g * of_column(kInvA));
      const F q_down = (kFixed ? e_a : power(a, of_column(kTopB))) * (g * of_column(kInvB));
      w_a += x.beta * (q_down - p_down);
      w_b += p_down * (of_column(kC) - kappa * (a - of_column(kPositive)));
    }
    store_lanes(at_a, lanes, w_a);
    store_lanes(at_b, lanes, w_b);
  });
}

template <bool kFixed>
void backward_tile_as(const Tile& t, const Batch& x, float scale, const float* grad, const float* stats) {
  for_each_chunk(t, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      if (t.mirrored) {
        backward_row<kFixed, true>(t, x, scale, row, 0, t.cols, grad, stats);
        continue;
      }
      int64_t done = 0;
      const auto clear = [&](int64_t to) {
        for (float* s : {t.a, t.b})
          if (to > done) std::memset(s + row * t.ld + done, 0, (to - done) * sizeof(float));
      };
      int64_t ranges[2][2], count = 0;
      for_each_range(t, x, row, [&](int64_t from, int64_t to) { ranges[count][0] = from, ranges[count++][1] = to; });
      while (count--) {  // the wrapped range comes first in the row
        const auto [from, to] = ranges[count];
        clear(from);
        backward_row<kFixed, false>(t, x, scale, row, from, to, grad, stats);
        done = to;
      }
      clear(t.cols);
    }
  });
}

void backward_tile(Tile t, Batch x, const float* grad, const float* stats) {
  (x.fixed ? backward_tile_as<true> : backward_tile_as<false>)(t, x, log2_scale(x.tau), grad, stats);
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{forward_tile, finish_forward, backward_tile};
}

}  // namespace sslops::relic
