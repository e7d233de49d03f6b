#include "nt_xent.h"

#include <math.h>

#include "../common/parallel.h"
#include "vec.h"

namespace sslops::nt_xent {
namespace {

constexpr double kLog2e = 1.44269504088896340736;
constexpr float kEps = 1e-12f;
constexpr float kInf = __builtin_inff(), kLowest = -__FLT_MAX__;
constexpr int64_t kChunk = 32;  // rows of a tile that one thread takes; fixed, so that sums do not depend on threads
constexpr int64_t kMaxChunks = (kMaxTile + kChunk - 1) / kChunk;

// exp(s / tau) = 2^(s scale). Never 0: at an infinite temperature all pairs weigh the same, but -inf stays -inf.
float log2_scale(double tau) {
  const double scale = kLog2e / tau;
  return static_cast<float>(scale < __FLT_MIN__ ? __FLT_MIN__ : scale);
}

struct View {
  const void *z0, *z1;
  DType dtype;
  int64_t n, d;
  F at(int64_t row, int64_t col, int lanes) const {
    return row < n ? load_as_float(z0, dtype, row * d + col, lanes)
                   : load_as_float(z1, dtype, (row - n) * d + col, lanes);
  }
};

void normalize(const void* z0, const void* z1, DType dtype, int64_t n, int64_t d, bool normalize, DType operand,
               float* z, float* inv_norm) {
  const View x{z0, z1, dtype, n, d};
  parallel_for(2 * n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float inv = 1.f;
      if (normalize) {
        D squares{};  // double: no float32 row overflows
        for_each_vector(d, [&](int64_t j, int lanes) {
          const D v = __builtin_convertvector(x.at(i, j, lanes), D);
          squares += v * v;
        });
        const double norm = __builtin_sqrt(sum(squares));
        inv = static_cast<float>(1.0 / (norm < kEps ? static_cast<double>(kEps) : norm));
      }
      inv_norm[i] = inv;
      for_each_vector(d, [&](int64_t j, int lanes) {
        store_lanes(z + i * d + j, lanes, round_to(operand, x.at(i, j, lanes) * inv));
      });
    }
  });
}

// Neither an example with itself nor its positive is a negative: -inf here is a term of exactly 0 below.
void mask_row(const Tile& t, int64_t row) {
  const int64_t i = t.i0 + row, positive = i < t.n ? i + t.n : i - t.n;
  for (int64_t j : {i - t.j0, positive - t.j0})
    if (j >= 0 && j < t.cols) t.s[row * t.ld + j] = -kInf;
}

// The same, once the positive is read, by the first of its two rows: (k, k + N) lies above the diagonal.
void take_positive(const Tile& t, int64_t row, float* s_pos) {
  const int64_t i = t.i0 + row, j = i + t.n - t.j0;
  if (i < t.n && j >= 0 && j < t.cols) s_pos[i] = t.s[row * t.ld + j];
  mask_row(t, row);
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

// Raises m to the maxima of the tile and scales r down accordingly.
void raise_maximum(const Tile& t, float scale, float* m, float* r, float* s_pos) {
  float column_max[kMaxChunks][kMaxTile];
  const auto raise = [&](int64_t i, float candidate) {
    if (candidate > m[i]) {
      r[i] *= exp2f((m[i] - candidate) * scale);
      m[i] = candidate;
    }
  };
  for_each_chunk(t, [&](int64_t chunk, int64_t begin, int64_t end) {
    float* columns = column_max[chunk];
    for (int64_t j = 0; j < t.cols; ++j) columns[j] = kLowest;
    for (int64_t row = begin; row < end; ++row) {
      take_positive(t, row, s_pos);
      F best = splat(kLowest);
      for_each_vector(t.cols, [&](int64_t j, int lanes) {
        const F s = load_lanes(t.s + row * t.ld + j, lanes, -kInf);
        best = max(s, best);
        store_lanes(columns + j, lanes, max(s, load_lanes(columns + j, lanes, kLowest)));
      });
      raise(t.i0 + row, max(best));
    }
  });
  if (!t.mirrored) return;
  for (int64_t j = 0; j < t.cols; ++j) {
    float best = kLowest;
    for (int64_t c = 0; c * kChunk < t.rows; ++c) best = max(column_max[c][j], best);
    raise(t.j0 + j, best);
  }
}

// Adds kRows rows to their own sums in r and, where there are columns, to theirs.
template <bool kFixed, int kRows>
SSLOPS_INLINE void add_rows(const Tile& t, int64_t row, float scale, const float* m, float* r, float* columns) {
  F totals[kRows]{};
  for_each_vector(t.cols, [&](int64_t j, int lanes) {
    F down{};
    for (int k = 0; k < kRows; ++k) {
      const F v = load_lanes(t.s + (row + k) * t.ld + j, lanes, -kInf);
      const F e = exp2_nonpositive((v - (kFixed ? 1.f : m[t.i0 + row + k])) * scale);
      totals[k] += e;
      if (kFixed)
        down += e;
      else if (columns)
        down += exp2_nonpositive((v - load_lanes(m + t.j0 + j, lanes, 0.f)) * scale);
    }
    if (columns) store_lanes(columns + j, lanes, load_lanes(columns + j, lanes, 0.f) + down);
  });
  for (int k = 0; k < kRows; ++k) r[t.i0 + row + k] += sum(totals[k]);
}

template <bool kFixed>
void forward_tile_as(const Tile& t, float scale, const float* m, float* r, float* s_pos) {
  float column_sum[kMaxChunks][kMaxTile];
  for_each_chunk(t, [&](int64_t chunk, int64_t begin, int64_t end) {
    float* columns = t.mirrored ? column_sum[chunk] : nullptr;
    if (columns)
      for (int64_t j = 0; j < t.cols; ++j) columns[j] = 0.f;
    if (kFixed)
      for (int64_t row = begin; row < end; ++row) take_positive(t, row, s_pos);
    int64_t row = begin;
    for (; row + 4 <= end; row += 4) add_rows<kFixed, 4>(t, row, scale, m, r, columns);
    for (; row < end; ++row) add_rows<kFixed, 1>(t, row, scale, m, r, columns);
  });
  if (!t.mirrored) return;
  for (int64_t j = 0; j < t.cols; ++j) {
    float total = 0.f;
    for (int64_t c = 0; c * kChunk < t.rows; ++c) total += column_sum[c][j];
    r[t.j0 + j] += total;
  }
}

void forward_tile(Tile t, double tau, bool fixed, float* m, float* r, float* s_pos) {
  const float scale = log2_scale(tau);
  if (fixed) return forward_tile_as<true>(t, scale, m, r, s_pos);
  raise_maximum(t, scale, m, r, s_pos);
  forward_tile_as<false>(t, scale, m, r, s_pos);
}

void count_tile(Tile t, const float* bar, float* above) {
  parallel_for(t.rows, kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      I count{};
      const F least = splat(bar[t.i0 + row]);
      for_each_vector(t.cols, [&](int64_t j, int lanes) {
        const F s = load_lanes(t.s + row * t.ld + j, lanes, -kInf);
        count = s > least ? count + 1 : count;
      });
      above[t.i0 + row] += sum(__builtin_convertvector(count, F));
    }
  });
  if (!t.mirrored) return;
  parallel_for((t.cols + kLanes - 1) / kLanes, kChunk / kLanes, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin * kLanes; j < end * kLanes && j < t.cols; j += kLanes) {
      const int lanes = static_cast<int>(t.cols - j < kLanes ? t.cols - j : kLanes);
      I count{};
      const F least = load_lanes(bar + t.j0 + j, lanes, 0.f);
      for (int64_t row = 0; row < t.rows; ++row) {
        const F s = load_lanes(t.s + row * t.ld + j, lanes, -kInf);
        count = s > least ? count + 1 : count;
      }
      const F total = load_lanes(above + t.j0 + j, lanes, 0.f) + __builtin_convertvector(count, F);
      store_lanes(above + t.j0 + j, lanes, total);
    }
  });
}

void finish_forward(Own own, double tau, bool fixed, const float* m, const float* r, const float* s_pos, float* losses,
                    float* stats) {
  const float scale = log2_scale(tau);
  const int64_t rows = 2 * own.count;
  for (int64_t k = 0; k < rows; ++k) {
    const int64_t i = own.row(k);
    const float s = s_pos[i < own.n ? i : i - own.n], m_neg = fixed ? 1.f : m[i], top = fixed ? 1.f : max(s, m_neg);
    const float r_neg = r[i] * exp2f((m_neg - top) * scale), e_pos = exp2f((s - top) * scale), total = r_neg + e_pos;
    losses[k] = r_neg < e_pos ? log1pf(r_neg / e_pos) : logf(total) + static_cast<float>((top - s) / tau);
    stats[k] = top;
    stats[rows + k] = 1.f / total;
    stats[2 * rows + k] = r_neg / total;
  }
}

template <bool kFixed>
void backward_tile_as(const Tile& t, float scale, const float* m, const float* a) {
  for_each_chunk(t, [&](int64_t, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      mask_row(t, row);
      float* s = t.s + row * t.ld;
      const int64_t i = t.i0 + row;
      const float top = kFixed ? 1.f : m[i], a_i = a[i];
      for_each_vector(t.cols, [&](int64_t j, int lanes) {
        const F v = load_lanes(s + j, lanes, -kInf), a_j = load_lanes(a + t.j0 + j, lanes, 0.f);
        const F e = exp2_nonpositive((v - top) * scale);
        F w;
        if constexpr (kFixed)
          w = e * (a_i + a_j);
        else
          w = e * a_i + exp2_nonpositive((v - load_lanes(m + t.j0 + j, lanes, 0.f)) * scale) * a_j;
        store_lanes(s + j, lanes, w);
      });
    }
  });
}

void backward_tile(Tile t, double tau, bool fixed, const float* m, const float* a) {
  const float scale = log2_scale(tau);
  fixed ? backward_tile_as<true>(t, scale, m, a) : backward_tile_as<false>(t, scale, m, a);
}

void finish_backward(const void* z0, const void* z1, DType dtype, Own own, int64_t d, bool normalize, double tau,
                     const float* grad, const float* z, const float* inv_norm, const float* stats, float* dz,
                     int64_t ld, void* dz0, void* dz1, float* dots) {
  const int64_t n = own.n;
  const View x{z0, z1, dtype, n, d};
  const float* negative_share = stats + 4 * n;
  const float inv_tau = static_cast<float>(1.0 / tau);
  parallel_for(2 * own.count, 64, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t i = own.row(k);
      const int64_t positive = i < n ? i + n : i - n;
      const float inv = inv_norm[i];
      const float pull = grad[i] * negative_share[i] + grad[positive] * negative_share[positive];
      float* g = dz + i * ld;
      F product{};
      for_each_vector(d, [&](int64_t j, int lanes) {
        const F v = (load_lanes(g + j, lanes, 0.f) - pull * load_lanes(z + positive * d + j, lanes, 0.f)) * inv_tau;
        store_lanes(g + j, lanes, v);
        product += x.at(i, j, lanes) * inv * v;
      });
      const float dot = sum(product);
      dots[k] = dot;
      // At a clamped norm F.normalize is a plain scaling: nothing to project out.
      const bool project = normalize && inv < 1.f / kEps;
      void* out = k < own.count ? dz0 : dz1;
      for_each_vector(d, [&](int64_t j, int lanes) {
        F v = load_lanes(g + j, lanes, 0.f);
        if (project) v -= x.at(i, j, lanes) * (inv * dot);
        store_from_float(out, dtype, (k < own.count ? k : k - own.count) * d + j, lanes, v * inv);
      });
    }
  });
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{normalize, forward_tile, count_tile, finish_forward, backward_tile, finish_backward};
}

}  // namespace sslops::nt_xent
