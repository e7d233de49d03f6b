#include "relic.h"

#include "rows.h"
#include "softmax.h"
#include "tiles.h"
#include "tournament.h"

namespace sslops::relic {
namespace {

constexpr int64_t kMaxSide = 128, kMaxHeld = 16 << 20;  // bytes of tiles that forward may hold

// Over the negatives of a row, with d = (b - a) / tau and p = exp((a - top of a) / tau): the sums of p, of the same of
// b, of p (b - positive), p d, p (exp(d) - 1 - d) (at a fixed maximum); the maxima; how many a exceed the positive.
enum Sum { kA, kB, kY, kE, kV, kTerms, kTopA = kTerms, kTopB, kExceeding, kSums };
enum Stat { kStatTopA, kInverseA, kStatTopB, kInverseB, kMeanY, kPull, kPositive, kCount, kStats };

// Which panels of rows have pairs, i with j if one's rows are negatives of the other's; j >= i.
struct Panels {
  int64_t n, negatives, side, count;
  Buffer<int64_t> first;  // of each panel's tiles, among those of all

  Panels(int64_t n, int64_t negatives)
      : n(n),
        negatives(negatives),
        // Small enough to give every thread a tile, and not to be empty for the most part in a narrow band. Fixed by
        // the batch: results do not depend on the threads.
        side(n <= 512 || negatives <= kGroup ? kGroup : kMaxSide),
        count((n + side - 1) / side),
        first(count + 1) {
    first[0] = 0;
    for (int64_t i = 0; i < count; ++i) first[i + 1] = first[i] + near_end(i) - i + count - far_begin(i);
  }

  // Up to near_end the rows of j follow those of i; from far_begin on, those of i follow them in cyclic order.
  int64_t near_end(int64_t i) const {
    const int64_t end = (i + 1) * side + negatives;
    return end < n ? (end + side - 1) / side : count;
  }
  int64_t far_begin(int64_t i) const {
    const int64_t begin = (n - negatives + i * side) / side, end = near_end(i);
    return begin < end ? end : begin < count ? begin : count;
  }
  bool meet(int64_t i, int64_t j) const { return j < near_end(i) || j >= far_begin(i); }
  int64_t place(int64_t i, int64_t j) const {
    return first[i] + j - (j < near_end(i) ? i : i + far_begin(i) - near_end(i));
  }
  // Of a pair's two tiles, in floats.
  int64_t size() const { return 2 * side * stride_of(side); }
  // Whether forward can hold all tiles until their gradients are known.
  bool held() const { return first[count] * size() * static_cast<int64_t>(sizeof(float)) <= kMaxHeld; }
};

struct Batch : Panels {
  int64_t d, padded;
  float alpha, beta;
  Scale scale;
  DType operand_dtype;
  Buffer<float> inv_norm;
  Rows views[2];
  Operand online, target;

  Batch(const Tensor& o, const Tensor& t, double temperature, double alpha, double beta, int64_t negatives,
        bool normalize, DType operand)
      : Panels(o.sizes[0], negatives),
        d(o.sizes[1]),
        padded(round_up(n, kGroup)),
        alpha(static_cast<float>(alpha)),
        beta(static_cast<float>(beta)),
        scale(temperature, normalize),
        operand_dtype(operand),
        inv_norm(2 * n),
        views{{o, normalize, inv_norm}, {t, normalize, inv_norm + n}},
        online(n, d, operand),
        target(n, d, operand) {
    const int64_t groups = padded / kGroup;
    parallel_tickets(2 * groups, [&](int64_t ticket) {
      const bool which = ticket >= groups;
      const int64_t from = ticket % groups * kGroup, count = n - from < kGroup ? n - from : kGroup;
      for (int64_t i = from; i < from + count; ++i) inv_norm[which * n + i] = views[which].norm_of(i);
      (which ? target : online).fill(from, count, [&](int64_t i, int64_t j, int lanes) {
        return at(which, i, j, lanes);
      });
    });
  }

  // Of the operand.
  SSLOPS_INLINE F at(bool which, int64_t i, int64_t j, int lanes) const {
    return round_to(operand_dtype, views[which].at(i, j, lanes));
  }
};

// A tile of S, a, and of S^T, b: rows i0.., columns j0... If mirrored (then j0 > i0), they also stand for their
// transposes: what is a to a row of the tile is b to a column. Masked: not all of its pairs are negatives both ways.
struct Part {
  float *a, *b;
  int64_t ld, i0, rows, j0, columns;
  bool mirrored, masked;

  int64_t width() const { return round_up(columns, kLanes); }
};

struct Tiles {
  Tile a, b;
};

// visit(tiles, part) over all pairs, a row's in a fixed order, one at a time, first that which holds its positive.
// held: where all tiles lie, or null; ready: they are there from the sweep before.
template <typename Visit>
void for_each_tile(const Batch& x, float* held, bool ready, const Visit& visit) {
  const int64_t n = x.n, far = n - x.negatives;
  const auto product = [&](Tiles& tiles, float* at, int64_t i0, int64_t i1, int64_t j0, int64_t j1) {
    const int64_t rows = i1 - i0, columns = j1 - j0, ld = tiles.a.ld;
    const bool mirrored = i0 != j0;
    tiles.a.move(at);
    tiles.b.move(at ? at + x.size() / 2 : nullptr);
    float *const a = tiles.a.s, *const b = tiles.b.s;
    if (!ready) {
      tiles.a.multiply(x.online, i0, rows, x.target, j0, columns);
      if (mirrored) tiles.b.multiply(x.target, i0, rows, x.online, j0, columns);
      for (int64_t k = 0; k < rows && !mirrored; ++k)
        for (int64_t j = 0; j < columns; ++j) b[k * ld + j] = a[j * ld + k];
    }
    visit(tiles, Part{a, b, ld, i0, rows, j0, columns, mirrored, !mirrored || far > 1 || columns % kLanes});
  };
  Tournament(x.count).run([&] { return Tiles{Tile(x.side, x.online.bf16), Tile(x.side, x.online.bf16)}; },
                          [&](int64_t i, int64_t j, Tiles& tiles) {
                            if (!x.meet(i, j)) return;
                            float* const at = held ? held + x.place(i, j) * x.size() : nullptr;
                            int64_t i0 = i * x.side, i1 = i0 + x.side < n ? i0 + x.side : n;
                            int64_t j0 = j * x.side, j1 = j0 + x.side < n ? j0 + x.side : n;
                            if (i == j) {  // Symmetry saves nothing in the tiles on the diagonal: they are small.
                              const auto block = [&](int64_t a, int64_t b) {
                                product(tiles, at ? at + (a - i0) * tiles.a.ld + b - i0 : nullptr, a,
                                        a + kGroup < i1 ? a + kGroup : i1, b, b + kGroup < i1 ? b + kGroup : i1);
                              };
                              for (int64_t a = i0; a < i1; a += kGroup) block(a, a);
                              for (int64_t a = i0; a < i1; a += kGroup)
                                for (int64_t b = a + kGroup; b < i1; b += kGroup) block(a, b);
                              return;
                            }
                            // Only the part of the tile that the band runs through.
                            const bool follow = j0 - i1<x.negatives, wrap = j1 - i0> far;
                            const auto raise = [](int64_t& begin, int64_t to) {
                              begin = to > begin ? to / kGroup * kGroup : begin;
                            };
                            if (follow && !wrap) {
                              if (i1 + x.negatives < j1) j1 = i1 + x.negatives;
                              raise(i0, j0 - x.negatives);
                            } else if (!follow) {
                              if (j1 - far < i1) i1 = j1 - far;
                              raise(j0, i0 + far);
                            }
                            product(tiles, at, i0, i1, j0, j1);
                          });
}

// Which columns from j on are among the negatives of row i, and which have it among theirs.
struct Masks {
  I own, other;

  SSLOPS_INLINE Masks(const Batch& x, const Part& t, int64_t i, int64_t j) {
    I lane;
    for (int k = 0; k < kLanes; ++k) lane[k] = k;
    const I steps = lane + static_cast<int32_t>(t.j0 + j - i), inside = lane < static_cast<int32_t>(t.columns - j);
    const auto follows = [&](I steps) {
      steps += (steps < 0) & static_cast<int32_t>(x.n);
      return inside & (steps > 0) & (steps <= static_cast<int32_t>(x.negatives));
    };
    own = follows(steps);
    other = follows(-steps);
  }
};

// Raises the maxima of the tile's rows and columns and scales their sums down accordingly.
void raise(const Batch& x, const Part& t, float* sums) {
  const auto raise_one = [&](int64_t i, float a, float b) {
    const auto at = [&](Sum k) -> float& { return sums[k * x.padded + i]; };
    if (a > at(kTopA)) {
      const float factor = expf((at(kTopA) - a) * x.scale.inverse);
      for (Sum k : {kA, kY, kE}) at(k) *= factor;
      at(kTopA) = a;
    }
    if (b > at(kTopB)) {
      at(kB) *= expf((at(kTopB) - b) * x.scale.inverse);
      at(kTopB) = b;
    }
  };
  float columns[2][kMaxSide];
  for (int64_t j = 0; j < t.width(); ++j) columns[0][j] = columns[1][j] = kLowest;
  for (int64_t k = 0; k < t.rows; ++k) {
    F best_a = splat(kLowest), best_b = best_a;
    for (int64_t j = 0; j < t.width(); j += kLanes) {
      const F a = load(t.a + k * t.ld + j), b = load(t.b + k * t.ld + j), none = splat(kLowest);
      F own_a = a, own_b = b, other_a = b, other_b = a;
      if (t.masked) {
        const Masks mask(x, t, t.i0 + k, j);
        own_a = select(mask.own, a, none), own_b = select(mask.own, b, none);
        other_a = select(mask.other, b, none), other_b = select(mask.other, a, none);
      }
      best_a = max(own_a, best_a);
      best_b = max(own_b, best_b);
      store(columns[0] + j, max(other_a, load(columns[0] + j)));
      store(columns[1] + j, max(other_b, load(columns[1] + j)));
    }
    raise_one(t.i0 + k, max(best_a), max(best_b));
  }
  for (int64_t j = 0; j < t.columns && t.mirrored; ++j) raise_one(t.j0 + j, columns[0][j], columns[1][j]);
}

// Adds kCount rows to their own sums and, where the tile is mirrored, to those of its columns.
template <bool kFixed, bool kMirrored, bool kMasked, int kRowCount>
SSLOPS_INLINE void add_rows(const Batch& x, const Part& t, int64_t k, float* sums, const float* positives,
                            float (*columns)[kMaxSide]) {
  const float inverse = x.scale.inverse, *const top_a = sums + kTopA * x.padded, *const top_b = sums + kTopB * x.padded;
  F totals[kRowCount][kTerms]{};
  for (int64_t j = 0; j < t.width(); j += kLanes) {
    F down[kTerms]{};
    for (int r = 0; r < kRowCount; ++r) {
      const int64_t i = t.i0 + k + r;
      const F a = load(t.a + (k + r) * t.ld + j), b = load(t.b + (k + r) * t.ld + j);
      const auto power = [&](F s, F top) { return exp_nonpositive((s - top) * inverse); };
      const F e_a = power(a, splat(kFixed ? 1.f : top_a[i])), e_b = power(b, splat(kFixed ? 1.f : top_b[i]));
      // exp(d) - 1 - d = even(d) + odd(d): by their series where the difference would lose digits.
      const F d = (b - a) * inverse, z = d * d;
      const F even = z * (z * (z * 0.0013981894f + 0.041665795f) + 0.5f);
      const F odd = z * d * (z * (z * (1.f / 5040) + 1.f / 120) + 1.f / 6);
      const auto add = [&](F* to, I mask, F p, F q, F d, F series, F above) {
        const auto kept = [&](F v) { return kMasked ? select(mask, v, F{}) : v; };
        to[kA] += kept(p);
        to[kB] += kept(q);
        to[kY] += kept(p * above);
        to[kE] += kept(p * d);
        if (kFixed) to[kV] += kept(select(z < 0.25f, p * series, (q - p) - p * d));
      };
      I own{}, other{};
      if (kMasked) {
        const Masks mask(x, t, i, j);
        own = mask.own, other = mask.other;
      }
      add(totals[r], own, e_a, e_b, d, even + odd, b - positives[i]);
      if (kMirrored)  // the mirror image has b for a
        add(down, other, kFixed ? e_b : power(b, load(top_a + t.j0 + j)),
            kFixed ? e_a : power(a, load(top_b + t.j0 + j)), -d, even - odd, a - load(positives + t.j0 + j));
    }
    for (int term = 0; term < kTerms && kMirrored; ++term)
      store(columns[term] + j, load(columns[term] + j) + down[term]);
  }
  for (int r = 0; r < kRowCount; ++r)
    for (int term = 0; term < kTerms; ++term) sums[term * x.padded + t.i0 + k + r] += sum(totals[r][term]);
}

template <bool kFixed, bool kMirrored, bool kMasked>
void add(const Batch& x, const Part& t, float* sums, const float* positives) {
  float columns[kTerms][kMaxSide];
  for (auto& column : columns)
    for (int64_t j = 0; j < t.width(); ++j) column[j] = 0.f;
  int64_t k = 0;
  for (; k + 2 <= t.rows; k += 2) add_rows<kFixed, kMirrored, kMasked, 2>(x, t, k, sums, positives, columns);
  if (k < t.rows) add_rows<kFixed, kMirrored, kMasked, 1>(x, t, k, sums, positives, columns);
  for (int term = 0; term < kTerms && kMirrored; ++term)
    for (int64_t j = 0; j < t.columns; ++j) sums[term * x.padded + t.j0 + j] += columns[term][j];
}

// How many of the tile's negatives exceed the similarity of their row's positive, and of their column's.
void count_exceeding(const Batch& x, const Part& t, const float* positives, float* exceeding) {
  float columns[kMaxSide];
  for (int64_t j = 0; j < t.width(); ++j) columns[j] = 0.f;
  for (int64_t k = 0; k < t.rows; ++k) {
    F count{};
    for (int64_t j = 0; j < t.width(); j += kLanes) {
      I own = load(t.a + k * t.ld + j) > splat(positives[t.i0 + k]);
      I other = load(t.b + k * t.ld + j) > load(positives + t.j0 + j);
      if (t.masked) {
        const Masks mask(x, t, t.i0 + k, j);
        own &= mask.own, other &= mask.other;
      }
      count += select(own, splat(1.f), F{});
      store(columns + j, load(columns + j) + select(other, splat(1.f), F{}));
    }
    exceeding[t.i0 + k] += sum(count);
  }
  for (int64_t j = 0; j < t.columns && t.mirrored; ++j) exceeding[t.j0 + j] += columns[j];
}

// S becomes W and, where the tile is mirrored, S^T the transpose of W's mirror image: see relic.h. stats
// [kPositive + 1, padded], the inverses times grad.
template <bool kFixed, bool kMirrored, bool kMasked>
void weigh(const Batch& x, const Part& t, const float* stats) {
  const float inverse = x.scale.inverse, alpha = x.alpha, beta = x.beta, kappa = static_cast<float>(beta / x.scale.tau);
  for (int64_t k = 0; k < t.rows; ++k) {
    const int64_t i = t.i0 + k;
    float *const at_a = t.a + k * t.ld, *const at_b = t.b + k * t.ld;
    const auto of_row = [&](Stat stat) { return splat(stats[stat * x.padded + i]); };
    const F top_a = of_row(kStatTopA), top_b = of_row(kStatTopB), y = of_row(kMeanY), s = of_row(kPositive);
    const F inverse_a = of_row(kInverseA), inverse_b = of_row(kInverseB);
    for (int64_t j = 0; j < t.width(); j += kLanes) {
      const F a = load(at_a + j), b = load(at_b + j);
      const auto of_column = [&](Stat stat) { return load(stats + stat * x.padded + t.j0 + j); };
      const auto power = [&](F s, F top) { return exp_nonpositive((s - top) * inverse); };
      // Where p is all at one place, its Y and b are the same number: they cancel.
      const auto pulled = [&](F p, F y, F other, F s) { return p * (alpha + kappa * (y - (other - s))); };
      const F e_a = power(a, kFixed ? splat(1.f) : top_a), e_b = power(b, kFixed ? splat(1.f) : top_b);
      const F p = e_a * inverse_a, q = e_b * inverse_b;
      const F p_other = (kFixed ? e_b : power(b, of_column(kStatTopA))) * of_column(kInverseA);
      const F q_other = (kFixed ? e_a : power(a, of_column(kStatTopB))) * of_column(kInverseB);
      I own{}, other{};
      if (kMasked) {
        const Masks mask(x, t, i, j);
        own = mask.own, other = mask.other;
      }
      const auto kept = [](I mask, F v) { return kMasked ? select(mask, v, F{}) : v; };
      store(at_a + j, kept(own, pulled(p, y, b, s)) + kept(other, beta * (q_other - p_other)));
      if (kMirrored)
        store(at_b + j,
              kept(own, beta * (q - p)) + kept(other, pulled(p_other, of_column(kMeanY), a, of_column(kPositive))));
    }
  }
}

// The gradients of sum_i grad_i loss_i (grad null: all 1) into those of `out` that have memory; returns the
// temperature's. held: the tiles, if forward has them.
float gradients(const Batch& x, const float* grad, const float* kept, float* held, const Tensor (&out)[2]) {
  const int64_t padded = x.padded, ld = x.online.ld, count = out[1] ? 2 : 1, rows = padded + bf16_gemm::kBlock;
  Buffer<float> stats((kPositive + 1) * padded), dz(count * rows * ld), dots(x.n);
  const auto weight = [&](int64_t i) { return grad ? grad[i] : 1.f; };
  for (int64_t stat = 0; stat <= kPositive; ++stat)
    for (int64_t i = 0; i < padded; ++i)
      stats[stat * padded + i] =
          i < x.n ? kept[stat * x.n + i] * (stat == kInverseA || stat == kInverseB ? weight(i) : 1.f) : 0.f;
  parallel_for(count * rows, kGroup, [&](int64_t begin, int64_t end) {
    std::memset(dz + begin * ld, 0, (end - begin) * ld * sizeof(float));
  });
  float* const donline = dz;
  float* const dtarget = count == 2 ? dz + rows * ld : nullptr;
  const auto row = [&](float* view, int64_t i) { return view ? view + i * ld : nullptr; };
  for_each_tile(x, held, held != nullptr, [&](Tiles& tiles, const Part& t) {
    const bool fixed = x.scale.fixed;
    const auto run = !t.mirrored ? fixed ? weigh<true, false, true> : weigh<false, false, true>
                     : t.masked  ? fixed ? weigh<true, true, true> : weigh<false, true, true>
                     : fixed     ? weigh<true, true, false>
                                 : weigh<false, true, false>;
    run(x, t, stats);
    tiles.a.add(t.rows, t.columns, x.target, t.j0, row(donline, t.i0), x.online, t.i0, row(dtarget, t.j0));
    if (t.mirrored)
      tiles.b.add(t.rows, t.columns, x.online, t.j0, row(dtarget, t.i0), x.target, t.i0, row(donline, t.j0));
  });
  const float inverse = static_cast<float>(1. / x.scale.tau);
  parallel_for(count * x.n, kGroup, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const bool which = k >= x.n;
      const int64_t i = k % x.n;
      const float pull = weight(i) * kept[kPull * x.n + i];
      float* const v = row(which ? dtarget : donline, i);
      for_each_vector(x.d, [&](int64_t j, int lanes) {
        store_lanes(v + j, lanes, (load_lanes(v + j, lanes, 0.f) - pull * x.at(!which, i, j, lanes)) * inverse);
      });
      const float dot = x.views[which].backward(i, v, out[which], i);
      if (!which) dots[i] = dot;
    }
  });
  double total = 0.;  // dL/dtau = -sum_i <o_i, do_i> / tau
  for (int64_t i = 0; i < x.n; ++i) total += dots[i];
  return static_cast<float>(-total / x.scale.tau);
}

void forward(Tensor online, Tensor target, double temperature, double alpha, double beta, int64_t negatives,
             bool normalize, DType operand, bool count, Tensor losses, Tensor stats, Tensor of_sum,
             Tensor of_sum_temperature) {
  const Batch x(online, target, temperature, alpha, beta, negatives, normalize, operand);
  const int64_t n = x.n, padded = x.padded;
  const bool hold = of_sum && x.held();
  Buffer<float> sums(kSums * padded), positives(padded), tiles(hold ? x.first[x.count] * x.size() : 0);
  for (int64_t k = 0; k < kSums * padded; ++k) sums[k] = k / padded == kTopA || k / padded == kTopB ? kLowest : 0.f;
  for (int64_t i = 0; i < padded; ++i) positives[i] = 0.f;
  float* const held = hold ? static_cast<float*>(tiles) : nullptr;
  for_each_tile(x, held, false, [&](Tiles&, const Part& t) {
    for (int64_t k = 0; k < t.rows && !t.mirrored; ++k) positives[t.i0 + k] = t.a[k * t.ld + k];
    const bool fixed = x.scale.fixed;
    if (!fixed) raise(x, t, sums);
    const auto run = !t.mirrored ? fixed ? add<true, false, true> : add<false, false, true>
                     : t.masked  ? fixed ? add<true, true, true> : add<false, true, true>
                     : fixed     ? add<true, true, false>
                                 : add<false, true, false>;
    run(x, t, sums, positives);
    if (count) count_exceeding(x, t, positives, sums + kExceeding * padded);
  });
  for (int64_t i = 0; i < n; ++i) {
    const auto at = [&](Sum k) { return sums[k * padded + i]; };
    const float s = positives[i];
    const Close p(s, at(kA), at(kTopA), x.scale), q(s, at(kB), at(kTopB), x.scale);
    const float to_mean = p.shrink * p.inverse, y = at(kY) * to_mean;
    // KL = log E_p[exp(d)] - E_p[d]; where p and q are close, a difference of numbers of its own size.
    const double u = x.scale.fixed ? (at(kB) - at(kA)) * p.inverse : 1.;
    const float divergence = u > -0.5 && u < 0.5 ? static_cast<float>(at(kV) * to_mean - (u - log1p(u)))
                                                 : (q.loss - p.loss) - at(kE) * to_mean;
    losses.as<float>()[i] = x.alpha * p.loss + x.beta * divergence;
    const float own = expf((s - p.top) * x.scale.inverse) * p.inverse;
    const float drift = static_cast<float>(own * y / x.scale.tau) + (p.share - q.share);
    const float kept[kStats] = {p.top, p.inverse,     q.top, q.inverse, y, x.alpha * p.share - x.beta * drift,
                                s,     at(kExceeding)};
    for (int64_t k = 0; k < kStats; ++k) stats.as<float>()[k * n + i] = kept[k];
  }
  if (!hold) return;
  Tensor out[] = {of_sum, {}};
  if (of_sum.sizes[0] == 2) {
    out[1] = of_sum;
    out[1].data += n * x.d * sizeof(float);
  }
  *of_sum_temperature.as<float>() = gradients(x, nullptr, stats.as<float>(), held, out);
}

void backward(Tensor grad, Tensor online, Tensor target, double temperature, double alpha, double beta,
              int64_t negatives, bool normalize, DType operand, Tensor stats, Tensor of_sum, Tensor of_sum_temperature,
              Tensor donline, Tensor dtarget, Tensor dtemperature) {
  const int64_t n = online.sizes[0], size = online.numel;
  const float* const g = grad.as<float>();
  bool scaled = of_sum && Panels(n, negatives).held();
  for (int64_t i = 1; i < n && scaled; ++i) scaled = g[i] == g[0];  // as all reductions have them
  const Tensor out[] = {donline, dtarget};
  if (!scaled) {
    const Batch x(online, target, temperature, alpha, beta, negatives, normalize, operand);
    *dtemperature.as<float>() = gradients(x, g, stats.as<float>(), nullptr, out);
    return;
  }
  *dtemperature.as<float>() = *of_sum_temperature.as<float>() * g[0];
  for (int which = 0; which < (dtarget ? 2 : 1); ++which)
    parallel_for(size, 1 << 14, [&](int64_t begin, int64_t end) {
      for_each_vector(end - begin, [&](int64_t k, int lanes) {
        const F v = load_lanes(of_sum.as<float>() + which * size + begin + k, lanes, 0.f);
        store_from_float(out[which].data, out[which].dtype, begin + k, lanes, v * g[0]);
      });
    });
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{forward, backward};
}

}  // namespace sslops::relic
