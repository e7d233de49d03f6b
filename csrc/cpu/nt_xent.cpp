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
  int64_t n, views, m, d, split, padded, side;  // split: the rows of z0, which may be all; padded: m to whole groups
  Rows parts[2];                                // z0 and z1
  const int32_t* classes;                       // [N] or null
  Scale scale;
  DType operand_dtype;
  Buffer<int32_t> row_classes;
  Operand z;

  // inv_norm [M] is written here.
  Batch(const Tensor& z0, const Tensor& z1, const Tensor& classes, double temperature, bool normalize, DType operand,
        const Tensor& inv_norm)
      : n(z0.sizes[z0.dim - 2]),
        views(z1.dim ? 2 : z0.sizes[0]),
        m(views * n),
        d(z0.sizes[z0.dim - 1]),
        split(z1.dim ? n : m),
        padded(round_up(m, kGroup)),
        side(tile_side(m)),
        parts{{z0, normalize, inv_norm.as<float>()}, {z1.dim ? z1 : z0, normalize, inv_norm.as<float>() + split}},
        classes(classes.as<int32_t>()),
        scale(temperature, normalize),
        operand_dtype(operand),
        row_classes(classes ? padded : 0),
        z(m, d, operand) {
    for (int64_t i = 0; i < padded && classes; ++i) row_classes[i] = i < m ? this->classes[i % n] : -1;
    float* const inverse = inv_norm.as<float>();
    parallel_tickets((m + kGroup - 1) / kGroup, [&](int64_t ticket) {
      const int64_t first = ticket * kGroup, count = m - first < kGroup ? m - first : kGroup;
      for (int64_t i = first; i < first + count; ++i) inverse[i] = part(i).norm_of(place(i));
      z.fill(first, count, [&](int64_t i, int64_t j, int lanes) { return at(i, j, lanes); });
    });
  }

  const Rows& part(int64_t i) const { return parts[i >= split]; }
  int64_t place(int64_t i) const { return i < split ? i : i - split; }
  // Another view of row i, k = 1 .. views - 1; row i is the k-th from the end of that one.
  int64_t positive(int64_t i, int64_t k) const { return i + k * n < m ? i + k * n : i + k * n - m; }
  // Of the operand.
  SSLOPS_INLINE F at(int64_t i, int64_t j, int lanes) const {
    return round_to(operand_dtype, part(i).at(place(i), j, lanes));
  }
  // [views - 1, padded], of each row with its positives: the very numbers that the tiles of S hold there. Where all
  // pairs are alike they cancel.
  void positives(float* similarity) const {
    constexpr int64_t kBlock = 32;
    const int64_t blocks = (m - n + kBlock - 1) / kBlock;
    parallel_tickets(
        blocks * (views - 1), [&] { return Tile(kBlock, z.bf16); },
        [&](int64_t ticket, Tile& tile) {
          const int64_t k = ticket / blocks + 1, first = ticket % blocks * kBlock, end = m - k * n;
          const int64_t count = end - first < kBlock ? end - first : kBlock;
          if (count <= 0) return;
          tile.multiply(z, k * n + first, count, z, first, count);
          float *const to = similarity + (k - 1) * padded, *const back = similarity + (views - k - 1) * padded;
          for (int64_t j = 0; j < count; ++j) to[first + j] = back[k * n + first + j] = tile.s[j * tile.ld + j];
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

void leave_out(float* s, int64_t width, const int32_t* classes, int32_t own) {
  for (int64_t j = 0; j < width; j += kLanes) {
    I others;
    std::memcpy(&others, classes + j, sizeof others);
    store(s + j, select(others == own, splat(-kInf), load(s + j)));
  }
}

// visit(part) over the tiles of S: on and above the diagonal, or all those of the rows of some examples. In both cases
// a row's tiles come in a fixed order, one at a time.
template <typename Visit>
void for_each_tile(const Batch& x, int64_t first, int64_t count, const Visit& visit) {
  const auto size = [](int64_t from, int64_t step, int64_t end) { return end - from < step ? end - from : step; };
  const auto product = [&](Tile& tile, int64_t i0, int64_t rows, int64_t j0, int64_t columns, bool mirrored) {
    tile.multiply(x.z, i0, rows, x.z, j0, columns);
    const Part part{tile.s, tile.ld, i0, rows, j0, columns, mirrored};
    // No view of the row's own example is a negative, and none of its class: -inf is a term of exactly 0.
    for (int64_t k = 0, example = i0 % x.n; k < rows; ++k, example = example + 1 < x.n ? example + 1 : 0) {
      float* const s = part.row(k);
      if (x.classes) {
        leave_out(s, part.width(), x.row_classes + j0, x.classes[example]);
      } else {
        for (int64_t j = example - j0; j < columns; j += x.n)
          if (j >= 0) s[j] = -kInf;
      }
      for (int64_t j = columns; j < part.width(); ++j) s[j] = -kInf;
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
        x.views * blocks, [&] { return Tile(kMaxSide, x.z.bf16); },
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

void forward(Tensor z0, Tensor z1, Tensor classes, Tensor positive_weights, double temperature, bool normalize,
             bool decoupled, DType operand, int64_t first, Tensor losses, Tensor logged, Tensor inv_norm,
             Tensor stats) {
  const Batch x(z0, z1, classes, temperature, normalize, operand, inv_norm);
  const int64_t rows = losses.numel, count = rows / x.views, padded = x.padded, pairs = x.views - 1;
  Buffer<float> top(padded), sums(padded), similarity(pairs * padded), exceeding(logged.numel ? pairs * padded : 0);
  for (int64_t i = 0; i < padded; ++i) top[i] = kLowest, sums[i] = 0.f;
  for (int64_t i = 0; i < pairs * padded; ++i) similarity[i] = 0.f;
  for (int64_t i = 0; i < pairs * padded && logged.numel; ++i) exceeding[i] = 0.f;
  x.positives(similarity);
  for_each_tile(x, first, count, [&](const Tile&, const Part& t) {
    if (!x.scale.fixed) raise(t, x.scale, top, sums);
    const auto run = x.scale.fixed ? t.mirrored ? add<true, true> : add<true, false>
                     : t.mirrored  ? add<false, true>
                                   : add<false, false>;
    run(t, x.scale.inverse, top, sums);
    for (int64_t k = 0; k < pairs && logged.numel; ++k)
      count_exceeding(t, similarity + k * padded, exceeding + k * padded);
  });
  const float part = 1.f / static_cast<float>(pairs);
  for (int64_t k = 0; k < rows; ++k) {
    const int64_t i = k / count * x.n + first + k % count;
    float* const kept = stats.as<float>() + k;
    // Of the maxima over one positive the lowest: no sum over the negatives vanishes under it, and what a higher
    // positive adds to its sum is beyond all of them.
    float loss = 0.f, inverse = 0.f, lowest = similarity[i];
    for (int64_t p = 1; p < pairs; ++p)
      lowest = similarity[p * padded + i] < lowest ? similarity[p * padded + i] : lowest;
    const float base = x.scale.fixed ? 1.f : decoupled ? top[i] : max(lowest, top[i]);
    const float weight = positive_weights ? positive_weights.as<float>()[i] : 1.f;
    for (int64_t p = 0; p < pairs; ++p) {
      const float s = similarity[p * padded + i];
      const Close close =
          decoupled ? Close::decoupled(s, sums[i], top[i], weight, x.scale) : Close(s, sums[i], top[i], x.scale);
      loss += close.loss * part;
      inverse += close.inverse * expf((base - close.top) * x.scale.inverse) * part;
      kept[(2 + p) * rows] = close.share * part;
      if (!logged.numel) continue;
      logged.as<float>()[p * rows + k] = s;
      logged.as<float>()[(pairs + p) * rows + k] = exceeding[p * padded + i];
    }
    losses.as<float>()[k] = loss;
    kept[0] = base;
    kept[rows] = inverse;
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

void backward(Tensor grad, Tensor z0, Tensor z1, Tensor classes, double temperature, bool normalize, DType operand,
              int64_t first, Tensor inv_norm, Tensor stats, Tensor dz0, Tensor dz1, Tensor dots) {
  const Batch x(z0, z1, classes, temperature, normalize, operand, inv_norm);
  const int64_t count = dots.numel / x.views, padded = x.padded, ld = x.z.ld;
  // Of a part, each view has rows of its own to the end of its last tile: no two threads write to one.
  const int64_t part = round_up(count, kGroup), rows = count == x.n ? padded : x.views * part;
  const auto place = [&](int64_t i) { return count == x.n ? i : i / x.n * part + i % x.n - first; };
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
  const float inverse = static_cast<float>(1. / x.scale.tau), *const shares = kept + 2 * x.m;
  parallel_for(x.views * count, kGroup, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t i = k / count * x.n + first + k % count;
      float* const v = dz + place(i) * ld;
      for (int64_t p = 1; p < x.views; ++p) {
        const int64_t other = x.positive(i, p);
        const float pull = g[i] * shares[(p - 1) * x.m + i] + g[other] * shares[(x.views - p - 1) * x.m + other];
        const float scaled = p + 1 < x.views ? 1.f : inverse;
        for_each_vector(x.d, [&](int64_t j, int lanes) {
          store_lanes(v + j, lanes, (load_lanes(v + j, lanes, 0.f) - pull * x.at(other, j, lanes)) * scaled);
        });
      }
      const bool second = z1.dim && k >= count;
      dots.as<float>()[k] = x.part(i).backward(x.place(i), v, second ? dz1 : dz0, second ? k - count : k);
    }
  });
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{forward, backward};
}

}  // namespace sslops::nt_xent
