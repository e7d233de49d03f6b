// A tile of S and its softmax, of its rows and of its columns: the running sums, what is counted for metrics, and the
// weights of the way back.
#pragma once
#include "softmax.h"

namespace sslops {
namespace {

// Small enough to give every thread a tile. Fixed by M: results do not depend on the threads.
int64_t tile_side(int64_t m) { return m <= 512 ? 64 : m <= 8192 ? 128 : 256; }
constexpr int64_t kMaxSide = 256;

// A tile of S: rows i0.., columns j0.. of those that are summed over. If mirrored, it counts for its columns too: it
// also stands for its transpose (then j0 > i0), or the loss goes both ways.
struct Part {
  float* s;
  int64_t ld, i0, rows, j0, columns;
  bool mirrored;

  float* row(int64_t k) const { return s + k * ld; }
  // up to a whole number of vectors
  int64_t width() const { return round_up(columns, kLanes); }
};

// Raises the maxima of the tile's rows and columns, over what of(k, j, s) makes of s, and scales their sums down
// accordingly.
template <typename Of>
void raise(const Part& t, const Scale& scale, float* top, float* sums, const Of& of) {
  float columns[kMaxSide];
  const auto raise_one = [&](int64_t i, float candidate) {
    if (!(candidate > top[i])) return;
    sums[i] *= expf((top[i] - candidate) * scale.inverse);
    top[i] = candidate;
  };
  for (int64_t j = 0; j < t.width(); ++j) columns[j] = kLowest;
  for (int64_t k = 0; k < t.rows; ++k) {
    F best = splat(kLowest);
    for (int64_t j = 0; j < t.width(); j += kLanes) {
      const F s = of(k, j, load(t.row(k) + j));
      best = max(s, best);
      store(columns + j, max(s, load(columns + j)));
    }
    raise_one(t.i0 + k, max(best));
  }
  for (int64_t j = 0; j < t.columns && t.mirrored; ++j) raise_one(t.j0 + j, columns[j]);
}

// Adds kCount rows to their own sums and, where the tile is mirrored, to those of its columns.
template <bool kFixed, bool kMirrored, int kCount>
SSLOPS_INLINE void add_rows(const Part& t, int64_t k, float inverse, const float* top, float* sums, float* columns) {
  F totals[kCount]{};
  for (int64_t j = 0; j < t.width(); j += kLanes) {
    F down = kMirrored ? load(columns + j) : F{};
    for (int r = 0; r < kCount; ++r) {
      const F s = load(t.row(k + r) + j);
      const F e = exp_nonpositive((s - (kFixed ? 1.f : top[t.i0 + k + r])) * inverse);
      totals[r] += e;
      if (kMirrored) down += kFixed ? e : exp_nonpositive((s - load(top + t.j0 + j)) * inverse);
    }
    if (kMirrored) store(columns + j, down);
  }
  for (int r = 0; r < kCount; ++r) sums[t.i0 + k + r] += sum(totals[r]);
}

template <bool kFixed, bool kMirrored>
void add_all(const Part& t, float inverse, const float* top, float* sums) {
  float columns[kMaxSide];
  for (int64_t j = 0; j < t.width(); ++j) columns[j] = 0.f;
  int64_t k = 0;
  for (; k + 4 <= t.rows; k += 4) add_rows<kFixed, kMirrored, 4>(t, k, inverse, top, sums, columns);
  for (; k < t.rows; ++k) add_rows<kFixed, kMirrored, 1>(t, k, inverse, top, sums, columns);
  for (int64_t j = 0; j < t.columns && kMirrored; ++j) sums[t.j0 + j] += columns[j];
}

// The tile's terms exp((s - top) / tau) join the sums, whose maxima rise first.
void add(const Part& t, const Scale& scale, float* top, float* sums) {
  if (!scale.fixed) raise(t, scale, top, sums, [](int64_t, int64_t, F s) { return s; });
  const auto run = scale.fixed  ? t.mirrored ? add_all<true, true> : add_all<true, false>
                   : t.mirrored ? add_all<false, true>
                                : add_all<false, false>;
  run(t, scale.inverse, top, sums);
}

// How many of the tile's negatives exceed the similarity of their row's positive, and of their column's.
void count_exceeding(const Part& t, const float* similarity, float* exceeding) {
  float columns[kMaxSide];
  for (int64_t j = 0; j < t.width(); ++j) columns[j] = 0.f;
  for (int64_t k = 0; k < t.rows; ++k) {
    F count{};
    const F bar = splat(similarity[t.i0 + k]);
    for (int64_t j = 0; j < t.width(); j += kLanes) {
      const F s = load(t.row(k) + j), one = splat(1.f);
      count += select(s > bar, one, F{});
      if (t.mirrored) store(columns + j, load(columns + j) + select(s > load(similarity + t.j0 + j), one, F{}));
    }
    exceeding[t.i0 + k] += sum(count);
  }
  for (int64_t j = 0; j < t.columns && t.mirrored; ++j) exceeding[t.j0 + j] += columns[j];
}

template <bool kFixed>
void weigh_all(const Part& t, float inverse, const float* top, const float* weights) {
  for (int64_t k = 0; k < t.rows; ++k) {
    float* const s = t.row(k);
    const float own_top = kFixed ? 1.f : top[t.i0 + k], own = weights[t.i0 + k];
    for (int64_t j = 0; j < t.width(); j += kLanes) {
      const F v = load(s + j), other = load(weights + t.j0 + j), e = exp_nonpositive((v - own_top) * inverse);
      if constexpr (kFixed)
        store(s + j, e * (own + other));
      else
        store(s + j, e * own + exp_nonpositive((v - load(top + t.j0 + j)) * inverse) * other);
    }
  }
}

// S becomes W. weights: grad / r, as top of all that is summed over
void weigh(const Part& t, const Scale& scale, const float* top, const float* weights) {
  (scale.fixed ? weigh_all<true> : weigh_all<false>)(t, scale.inverse, top, weights);
}

}  // namespace
}  // namespace sslops
