#include "relic.h"

#include "relic_tiles.h"

namespace sslops::relic {
namespace {

// Over the negatives of a row, with d = (b - a) / tau and p = exp((a - top of a) / tau): the sums of p, of the same of
// b, of p (b - positive), p d (of b and a beneath their maxima, if those are not fixed: where p is, that is no larger
// than what it tells), p (exp(d) - 1 - d) (at a fixed maximum); the maxima; how many a exceed the positive.
enum Sum { kA, kB, kY, kE, kV, kTerms, kTopA = kTerms, kTopB, kExceeding, kSums };
enum Stat { kStatTopA, kInverseA, kStatTopB, kInverseB, kMeanY, kPull, kPositive, kCount, kStats };

// Nothing times whatever is nothing.
float product(float none, float x) { return none == 0.f ? 0.f : none * x; }

// Raises the maxima of the tile's rows and columns and scales their sums down accordingly.
void raise(const Batch& x, const Part& t, float* sums) {
  const auto raise_one = [&](int64_t i, float a, float b) {
    const auto at = [&](Sum k) -> float& { return sums[k * x.padded + i]; };
    a = max(a, at(kTopA)), b = max(b, at(kTopB));
    if (a == at(kTopA) && b == at(kTopB)) return;
    const float by_a = (a - at(kTopA)) * x.scale.inverse, by_b = (b - at(kTopB)) * x.scale.inverse,
                factor = expf(-by_a);
    at(kA) *= factor, at(kE) = at(kE) * factor + product(at(kA), by_a - by_b), at(kY) *= factor, at(kB) *= expf(-by_b);
    at(kTopA) = a, at(kTopB) = b;
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

// Of a logit beneath its maximum: beneath a fixed one no farther than 43.
template <bool kFixed>
SSLOPS_INLINE F exp_of(F x) {
  return kFixed ? exp_bounded(x) : exp_nonpositive(x);
}

// Adds the tile to the sums of its rows and, where it is mirrored, to those of its columns. A few rows at a time, first
// all their exponentials: in one loop with the sums, chains of steps wait where none of the next has begun.
template <bool kFixed, bool kMirrored, bool kMasked>
void add(const Batch& x, const Part& t, float* sums, const float* positives) {
  constexpr int64_t kBlock = 8;  // rows
  const float inverse = x.scale.inverse, *const top_a = sums + kTopA * x.padded, *const top_b = sums + kTopB * x.padded;
  float columns[kTerms][kMaxSide], powers[2][kBlock][kMaxSide];
  for (auto& column : columns)
    for (int64_t j = 0; j < t.width(); ++j) column[j] = 0.f;
  for (int64_t k = 0; k < t.rows; k += kBlock) {
    const int64_t count = at_most(t.rows - k, kBlock);
    const auto at_a = [&](int64_t r) { return t.a + (k + r) * t.ld; };
    const auto at_b = [&](int64_t r) { return t.b + (k + r) * t.ld; };
    const auto own_a = [&](int64_t r) { return kFixed ? x.scale.top : top_a[t.i0 + k + r]; };
    const auto own_b = [&](int64_t r) { return kFixed ? x.scale.top : top_b[t.i0 + k + r]; };
    for (int64_t r = 0; r < count; ++r)
      for (int64_t j = 0; j < t.width(); j += kLanes) {
        store(powers[0][r] + j, exp_of<kFixed>((load(at_a(r) + j) - own_a(r)) * inverse));
        store(powers[1][r] + j, exp_of<kFixed>((load(at_b(r) + j) - own_b(r)) * inverse));
      }
    F totals[kBlock][kTerms]{};
    for (int64_t j = 0; j < t.width(); j += kLanes) {
      F down[kTerms]{};
      for (int64_t r = 0; r < count; ++r) {
        const int64_t i = t.i0 + k + r;
        const F a = load(at_a(r) + j), b = load(at_b(r) + j);
        const F e_a = load(powers[0][r] + j), e_b = load(powers[1][r] + j);
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
        add(totals[r], own, e_a, e_b, kFixed ? d : ((b - own_b(r)) - (a - own_a(r))) * inverse, even + odd,
            b - positives[i]);
        if (kMirrored) {  // the mirror image has b for a
          const F other_a = load(top_a + t.j0 + j), other_b = load(top_b + t.j0 + j);
          add(down, other, kFixed ? e_b : exp_of<kFixed>((b - other_a) * inverse),
              kFixed ? e_a : exp_of<kFixed>((a - other_b) * inverse),
              kFixed ? -d : ((a - other_b) - (b - other_a)) * inverse, even - odd, a - load(positives + t.j0 + j));
        }
      }
      for (int term = 0; term < kTerms && kMirrored; ++term)
        store(columns[term] + j, load(columns[term] + j) + down[term]);
    }
    for (int64_t r = 0; r < count; ++r)
      for (int term = 0; term < kTerms; ++term) sums[term * x.padded + t.i0 + k + r] += sum(totals[r][term]);
  }
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
      const auto power = [&](F s, F top) { return exp_of<kFixed>((s - top) * inverse); };
      // Where p is all at one place, its Y and b are the same number: they cancel.
      const auto pulled = [&](F p, F y, F other, F s) { return p * (alpha + kappa * (y - (other - s))); };
      const F e_a = power(a, kFixed ? splat(x.scale.top) : top_a), e_b = power(b, kFixed ? splat(x.scale.top) : top_b);
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

// The gradients of sum_i grad_i loss_i (grad null: all `factor`) into those of `out` that have memory; returns the
// temperature's. held: the first tiles, if forward has them.
float gradients(const Batch& x, const float* grad, float factor, const float* kept, float* held,
                const Tensor (&out)[2]) {
  const int64_t padded = x.padded, ld = x.online.ld, count = out[1] ? 2 : 1, rows = padded + bf16_gemm::kBlock;
  Buffer<float> stats((kPositive + 1) * padded), dz(count * rows * ld), dots(x.n);
  const auto weight = [&](int64_t i) { return grad ? grad[i] : factor; };
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
             bool normalize, DType operand, bool count, Tensor losses, Tensor stats, double factor, Tensor donline,
             Tensor dtarget, Tensor dtemperature) {
  const Batch x(online, target, temperature, alpha, beta, negatives, normalize, operand);
  const int64_t n = x.n, padded = x.padded;
  const bool hold = dtemperature && x.held();
  Buffer<float> sums(kSums * padded), positives(padded), tiles(hold ? x.held() * x.size() : 0);
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
  parallel_for(n, kGroup, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const auto at = [&](Sum k) { return sums[k * padded + i]; };
      const float s = positives[i];
      const Close p(s, at(kA), at(kTopA), x.scale), q(s, at(kB), at(kTopB), x.scale);
      const float to_mean = p.shrink * p.inverse, y = at(kY) * to_mean;
      const float e = expf((s - p.top) * x.scale.inverse);
      // KL = log E_p[exp(d)] - E_p[d]; where p and q are close, a difference of numbers of its own size.
      const double u = x.scale.fixed ? (at(kB) - at(kA)) * p.inverse : 1.;
      float divergence;
      if (u > -0.5 && u < 0.5) {
        divergence = static_cast<float>(at(kV) * to_mean - (u - log1p(u)));
      } else if (x.scale.fixed) {
        divergence = (q.loss - p.loss) - at(kE) * to_mean;
      } else {  // E_p[log p - log q], of logits beneath their maxima
        const auto log_of = [&](const Close& c) { return c.top == s ? c.loss : -logf(c.inverse); };
        const float by = ((p.top - at(kTopA)) - (q.top - at(kTopB))) * x.scale.inverse;
        const float sum = p.shrink * at(kE) + product(p.shrink * at(kA), by);
        divergence = (log_of(q) - log_of(p)) - (sum + product(e, (p.top - q.top) * x.scale.inverse)) * p.inverse;
      }
      losses.as<float>()[i] = x.alpha * p.loss + x.beta * divergence;
      const float drift = static_cast<float>(e * p.inverse * y / x.scale.tau) + (p.share - q.share);
      const float kept[kStats] = {p.top, p.inverse,     q.top, q.inverse, y, x.alpha * p.share - x.beta * drift,
                                  s,     at(kExceeding)};
      for (int64_t k = 0; k < kStats; ++k) stats.as<float>()[k * n + i] = kept[k];
    }
  });
  if (!dtemperature) return;
  const float part = static_cast<float>(factor);
  *dtemperature.as<float>() = gradients(x, nullptr, part, stats.as<float>(), held, {donline, dtarget});
}

void backward(Tensor grad, Tensor online, Tensor target, double temperature, double alpha, double beta,
              int64_t negatives, bool normalize, DType operand, Tensor stats, Tensor donline, Tensor dtarget,
              Tensor dtemperature) {
  const Batch x(online, target, temperature, alpha, beta, negatives, normalize, operand);
  *dtemperature.as<float>() = gradients(x, grad.as<float>(), 0.f, stats.as<float>(), nullptr, {donline, dtarget});
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{together<forward>, together<backward>};
}

}  // namespace sslops::relic
