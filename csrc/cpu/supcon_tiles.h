// What SupCon makes of a tile of S: sums over candidates and over positives, and weights.
#pragma once
#include "views.h"

namespace sslops::supcon {
namespace {

template <typename T, T kValue>
struct Constant {
  static constexpr T value = kValue;
};

// Of all rows, and behind them [padded] of all keys; -1 where there is none. Those of one class are positives of each
// other, those of one id no candidates. Ids: null, or each row's own too.
struct Groups {
  const int32_t *classes, *ids;
};

// Of a tile: kDiagonal holds rows with themselves; with ids they are left out as others are.
enum Kind { kMirrored, kPlain, kDiagonal, kMirroredIds, kPlainIds };
constexpr bool is_mirrored(Kind kind) { return kind == kMirrored || kind == kMirroredIds; }
constexpr bool has_ids(Kind kind) { return kind == kMirroredIds || kind == kPlainIds; }
Kind kind_of(const Groups& g, const Part& t) {
  if (g.ids) return t.mirrored ? kMirroredIds : kPlainIds;
  return t.mirrored ? kMirrored : t.i0 < t.j0 + t.columns && t.j0 < t.i0 + t.rows ? kDiagonal : kPlain;
}

SSLOPS_INLINE I load_ints(const int32_t* p) {
  I v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

void leave_out(const Groups& g, const Part& t) {
  for (int64_t k = 0; k < t.rows; ++k) {
    float* const s = t.row(k);
    if (!g.ids) {
      if (const int64_t j = t.i0 + k - t.j0; j >= 0 && j < t.columns) s[j] = -kInf;
      continue;
    }
    for (int64_t j = 0; j < t.width(); j += kLanes)
      store(s + j, select(load_ints(g.ids + t.j0 + j) == g.ids[t.i0 + k], splat(-kInf), load(s + j)));
  }
}

// Which columns from j on are positives of row i.
template <Kind kKind>
SSLOPS_INLINE I are_positive(const Groups& g, const Part& t, int64_t j, int64_t i) {
  I lane, mask = load_ints(g.classes + t.j0 + j) == g.classes[i];
  if (has_ids(kKind)) return mask & (load_ints(g.ids + t.j0 + j) != g.ids[i]);
  if (kKind != kDiagonal) return mask;
  for (int k = 0; k < kLanes; ++k) lane[k] = k;
  return mask & (lane != static_cast<int32_t>(i - t.j0 - j));
}

// Of each row [padded]: r, and p over its positives alone, both relative to maxima; not inside, p is the sum of their
// s - base: with numbers near a positive's s it is exact where all pairs are alike. With ids, how many positives.
struct Sums {
  float *top, *r, *top_p, *p, *count;
  const float* base;
};

// Adds kCount rows to their own sums and, where the tile is mirrored, to those of its columns.
template <bool kFixed, bool kInside, Kind kKind, int kCount>
SSLOPS_INLINE void add_rows(const Groups& g, float inverse, const Part& t, int64_t k, const Sums& to, float* r,
                            float* p, float* count) {
  F row_r[kCount]{}, row_p[kCount]{}, row_count[kCount]{};
  for (int64_t j = 0; j < t.width(); j += kLanes) {
    F column_r = load(r + j), column_p = load(p + j), column_count = has_ids(kKind) ? load(count + j) : F{};
    for (int n = 0; n < kCount; ++n) {
      const int64_t i = t.i0 + k + n, at = t.j0 + j;
      const F s = load(t.row(k + n) + j), e = exp_nonpositive((s - (kFixed ? 1.f : to.top[i])) * inverse);
      const I mask = are_positive<kKind>(g, t, j, i);
      const auto term = [&](F top_p, F base) {
        return select(mask, !kInside ? s - base : kFixed ? e : exp_nonpositive((s - top_p) * inverse), F{});
      };
      row_r[n] += e;
      row_p[n] += term(splat(to.top_p[i]), splat(to.base[i]));
      if (has_ids(kKind)) row_count[n] += select(mask, splat(1.f), F{});
      if (!is_mirrored(kKind)) continue;
      column_r += kFixed ? e : exp_nonpositive((s - load(to.top + at)) * inverse);
      column_p += term(load(to.top_p + at), load(to.base + at));
      if (has_ids(kKind)) column_count += select(mask, splat(1.f), F{});
    }
    if (is_mirrored(kKind)) store(r + j, column_r), store(p + j, column_p);
    if (kKind == kMirroredIds) store(count + j, column_count);
  }
  for (int n = 0; n < kCount; ++n) {
    to.r[t.i0 + k + n] += sum(row_r[n]), to.p[t.i0 + k + n] += sum(row_p[n]);
    if (has_ids(kKind)) to.count[t.i0 + k + n] += sum(row_count[n]);
  }
}

template <bool kFixed, bool kInside, Kind kKind>
void add(const Groups& g, float inverse, const Part& t, const Sums& to) {
  float r[kMaxSide], p[kMaxSide], count[kMaxSide];  // of the columns
  for (int64_t j = 0; j < t.width(); ++j) r[j] = p[j] = 0.f;
  for (int64_t j = 0; j < t.width() && has_ids(kKind); ++j) count[j] = 0.f;
  int64_t k = 0;
  for (; k + 4 <= t.rows; k += 4) add_rows<kFixed, kInside, kKind, 4>(g, inverse, t, k, to, r, p, count);
  for (; k < t.rows; ++k) add_rows<kFixed, kInside, kKind, 1>(g, inverse, t, k, to, r, p, count);
  for (int64_t j = 0; j < t.columns && is_mirrored(kKind); ++j) {
    to.r[t.j0 + j] += r[j], to.p[t.j0 + j] += p[j];
    if (has_ids(kKind)) to.count[t.j0 + j] += count[j];
  }
}

// The maxima, and those over the positives.
void raise_all(const Scale& scale, const Part& t, const Sums& to) {
  raise(t, scale, to.top, to.r, [](int64_t, int64_t, F s) { return s; });
}

template <Kind kKind>
void raise_positives(const Groups& g, const Scale& scale, const Part& t, const Sums& to) {
  raise(t, scale, to.top_p, to.p,
        [&](int64_t k, int64_t j, F s) { return select(are_positive<kKind>(g, t, j, t.i0 + k), s, splat(kLowest)); });
}

template <bool kFixed, bool kInside, Kind kKind>
void visit(const Groups& g, const Scale& scale, const Part& t, const Sums& to) {
  if (!kFixed) raise_all(scale, t, to);
  if (!kFixed && kInside) raise_positives<kKind>(g, scale, t, to);
  add<kFixed, kInside, kKind>(g, scale.inverse, t, to);
}

// S becomes W. weights, wanted [padded]: grad / r and grad times what the positives' terms are of q.
struct Weights {
  const float *top, *weights, *top_p, *wanted;
};

template <bool kFixed, bool kInside, Kind kKind>
void weigh(const Groups& g, float inverse, const Part& t, const Weights& of) {
  for (int64_t k = 0; k < t.rows; ++k) {
    const int64_t i = t.i0 + k;
    float* const row = t.row(k);
    const float top = kFixed ? 1.f : of.top[i], own = of.weights[i], own_wanted = of.wanted[i];
    for (int64_t j = 0; j < t.width(); j += kLanes) {
      const int64_t at = t.j0 + j;
      const F s = load(row + j), e = exp_nonpositive((s - top) * inverse), others = load(of.weights + at);
      const I mask = are_positive<kKind>(g, t, j, i);
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
    if (own != 0.f || own_wanted != 0.f) continue;
    for (int64_t j = 0; j < t.width(); j += kLanes) {  // neither has weight: nothing, even where s is infinite
      const I none = (load(of.weights + t.j0 + j) == 0.f) & (load(of.wanted + t.j0 + j) == 0.f);
      store(row + j, select(none, F{}, load(row + j)));
    }
  }
}

// run(fixed, inside, kind) with each as a constant
template <typename Run>
void specialised(const Groups& g, const Scale& scale, bool inside, const Part& t, const Run& run) {
  const auto of_kind = [&](auto fixed, auto in) {
    switch (kind_of(g, t)) {
      case kMirrored:
        return run(fixed, in, Constant<Kind, kMirrored>{});
      case kPlain:
        return run(fixed, in, Constant<Kind, kPlain>{});
      case kDiagonal:
        return run(fixed, in, Constant<Kind, kDiagonal>{});
      case kMirroredIds:
        return run(fixed, in, Constant<Kind, kMirroredIds>{});
      case kPlainIds:
        return run(fixed, in, Constant<Kind, kPlainIds>{});
    }
  };
  using Yes = Constant<bool, true>;
  using No = Constant<bool, false>;
  scale.fixed ? inside ? of_kind(Yes{}, Yes{}) : of_kind(Yes{}, No{})
  : inside    ? of_kind(No{}, Yes{})
              : of_kind(No{}, No{});
}

void add(const Groups& g, const Scale& scale, bool inside, const Part& t, const Sums& to) {
  specialised(g, scale, inside, t,
              [&](auto fixed, auto in, auto kind) { visit<fixed.value, in.value, kind.value>(g, scale, t, to); });
}

void weigh(const Groups& g, const Scale& scale, bool inside, const Part& t, const Weights& of) {
  specialised(g, scale, inside, t, [&](auto fixed, auto in, auto kind) {
    weigh<fixed.value, in.value, kind.value>(g, scale.inverse, t, of);
  });
}

}  // namespace
}  // namespace sslops::supcon
