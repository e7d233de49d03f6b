#include "nt_xent.h"

#include "rows.h"
#include "softmax.h"
#include "tiles.h"
#include "tournament.h"

namespace sslops::nt_xent {
namespace {

// Small enough to give every thread a tile. Fixed by M: results do not depend on the threads.
int64_t tile_side(int64_t m) { return m <= 512 ? 64 : m <= 8192 ? 128 : 256; }
constexpr int64_t kMaxSide = 256;

struct Batch {
  Rows views[2];
  int64_t n, m, d, side;
  Scale scale;
  DType operand_dtype;
  Operand z;

  // inv_norm [2N] is written here.
  Batch(const Tensor& z0, const Tensor& z1, double temperature, bool normalize, DType operand, const Tensor& inv_norm)
      : views{{z0, normalize, inv_norm.as<float>()}, {z1, normalize, inv_norm.as<float>() + z0.sizes[0]}},
        n(z0.sizes[0]),
        m(2 * n),
        d(z0.sizes[1]),
        side(tile_side(m)),
        scale(temperature, normalize),
        operand_dtype(operand),
        z(m, d, operand) {
    float* const inverse = inv_norm.as<float>();
    parallel_tickets((m + kGroup - 1) / kGroup, [&](int64_t ticket) {
      const int64_t first = ticket * kGroup, count = m - first < kGroup ? m - first : kGroup;
      for (int64_t i = first; i < first + count; ++i) inverse[i] = view(i).norm_of(i % n);
      z.fill(first, count, [&](int64_t i, int64_t j, int lanes) { return at(i, j, lanes); });
    });
  }

  const Rows& view(int64_t i) const { return views[i >= n]; }
  int64_t positive(int64_t i) const { return i < n ? i + n : i - n; }
  // Of the operand.
  SSLOPS_INLINE F at(int64_t i, int64_t j, int lanes) const {
    return round_to(operand_dtype, view(i).at(i < n ? i : i - n, j, lanes));
  }
  // [2N], of each row with its positive: the very numbers that the tiles of S hold there. Where all pairs are alike
  // they cancel.
  void positives(float* similarity) const {
    constexpr int64_t kBlock = 32;
    parallel_tickets((n + kBlock - 1) / kBlock, [&] { return Tile(kBlock, z.bf16); },
                     [&](int64_t ticket, Tile& tile) {
                       const int64_t first = ticket * kBlock, count = n - first < kBlock ? n - first : kBlock;
                       tile.multiply(z, n + first, count, z, first, count);
                       for (int64_t k = 0; k < count; ++k)
                         similarity[first + k] = similarity[n + first + k] = tile.s[k * tile.ld + k];
                     });
  }
};

// A tile of S: rows i0.., columns j0... If mirrored (then j0 > i0), it also stands for its transpose.
struct Part {
  float* s;
  int64_t ld, i0, rows, j0, columns;
  bool mirrored;

  float* row(int64_t k) const { return s + k * ld; }
  // up to a whole number of vectors
  int64_t width() const { return round_up(columns, kLanes); }
};

// visit(part) over the tiles of S: on and above the diagonal, or all those of the rows of some examples. In both cases
// a row's tiles come in a fixed order, one at a time.
template <typename Visit>
void for_each_tile(const Batch& x, int64_t first, int64_t count, const Visit& visit) {
  const auto size = [](int64_t from, int64_t step, int64_t end) { return end - from < step ? end - from : step; };
  const auto product = [&](Tile& tile, int64_t i0, int64_t rows, int64_t j0, int64_t columns, bool mirrored) {
    tile.multiply(x.z, i0, rows, x.z, j0, columns);
    const Part part{tile.s, tile.ld, i0, rows, j0, columns, mirrored};
    // Neither an example with itself nor its positive is a negative: -inf is a term of exactly 0.
    for (int64_t k = 0; k < rows; ++k) {
      for (int64_t j : {i0 + k - j0, x.positive(i0 + k) - j0})
        if (j >= 0 && j < columns) part.row(k)[j] = -kInf;
      for (int64_t j = columns; j < part.width(); ++j) part.row(k)[j] = -kInf;
    }
    visit(tile, part);
  };
  if (count == x.n) {
    const Tournament panels((x.m + x.side - 1) / x.side);
    panels.run([&] { return Tile(x.side, x.z.bf16); },
               [&](int64_t i, int64_t j, Tile& tile) {
                 const int64_t i0 = i * x.side, j0 = j * x.side;
                 if (i != j) return product(tile, i0, x.side, j0, size(j0, x.side, x.m), true);
                 // Symmetry saves nothing in the tiles on the diagonal: they are small.
                 const int64_t end = i0 + size(i0, x.side, x.m);
                 for (int64_t a = i0; a < end; a += kGroup)
                   for (int64_t b = a; b < end; b += kGroup)
                     product(tile, a, size(a, kGroup, end), b, size(b, kGroup, end), a != b);
               });
  } else {
    const int64_t blocks = (count + kGroup - 1) / kGroup;
    parallel_tickets(
        2 * blocks, [&] { return Tile(kMaxSide, x.z.bf16); },
        [&](int64_t ticket, Tile& tile) {
          const int64_t view = ticket / blocks * x.n + first, from = ticket % blocks * kGroup;
          for (int64_t j = 0; j < x.m; j += kMaxSide)
            product(tile, view + from, size(from, kGroup, count), j, size(j, kMaxSide, x.m), false);
        });
  }
}

// Raises the maxima of the tile's rows and columns and scales their sums down accordingly.
void raise(const Part& t, const Scale& scale, float* top, float* sums) {
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
      const F s = load(t.row(k) + j);
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
void add(const Part& t, float inverse, const float* top, float* sums) {
  float columns[kMaxSide];
  for (int64_t j = 0; j < t.width(); ++j) columns[j] = 0.f;
  int64_t k = 0;
  for (; k + 4 <= t.rows; k += 4) add_rows<kFixed, kMirrored, 4>(t, k, inverse, top, sums, columns);
  for (; k < t.rows; ++k) add_rows<kFixed, kMirrored, 1>(t, k, inverse, top, sums, columns);
  for (int64_t j = 0; j < t.columns && kMirrored; ++j) sums[t.j0 + j] += columns[j];
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

void forward(Tensor z0, Tensor z1, double temperature, bool normalize, DType operand, int64_t first, Tensor losses,
             Tensor logged, Tensor inv_norm, Tensor stats) {
  const Batch x(z0, z1, temperature, normalize, operand, inv_norm);
  const int64_t rows = losses.numel, count = rows / 2, padded = round_up(x.m, kGroup);
  Buffer<float> top(padded), sums(padded), similarity(padded), exceeding(padded);
  for (int64_t i = 0; i < padded; ++i) top[i] = kLowest, sums[i] = similarity[i] = exceeding[i] = 0.f;
  x.positives(similarity);
  for_each_tile(x, first, count, [&](const Tile&, const Part& t) {
    if (!x.scale.fixed) raise(t, x.scale, top, sums);
    const auto run = x.scale.fixed ? t.mirrored ? add<true, true> : add<true, false>
                     : t.mirrored  ? add<false, true>
                                   : add<false, false>;
    run(t, x.scale.inverse, top, sums);
    if (logged.numel) count_exceeding(t, similarity, exceeding);
  });
  for (int64_t k = 0; k < rows; ++k) {
    const int64_t i = first + (k < count ? k : x.n + k - count);
    const Close close(similarity[i], sums[i], top[i], x.scale);
    losses.as<float>()[k] = close.loss;
    const float kept[] = {close.top, close.inverse, close.share};
    for (int64_t row = 0; row < 3; ++row) stats.as<float>()[row * rows + k] = kept[row];
    if (logged.numel) logged.as<float>()[k] = similarity[i], logged.as<float>()[rows + k] = exceeding[i];
  }
}

// S becomes W. top, weights [M]: of all rows, grad / r
template <bool kFixed>
void weigh(const Part& t, float inverse, const float* top, const float* weights) {
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

void backward(Tensor grad, Tensor z0, Tensor z1, double temperature, bool normalize, DType operand, int64_t first,
              Tensor inv_norm, Tensor stats, Tensor dz0, Tensor dz1, Tensor dots) {
  const Batch x(z0, z1, temperature, normalize, operand, inv_norm);
  const int64_t count = dz0.sizes[0], padded = round_up(x.m, kGroup), ld = x.z.ld;
  // Of a part, each view has rows of its own to the end of its last tile: no two threads write to one.
  const int64_t part = round_up(count, kGroup), rows = count == x.n ? padded : 2 * part;
  const auto place = [&](int64_t i) { return count == x.n ? i : i % x.n - first + (i < x.n ? 0 : part); };
  const float *const g = grad.as<float>(), *const kept = stats.as<float>();
  Buffer<float> top(padded), weights(padded), dz((rows + bf16_gemm::kBlock) * ld);
  for (int64_t i = 0; i < padded; ++i) {
    top[i] = i < x.m ? kept[i] : 0.f;
    weights[i] = i < x.m ? g[i] * kept[x.m + i] : 0.f;
  }
  parallel_for(rows, kGroup, [&](int64_t begin, int64_t end) {
    std::memset(dz + begin * ld, 0, (end - begin) * ld * sizeof(float));
  });
  for_each_tile(x, first, count, [&](Tile& tile, const Part& t) {
    (x.scale.fixed ? weigh<true> : weigh<false>)(t, x.scale.inverse, top, weights);
    tile.add(t.rows, t.columns, x.z, t.j0, dz + place(t.i0) * ld, x.z, t.i0, t.mirrored ? dz + t.j0 * ld : nullptr);
  });
  const float inverse = static_cast<float>(1. / x.scale.tau), *const share = kept + 2 * x.m;
  parallel_for(2 * count, kGroup, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t i = first + (k < count ? k : x.n + k - count), other = x.positive(i);
      const float pull = g[i] * share[i] + g[other] * share[other];
      float* const v = dz + place(i) * ld;
      for_each_vector(x.d, [&](int64_t j, int lanes) {
        store_lanes(v + j, lanes, (load_lanes(v + j, lanes, 0.f) - pull * x.at(other, j, lanes)) * inverse);
      });
      dots.as<float>()[k] = x.view(i).backward(i % x.n, v, k < count ? dz0 : dz1, k % count);
    }
  });
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{forward, backward};
}

}  // namespace sslops::nt_xent
