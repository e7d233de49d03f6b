#include "supcon.h"

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

// to [padded]: those of the n examples, view by view, and then -1.
void spread(const int32_t* of, int64_t n, int64_t m, int64_t padded, int32_t* to) {
  for (int64_t i = 0; i < padded; ++i) to[i] = i < m ? of[i % n] : -1;
}

void forward(Tensor z, Tensor classes, Tensor ids, Tensor weights, double temperature, bool normalize, bool inside,
             DType operand, int64_t first, Tensor losses, Tensor positives, Tensor inv_norm, Tensor stats) {
  const Views x(z, {}, classes, temperature, normalize, operand, inv_norm);
  const int64_t rows = losses.numel, count = rows / x.views;
  Buffer<int64_t> sizes(2 * x.n), last(2 * x.n), before(x.n);  // of each class; of each example, in its class
  Buffer<float> top(x.padded), r(x.padded), top_p(x.padded), p(x.padded), base(x.padded);
  Buffer<float> found(ids ? x.padded : 0);
  Buffer<int32_t> row_ids(ids ? x.padded : 0);
  if (ids) spread(ids.as<int32_t>(), x.n, x.m, x.padded, row_ids);
  const Groups groups{x.row_classes, ids ? static_cast<const int32_t*>(row_ids) : nullptr};
  for (int64_t i = 0; i < 2 * x.n; ++i) sizes[i] = 0, last[i] = -1;
  for (int64_t i = 0; i < x.n; ++i) {
    const int32_t own = x.classes[i];
    sizes[own] += x.views, before[i] = last[own], last[own] = i;
  }
  parallel_for(x.padded, kGroup, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      top[i] = top_p[i] = x.scale.fixed ? 1.f : kLowest, r[i] = p[i] = 0.f, base[i] = normalize ? 1.f : 0.f;
      if (ids) found[i] = 0.f;
      if (normalize || i >= x.m) continue;
      const int64_t positive = x.views > 1 ? x.positive(i, 1) : before[i] < 0 ? last[x.classes[i]] : before[i];
      F product{};
      for_each_vector(x.d, [&](int64_t j, int lanes) { product += x.at(i, j, lanes) * x.at(positive, j, lanes); });
      if (const float s = sum(product); s - s == 0.f) base[i] = s;
    }
  });
  const Sums sums{top, r, top_p, p, found, base};
  for_each_tile(
      x, first, count, [&](const Part& t) { leave_out(groups, t); },
      [&](const Tile&, const Part& t) { add(groups, x.scale, inside, t, sums); });
  for (int64_t k = 0; k < rows; ++k) {
    const int64_t i = x.row(k, first, count);
    const float number = ids ? found[i] : static_cast<float>(sizes[x.classes[i % x.n]] - 1);
    float *const loss = losses.as<float>() + k, *const kept = stats.as<float>() + k;
    positives.as<float>()[k] = number;
    *loss = kept[rows] = kept[3 * rows] = 0.f;
    kept[0] = top[i], kept[2 * rows] = inside && number != 0.f ? top_p[i] : 0.f;  // of no weight, still a maximum
    const float weight = weights ? weights.as<float>()[i % x.n] : 1.f, tau = static_cast<float>(x.scale.tau);
    if (number == 0.f || weight == 0.f) continue;
    kept[rows] = weight / r[i];
    kept[3 * rows] = weight / (inside ? p[i] : number);
    *loss = inside ? (logf(r[i]) - logf(p[i])) + (top[i] - top_p[i]) / tau + logf(number)
                   : logf(r[i]) + ((top[i] - base[i]) - p[i] / number) / tau;
    *loss *= weight;
  }
}

void backward(Tensor grad, Tensor z, Tensor classes, Tensor ids, double temperature, bool normalize, bool inside,
              DType operand, int64_t first, Tensor inv_norm, Tensor stats, Tensor dz, Tensor dots) {
  const Views x(z, {}, classes, temperature, normalize, operand, inv_norm);
  Buffer<float> top(x.padded), weights(x.padded), top_p(x.padded), wanted(x.padded);
  Buffer<int32_t> row_ids(ids ? x.padded : 0);
  if (ids) spread(ids.as<int32_t>(), x.n, x.m, x.padded, row_ids);
  const Groups groups{x.row_classes, ids ? static_cast<const int32_t*>(row_ids) : nullptr};
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
      x, first, [&](const Part& t) { leave_out(groups, t); },
      [&](const Part& t) { weigh(groups, x.scale, inside, t, of); }, [](int64_t, float*) {}, dz, {}, dots);
}

constexpr int64_t kTickets = 64;  // to aim at: if the rows do not fill the threads, the keys are split

// What rows are compared with instead of each other, a chunk at a time, in parts that are joined in order. Fixed by the
// shapes: results do not depend on the threads.
struct Keys {
  int64_t count, chunk, length, parts, padded;  // length: of a part, in keys; padded: count to whole groups
  Buffer<float> inv_norm;
  Rows rows;

  Keys(const Tensor& keys, bool normalize, int64_t blocks)
      : count(keys.sizes[0]),
        chunk(count <= 1024   ? 64
              : count <= 8192 ? 128
                              : kMaxSide),
        padded(round_up(count, kGroup)),
        inv_norm(count),
        rows(keys, normalize, inv_norm) {
    // Parts of 512 keys at least, if there are 8.
    const int64_t chunks = ceil_div(count, chunk), enough = count < 8 * 512 ? 8 : count / 512;
    const int64_t most = blocks ? at_most(ceil_div(kTickets, blocks), enough) : 1;
    length = chunks ? ceil_div(chunks, at_most(chunks, most)) * chunk : chunk;
    parts = count ? ceil_div(count, length) : 1;
    parallel_for(count, kGroup, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) inv_norm[j] = rows.norm_of(j);
    });
  }
};

// visit(tile, chunk, part, n) over the tiles of x's rows with the n-th part of the keys; columns from x.padded on.
template <typename Visit>
void for_each_tile(const Views& x, const Keys& keys, const Groups& groups, const Visit& visit) {
  struct State {
    Tile tile;
    Operand chunk;
  };
  const int64_t blocks = ceil_div(x.m, kMaxSide);
  parallel_tickets(
      blocks * keys.parts, [&] { return State{Tile(kMaxSide, x.z.bf16), Operand(keys.chunk, x.d, x.operand_dtype)}; },
      [&](int64_t ticket, State& state) {
        auto& [tile, chunk] = state;
        const int64_t n = ticket / blocks, i0 = ticket % blocks * kMaxSide, rows = at_most(x.m - i0, kMaxSide);
        for (int64_t j0 = n * keys.length; j0 < at_most((n + 1) * keys.length, keys.count); j0 += keys.chunk) {
          const int64_t columns = at_most(keys.count - j0, keys.chunk);
          chunk.fill(0, columns, [&](int64_t i, int64_t j, int lanes) {
            return keys.rows.at(j0 + i, j, lanes);  // to round to half would gain nothing in float32
          });
          tile.multiply(x.z, i0, rows, chunk, 0, columns);
          const Part t{tile.s, tile.ld, i0, rows, x.padded + j0, columns, false};
          leave_out(groups, t);
          for (int64_t k = 0; k < rows; ++k)
            for (int64_t j = columns; j < t.width(); ++j) t.row(k)[j] = -kInf;
          visit(tile, chunk, t, n);
        }
      });
}

void among_keys(Tensor z, Tensor classes, Tensor ids, Tensor row_weights, Tensor key_rows, Tensor key_classes,
                Tensor key_ids, double temperature, bool normalize, bool inside, DType operand, Tensor inv_norm,
                Tensor losses, Tensor positives, Tensor dz, Tensor dtemperature) {
  const Views x(z, {}, classes, temperature, normalize, operand, inv_norm);
  const Keys keys(key_rows, normalize, ceil_div(x.m, kMaxSide));
  const int64_t m = x.m, padded = x.padded, all = padded + keys.padded, size = keys.parts * padded, ld = x.z.ld;
  const int64_t labels = 2 * (x.n + keys.count);
  Buffer<int32_t> all_classes(all), all_ids(ids ? all : 0);
  spread(x.classes, x.n, m, padded, all_classes);
  spread(key_classes.as<int32_t>(), keys.count, keys.count, keys.padded, all_classes + padded);
  if (ids) {
    spread(ids.as<int32_t>(), x.n, m, padded, all_ids);
    spread(key_ids.as<int32_t>(), keys.count, keys.count, keys.padded, all_ids + padded);
  }
  const Groups groups{all_classes, ids ? static_cast<const int32_t*>(all_ids) : nullptr};
  Buffer<int64_t> sizes(labels), last(labels);  // of each class
  for (int64_t i = 0; i < labels; ++i) sizes[i] = 0, last[i] = -1;
  for (int64_t j = 0; j < keys.count; ++j) ++sizes[all_classes[padded + j]], last[all_classes[padded + j]] = j;

  Buffer<float> base(padded), top(size), r(size), top_p(size), p(size), found(ids ? size : 0);
  parallel_for(padded, kGroup, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      base[i] = normalize ? 1.f : 0.f;
      for (int64_t row = i; row < size; row += padded) {
        top[row] = top_p[row] = x.scale.fixed ? 1.f : kLowest, r[row] = p[row] = 0.f;
        if (ids) found[row] = 0.f;
      }
      const int64_t positive = i < m ? last[all_classes[i]] : -1;
      if (normalize || positive < 0) continue;
      F product{};
      for_each_vector(x.d,
                      [&](int64_t j, int lanes) { product += x.at(i, j, lanes) * keys.rows.at(positive, j, lanes); });
      if (const float s = sum(product); s - s == 0.f) base[i] = s;
    }
  });
  for_each_tile(x, keys, groups, [&](const Tile&, const Operand&, const Part& t, int64_t n) {
    const int64_t at = n * padded;
    add(groups, x.scale, inside, t, {top + at, r + at, top_p + at, p + at, ids ? found + at : nullptr, base});
  });

  // The parts' sums become the first one's.
  parallel_for(padded / kGroup, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kGroup; i < end * kGroup; i += kLanes) {
      F high = splat(kLowest), high_p = high, sum_r{}, sum_p{}, number{};
      for (int64_t row = i; row < size; row += padded)
        high = max(load(top + row), high), high_p = max(load(top_p + row), high_p);
      const auto shrunk = [&](const float* sums, const float* tops, F to) {
        return load(sums) * exp_nonpositive((load(tops) - to) * x.scale.inverse);
      };
      for (int64_t row = i; row < size; row += padded) {
        sum_r += shrunk(r + row, top + row, high);
        sum_p += inside ? shrunk(p + row, top_p + row, high_p) : load(p + row);
        if (ids) number += load(found + row);
      }
      store(top + i, high), store(top_p + i, high_p), store(r + i, sum_r), store(p + i, sum_p);
      if (ids) store(found + i, number);
    }
  });
  const float tau = static_cast<float>(x.scale.tau);
  // What W is made of. The keys have no weight, and nothing is above their maximum.
  Buffer<float> tops(all), weights(all), tops_p(all), wanted(all);
  for (int64_t i = 0; i < all; ++i) tops[i] = tops_p[i] = kInf, weights[i] = wanted[i] = 0.f;
  for (int64_t i = 0; i < m; ++i) {
    const float number = ids ? found[i] : static_cast<float>(sizes[all_classes[i]]), mean = p[i] / number;
    const float weight = row_weights ? row_weights.as<float>()[i % x.n] : 1.f;
    positives.as<float>()[i] = number;
    losses.as<float>()[i] = 0.f;
    if (number == 0.f || weight == 0.f) continue;
    tops[i] = top[i], tops_p[i] = top_p[i];
    weights[i] = weight / r[i], wanted[i] = weight / (inside ? p[i] : number);
    // Quotients where r and p are terms of one scale: both may be far below 1, and their logarithms nearly the same.
    const float loss = inside          ? logf(r[i] / p[i]) + (top[i] - top_p[i]) / tau + logf(number)
                       : x.scale.fixed ? logf(r[i] / exp_nonpositive(mean * x.scale.inverse))
                                       : logf(r[i]) + ((top[i] - base[i]) - mean) / tau;
    losses.as<float>()[i] = weight * loss;
  }
  if (!dz.numel) return;

  Buffer<float> sums((size + bf16_gemm::kBlock) * ld);
  parallel_for(size, kGroup, [&](int64_t begin, int64_t end) {
    std::memset(sums + begin * ld, 0, (end - begin) * ld * sizeof(float));
  });
  for_each_tile(x, keys, groups, [&](Tile& tile, const Operand& chunk, const Part& t, int64_t n) {
    weigh(groups, x.scale, inside, t, {tops, weights, tops_p, wanted});
    tile.add(t.rows, t.columns, chunk, 0, sums + (n * padded + t.i0) * ld, x.z, t.i0, nullptr);
  });
  const float inverse = static_cast<float>(1. / x.scale.tau);
  parallel_for(m, kGroup, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* const v = dz.as<float>() + i * x.d;
      for_each_vector(x.d, [&](int64_t j, int lanes) {
        F total{};
        for (int64_t row = i; row < size; row += padded) total += load(sums + row * ld + j);
        store_lanes(v + j, lanes, total * inverse);
      });
      dtemperature.as<float>()[i] = -inverse * x.part(i).backward(x.place(i), v, dz, i);
    }
  });
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{forward, backward, among_keys};
}

}  // namespace sslops::supcon
