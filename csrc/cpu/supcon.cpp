#include "supcon.h"

#include "views.h"

namespace sslops::supcon {
namespace {

template <typename T, T kValue>
struct Constant {
  static constexpr T value = kValue;
};

enum Kind { kMirrored, kPlain, kDiagonal };  // of a tile: the last holds rows with themselves
Kind kind_of(const Part& t) {
  return t.mirrored ? kMirrored : t.i0 < t.j0 + t.columns && t.j0 < t.i0 + t.rows ? kDiagonal : kPlain;
}

void leave_out_itself(const Part& t) {
  for (int64_t k = 0; k < t.rows; ++k)
    if (const int64_t j = t.i0 + k - t.j0; j >= 0 && j < t.columns) t.row(k)[j] = -kInf;
}

// Which columns from j on are positives of row i.
template <Kind kKind>
SSLOPS_INLINE I are_positive(const Views& x, const Part& t, int64_t j, int64_t i) {
  I classes, lane;
  std::memcpy(&classes, x.row_classes + t.j0 + j, sizeof classes);
  if (kKind != kDiagonal) return classes == x.row_classes[i];
  for (int k = 0; k < kLanes; ++k) lane[k] = k;
  return (classes == x.row_classes[i]) & (lane != static_cast<int32_t>(i - t.j0 - j));
}

// Of each row [padded]: r, and p over its positives alone, both relative to maxima; not inside, p is the sum of their
// s - base: with numbers near a positive's s it is exact where all pairs are alike.
struct Sums {
  float *top, *r, *top_p, *p;
  const float* base;
};

// Adds kCount rows to their own sums and, where the tile is mirrored, to those of its columns.
template <bool kFixed, bool kInside, Kind kKind, int kCount>
SSLOPS_INLINE void add_rows(const Views& x, const Part& t, int64_t k, const Sums& to, float* r, float* p) {
  const float inverse = x.scale.inverse;
  F row_r[kCount]{}, row_p[kCount]{};
  for (int64_t j = 0; j < t.width(); j += kLanes) {
    F column_r = load(r + j), column_p = load(p + j);
    for (int n = 0; n < kCount; ++n) {
      const int64_t i = t.i0 + k + n, at = t.j0 + j;
      const F s = load(t.row(k + n) + j), e = exp_nonpositive((s - (kFixed ? 1.f : to.top[i])) * inverse);
      const I mask = are_positive<kKind>(x, t, j, i);
      const auto term = [&](F top_p, F base) {
        return select(mask, !kInside ? s - base : kFixed ? e : exp_nonpositive((s - top_p) * inverse), F{});
      };
      row_r[n] += e;
      row_p[n] += term(splat(to.top_p[i]), splat(to.base[i]));
      if (kKind != kMirrored) continue;
      column_r += kFixed ? e : exp_nonpositive((s - load(to.top + at)) * inverse);
      column_p += term(load(to.top_p + at), load(to.base + at));
    }
    if (kKind == kMirrored) store(r + j, column_r), store(p + j, column_p);
  }
  for (int n = 0; n < kCount; ++n) to.r[t.i0 + k + n] += sum(row_r[n]), to.p[t.i0 + k + n] += sum(row_p[n]);
}

template <bool kFixed, bool kInside, Kind kKind>
void add(const Views& x, const Part& t, const Sums& to) {
  float r[kMaxSide], p[kMaxSide];  // of the columns
  for (int64_t j = 0; j < t.width(); ++j) r[j] = p[j] = 0.f;
  int64_t k = 0;
  for (; k + 4 <= t.rows; k += 4) add_rows<kFixed, kInside, kKind, 4>(x, t, k, to, r, p);
  for (; k < t.rows; ++k) add_rows<kFixed, kInside, kKind, 1>(x, t, k, to, r, p);
  for (int64_t j = 0; j < t.columns && kKind == kMirrored; ++j) to.r[t.j0 + j] += r[j], to.p[t.j0 + j] += p[j];
}

// The maxima over the positives.
template <Kind kKind>
void raise_positives(const Views& x, const Part& t, const Sums& to) {
  raise(t, x.scale, to.top_p, to.p,
        [&](int64_t k, int64_t j, F s) { return select(are_positive<kKind>(x, t, j, t.i0 + k), s, splat(kLowest)); });
}

template <bool kFixed, bool kInside, Kind kKind>
void visit(const Views& x, const Part& t, const Sums& to) {
  if (!kFixed) raise(t, x.scale, to.top, to.r, [](int64_t, int64_t, F s) { return s; });
  if (!kFixed && kInside) raise_positives<kKind>(x, t, to);
  add<kFixed, kInside, kKind>(x, t, to);
}

// S becomes W. weights, wanted [padded]: grad / r and grad times what the positives' terms are of q.
struct Weights {
  const float *top, *weights, *top_p, *wanted;
};

template <bool kFixed, bool kInside, Kind kKind>
void weigh(const Views& x, const Part& t, const Weights& of) {
  const float inverse = x.scale.inverse;
  for (int64_t k = 0; k < t.rows; ++k) {
    const int64_t i = t.i0 + k;
    float* const row = t.row(k);
    const float top = kFixed ? 1.f : of.top[i], own = of.weights[i], own_wanted = of.wanted[i];
    for (int64_t j = 0; j < t.width(); j += kLanes) {
      const int64_t at = t.j0 + j;
      const F s = load(row + j), e = exp_nonpositive((s - top) * inverse), others = load(of.weights + at);
      const I mask = are_positive<kKind>(x, t, j, i);
      const F wanted = own_wanted + load(of.wanted + at);
      if constexpr (kFixed && kInside) {
        store(row + j, e * ((own + others) - select(mask, wanted, F{})));
      } else {
        F q = wanted;
        if constexpr (kInside)
          q = exp_nonpositive((s - of.top_p[i]) * inverse) * own_wanted +
              exp_nonpositive((s - load(of.top_p + at)) * inverse) * load(of.wanted + at);
        const F p = kFixed ? e * (own + others) : e * own + exp_nonpositive((s - load(of.top + at)) * inverse) * others;
        store(row + j, p - select(mask, q, F{}));
      }
    }
  }
}

// run(fixed, inside, kind) with each as a constant
template <typename Run>
void specialised(const Views& x, bool inside, const Part& t, const Run& run) {
  const auto of_kind = [&](auto fixed, auto in) {
    switch (kind_of(t)) {
      case kMirrored:
        return run(fixed, in, Constant<Kind, kMirrored>{});
      case kPlain:
        return run(fixed, in, Constant<Kind, kPlain>{});
      case kDiagonal:
        return run(fixed, in, Constant<Kind, kDiagonal>{});
    }
  };
  using Yes = Constant<bool, true>;
  using No = Constant<bool, false>;
  x.scale.fixed ? inside ? of_kind(Yes{}, Yes{}) : of_kind(Yes{}, No{})
  : inside      ? of_kind(No{}, Yes{})
                : of_kind(No{}, No{});
}

void forward(Tensor z, Tensor classes, double temperature, bool normalize, bool inside, DType operand, int64_t first,
             Tensor losses, Tensor positives, Tensor inv_norm, Tensor stats) {
  const Views x(z, {}, classes, temperature, normalize, operand, inv_norm);
  const int64_t rows = losses.numel, count = rows / x.views;
  Buffer<int64_t> sizes(2 * x.n), last(2 * x.n), before(x.n);  // of each class; of each example, in its class
  Buffer<float> top(x.padded), r(x.padded), top_p(x.padded), p(x.padded), base(x.padded);
  for (int64_t i = 0; i < 2 * x.n; ++i) sizes[i] = 0, last[i] = -1;
  for (int64_t i = 0; i < x.n; ++i) {
    const int32_t own = x.classes[i];
    sizes[own] += x.views, before[i] = last[own], last[own] = i;
  }
  for (int64_t i = 0; i < x.padded; ++i) {
    top[i] = top_p[i] = x.scale.fixed ? 1.f : kLowest, r[i] = p[i] = 0.f, base[i] = normalize ? 1.f : 0.f;
    if (normalize || i >= x.m) continue;
    const int64_t positive = x.views > 1 ? x.positive(i, 1) : before[i] < 0 ? last[x.classes[i]] : before[i];
    F product{};
    for_each_vector(x.d, [&](int64_t j, int lanes) { product += x.at(i, j, lanes) * x.at(positive, j, lanes); });
    if (const float s = sum(product); s - s == 0.f) base[i] = s;
  }
  const Sums sums{top, r, top_p, p, base};
  for_each_tile(x, first, count, leave_out_itself, [&](const Tile&, const Part& t) {
    specialised(x, inside, t,
                [&](auto fixed, auto in, auto kind) { visit<fixed.value, in.value, kind.value>(x, t, sums); });
  });
  for (int64_t k = 0; k < rows; ++k) {
    const int64_t i = x.row(k, first, count), found = sizes[x.classes[i % x.n]] - 1;
    const float number = static_cast<float>(found), tau = static_cast<float>(x.scale.tau);
    float *const loss = losses.as<float>() + k, *const kept = stats.as<float>() + k;
    positives.as<float>()[k] = number;
    *loss = kept[rows] = kept[2 * rows] = kept[3 * rows] = 0.f;
    kept[0] = top[i];
    if (!found) continue;
    kept[rows] = 1.f / r[i];
    kept[2 * rows] = inside ? top_p[i] : 0.f;
    kept[3 * rows] = 1.f / (inside ? p[i] : number);
    *loss = inside ? (logf(r[i]) - logf(p[i])) + (top[i] - top_p[i]) / tau + logf(number)
                   : logf(r[i]) + ((top[i] - base[i]) - p[i] / number) / tau;
  }
}

void backward(Tensor grad, Tensor z, Tensor classes, double temperature, bool normalize, bool inside, DType operand,
              int64_t first, Tensor inv_norm, Tensor stats, Tensor dz, Tensor dots) {
  const Views x(z, {}, classes, temperature, normalize, operand, inv_norm);
  Buffer<float> top(x.padded), weights(x.padded), top_p(x.padded), wanted(x.padded);
  for (int64_t i = 0; i < x.padded; ++i) {
    const float* const kept = stats.as<float>() + i;
    const float g = i < x.m ? grad.as<float>()[i] : 0.f;
    top[i] = i < x.m ? kept[0] : 0.f;
    weights[i] = i < x.m ? g * kept[x.m] : 0.f;
    top_p[i] = i < x.m ? kept[2 * x.m] : 0.f;
    wanted[i] = i < x.m ? g * kept[3 * x.m] : 0.f;
  }
  const Weights of{top, weights, top_p, wanted};
  differentiate(
      x, first, leave_out_itself,
      [&](const Part& t) {
        specialised(x, inside, t,
                    [&](auto fixed, auto in, auto kind) { weigh<fixed.value, in.value, kind.value>(x, t, of); });
      },
      [](int64_t, float*) {}, dz, {}, dots);
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{forward, backward};
}

}  // namespace sslops::supcon
