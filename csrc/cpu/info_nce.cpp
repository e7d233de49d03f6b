#include "info_nce.h"

#include "info_nce_tiles.h"

namespace sslops::info_nce {
namespace {

constexpr int64_t kFew = 4;  // queries whose paired negatives a thread takes

// What a part of the candidates adds up to, for the queries of a tile.
struct Sums {
  float *top, *r, *exceeding, *o;  // o: null, or rows of stride ld
  int64_t ld;
};

// Raises the maxima and scales down what was summed under the old ones.
void raise(Chunk& c, int64_t n, int64_t d, float inverse, const Sums& to) {
  for (int64_t i = 0; i < n; i += kLanes) {
    F best = splat(kLowest);
    for (int64_t j = 0; j < c.count; ++j) best = max(load(c.row(j) + i), best);
    for (int lane = 0; lane < kLanes && i + lane < n; ++lane) {
      float& top = to.top[i + lane];
      if (!(best[lane] > top)) continue;
      const float shrink = expf((top - best[lane]) * inverse);
      top = best[lane];
      to.r[i + lane] *= shrink;
      float* const o = to.o + (i + lane) * to.ld;
      for (int64_t k = 0; k < d && to.o; ++k) o[k] *= shrink;
    }
  }
}

// kCount rows of S^T become weights.
template <bool kFixed, int kCount>
SSLOPS_INLINE void add_rows(float* s, int64_t ld, int64_t n, float inverse, const float* top, const float* similarity,
                            float* r, float* exceeding) {
  const F one = splat(1.f);
  for (int64_t i = 0; i < n; i += kLanes) {
    const F base = kFixed ? one : load(top + i), bar = load(similarity + i);
    F total{}, count{};
    for (int j = 0; j < kCount; ++j) {
      const F v = load(s + j * ld + i), e = exp_nonpositive((v - base) * inverse);
      store(s + j * ld + i, e);
      total += e;
      count += select(v > bar, one, F{});
    }
    store(r + i, load(r + i) + total);
    store(exceeding + i, load(exceeding + i) + count);
  }
}

// similarity, as everything in `to`, is padded to whole vectors.
template <bool kFixed>
void add(Chunk& c, int64_t n, float inverse, const float* similarity, const Sums& to) {
  float r[kBlock], exceeding[kBlock];  // of the tile: sums of few terms are more exact
  for (int64_t i = 0; i < kBlock; ++i) r[i] = exceeding[i] = 0.f;
  int64_t j = 0;
  for (; j + 4 <= c.count; j += 4)
    add_rows<kFixed, 4>(c.row(j), c.tile.ld, n, inverse, to.top, similarity, r, exceeding);
  for (; j < c.count; ++j) add_rows<kFixed, 1>(c.row(j), c.tile.ld, n, inverse, to.top, similarity, r, exceeding);
  for (int64_t i = 0; i < n; ++i) to.r[i] += r[i], to.exceeding[i] += exceeding[i];
}

// The paired negatives of query i, which is `row` of what is added to.
void add(Paired& theirs, int64_t i, const Scale& scale, float similarity, const Sums& to, int64_t row) {
  float &top = to.top[row], &r = to.r[row];
  float* const o = to.o ? to.o + row * to.ld : nullptr;
  theirs.load(i);
  while (theirs.read()) {
    if (const float best = max(theirs.s); !scale.fixed && best > top) {
      const float shrink = expf((top - best) * scale.inverse);
      top = best;
      r *= shrink;
      for (int64_t k = 0; k < theirs.ld && o; ++k) o[k] *= shrink;
    }
    const F e = exp_nonpositive((theirs.s - top) * scale.inverse);
    r += sum(e);
    to.exceeding[row] += sum(select(theirs.s > similarity, splat(1.f), F{}));
    if (o) theirs.add(e, o);
  }
}

void forward(Tensor query, Tensor key, Tensor negatives, Tensor query_ids, Tensor negative_ids, Tensor negative_mask,
             Tensor paired, Tensor paired_mask, Tensor positive_weights, double temperature, bool normalize,
             DType operand, int64_t first, bool decoupled, Tensor losses, Tensor logged, Tensor dquery,
             Tensor dtemperature, Tensor stats) {
  const Batch x(query, key, negatives, query_ids, negative_ids, negative_mask, paired, paired_mask, temperature,
                normalize, operand, first);
  const int64_t b = x.b, d = x.d, ld = x.q.ld, blocks = ceil_div(b, kBlock), chunks = ceil_div(x.k, x.chunk);
  Buffer<float> inv_positive(b), similarity(x.padded);
  const Rows positive = rows_from(key, first, normalize, inv_positive);
  parallel_for(x.padded, kGroup, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      F product{};
      if (i < b) inv_positive[i] = positive.norm_of(i);
      for_each_vector(i < b ? d : 0,
                      [&](int64_t j, int lanes) { product += x.query.at(i, j, lanes) * positive.at(i, j, lanes); });
      similarity[i] = sum(product);
    }
  });

  const int64_t length = chunks_of_part(x.k, blocks);
  const int64_t parts = ceil_div(chunks, length), rows = (parts + (x.m > 0)) * x.padded;
  Buffer<float> top(rows), r(rows), exceeding(rows), o(dquery.numel ? rows * ld : 0);
  const auto start = [&](int64_t row, int64_t count) {
    const Sums to{top + row, r + row, exceeding + row, dquery.numel ? o + row * ld : nullptr, ld};
    for (int64_t i = 0; i < count; ++i) to.top[i] = x.scale.fixed ? 1.f : kLowest, to.r[i] = to.exceeding[i] = 0.f;
    if (to.o) std::memset(to.o, 0, count * ld * sizeof(float));
    return to;
  };
  parallel_tickets(
      blocks * parts, [&] { return Chunk(x); },
      [&](int64_t ticket, Chunk& c) {
        const int64_t part = ticket / blocks, i0 = ticket % blocks * kBlock, n = at_most(b - i0, kBlock);
        const Sums to = start(part * x.padded + i0, round_up(n, kGroup));
        for (int64_t j = part * length; j < at_most((part + 1) * length, chunks); ++j) {
          c.load(j * x.chunk);
          c.multiply(i0, n);
          if (!x.scale.fixed) raise(c, n, d, x.scale.inverse, to);
          (x.scale.fixed ? add<true> : add<false>)(c, n, x.scale.inverse, similarity + i0, to);
          if (to.o) c.tile.add(c.count, n, x.q, i0, nullptr, c.operand, 0, to.o);
        }
      });

  parallel_tickets(
      x.m ? ceil_div(b, kFew) : 0, [&] { return Paired(x); },
      [&](int64_t ticket, Paired& theirs) {
        const int64_t i0 = ticket * kFew, n = at_most(b - i0, kFew);
        const Sums to = start(parts * x.padded + i0, n);
        for (int64_t i = 0; i < n; ++i) add(theirs, i0 + i, x.scale, similarity[i0 + i], to, i);
      });

  const float inverse = static_cast<float>(1. / x.scale.tau);
  parallel_for(b, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float highest = x.scale.fixed ? 1.f : kLowest, r_neg = 0.f, count = 0.f;
      for (int64_t row = i; row < rows; row += x.padded) highest = max(top[row], highest);
      const auto shrink = [&](int64_t row) {
        return x.scale.fixed ? 1.f : expf((top[row] - highest) * x.scale.inverse);
      };
      for (int64_t row = i; row < rows; row += x.padded) r_neg += r[row] * shrink(row), count += exceeding[row];
      const float weight = positive_weights ? positive_weights.as<float>()[i] : 1.f;
      const Close close = decoupled ? Close::decoupled(similarity[i], r_neg, highest, weight, x.scale)
                                    : Close(similarity[i], r_neg, highest, x.scale);
      losses.as<float>()[i] = close.loss;
      logged.as<float>()[i] = similarity[i];
      logged.as<float>()[b + i] = count;
      const float kept[] = {close.top, close.inverse, close.share};
      for (int64_t row = 0; row < 3; ++row) stats.as<float>()[row * b + i] = kept[row];
      if (!dquery.numel) continue;
      float* const v = dquery.as<float>() + i * d;
      for (int64_t j = 0; j < d; ++j) v[j] = 0.f;
      for (int64_t row = i; row < rows; row += x.padded) {
        const float weight = shrink(row) * close.shrink * close.inverse;
        for_each_vector(d, [&](int64_t j, int lanes) {
          store_lanes(v + j, lanes, load_lanes(v + j, lanes, 0.f) + load(o + row * ld + j) * weight);
        });
      }
      for_each_vector(d, [&](int64_t j, int lanes) {
        store_lanes(v + j, lanes, (load_lanes(v + j, lanes, 0.f) - close.share * positive.at(i, j, lanes)) * inverse);
      });
      // dL/d(1/tau) = tau <q, dq>
      dtemperature.as<float>()[i] = -inverse * x.query.backward(i, v, dquery, i);
    }
  });
}

// S^T becomes W^T. top, weights: of the queries, padded to whole vectors; weights = grad / r. kSome: pairs may be left
// out, and are then 0 even of a query whose weight is NaN.
template <bool kSome>
void weigh(Chunk& c, int64_t n, float inverse, const float* top, const float* weights) {
  for (int64_t j = 0; j < c.count; ++j) {
    float* const s = c.row(j);
    for (int64_t i = 0; i < n; i += kLanes) {
      const F v = load(s + i), w = exp_nonpositive((v - load(top + i)) * inverse) * load(weights + i);
      store(s + i, kSome ? select(v == splat(-kInf), F{}, w) : w);
    }
  }
}

void backward(Tensor grad, Tensor query, Tensor key, Tensor negatives, Tensor query_ids, Tensor negative_ids,
              Tensor negative_mask, Tensor paired, Tensor paired_mask, double temperature, bool normalize,
              DType operand, int64_t first, Tensor stats, Tensor dkey, Tensor dnegatives, Tensor dpaired) {
  const Batch x(query, key, negatives, query_ids, negative_ids, negative_mask, paired, paired_mask, temperature,
                normalize, operand, first);
  const int64_t b = x.b, d = x.d, ld = x.q.ld;
  const float *const g = grad.as<float>(), *const kept = stats.as<float>();
  Buffer<float> top(x.padded), weights(x.padded), pull(b);
  for (int64_t i = 0; i < x.padded; ++i) {
    top[i] = i < b ? kept[i] : 0.f;
    weights[i] = i < b ? g[i] * kept[b + i] : 0.f;
    if (i < b) pull[i] = g[i] * kept[2 * b + i];
  }
  const float inverse = static_cast<float>(1. / x.scale.tau);
  // v, W^T q of a row, becomes the gradient of that row, which is the positive of query i if there is one.
  const auto finish = [&](const Rows& rows, int64_t row, float* v, int64_t i, const Tensor& out, int64_t to) {
    const bool pulled = i >= 0 && i < b;
    for_each_vector(d, [&](int64_t j, int lanes) {
      F w = load_lanes(v + j, lanes, 0.f);
      if (pulled) w -= x.query.at(i, j, lanes) * pull[i];
      store_lanes(v + j, lanes, w * inverse);
    });
    rows.backward(row, v, out, to);
  };

  if (const Tensor& out = negatives.dim ? dnegatives : dkey; out.numel) {
    const bool some = x.mask || x.query_ids;
    struct State {
      Chunk chunk;
      Buffer<float> dc;
    };
    parallel_tickets(
        ceil_div(x.k, x.chunk), [&] { return State{Chunk(x), Buffer<float>(x.chunk * ld)}; },
        [&](int64_t ticket, State& state) {
          Chunk& c = state.chunk;
          c.load(ticket * x.chunk);
          std::memset(state.dc, 0, x.chunk * ld * sizeof(float));
          for (int64_t i0 = 0; i0 < b; i0 += kBlock) {
            const int64_t n = at_most(b - i0, kBlock);
            c.multiply(i0, n);
            (some ? weigh<true> : weigh<false>)(c, n, x.scale.inverse, top + i0, weights + i0);
            c.tile.add(c.count, n, x.q, i0, state.dc, c.operand, 0, nullptr);
          }
          const Rows rows = c.rows();
          for (int64_t j = 0; j < c.count; ++j)
            finish(rows, j, state.dc + j * ld, c.first + j - x.first, out, c.first + j);
        });
  }
  if (negatives.dim && dkey.numel) {
    Buffer<float> inv_norm(b);
    const Rows rows(key, normalize, inv_norm);
    parallel_tickets(
        ceil_div(b, kGroup), [&] { return Buffer<float>(ld); },
        [&](int64_t ticket, float* v) {
          for (int64_t i = ticket * kGroup; i < at_most((ticket + 1) * kGroup, b); ++i) {
            inv_norm[i] = rows.norm_of(i);
            std::memset(v, 0, ld * sizeof(float));
            finish(rows, i, v, i, dkey, i);
          }
        });
  }
  if (dpaired.numel)
    parallel_tickets(
        ceil_div(b, kFew), [&] { return Paired(x); },
        [&](int64_t ticket, Paired& theirs) {
          const int64_t row = d * dpaired.item_size;
          for (int64_t i = ticket * kFew; i < at_most((ticket + 1) * kFew, b); ++i) {
            for (int64_t j = 0; j < x.m && x.paired_mask; ++j)
              if (!x.paired_mask(i, j)) std::memset(dpaired.data + (i * x.m + j) * row, 0, row);
            theirs.load(i);
            while (theirs.read()) {
              float w[kLanes], along[kLanes];
              const F pull = exp_nonpositive((theirs.s - top[i]) * x.scale.inverse) * (weights[i] * inverse);
              store(w, pull);
              store(along, pull * theirs.s * load(theirs.factor));
              for (int k = 0; k < theirs.count; ++k) {
                const float inv = theirs.inv_norm[k];
                const bool project = normalize && inv < 1.f / kNormEps;  // as Rows::backward
                for_each_vector(d, [&](int64_t j, int lanes) {
                  F g = load(theirs.q + j) * w[k];
                  if (project) g -= load(theirs.at[k] + j) * along[k];
                  store_from_float(dpaired.data, dpaired.dtype, theirs.row[k] * d + j, lanes, g * inv);
                });
              }
            }
          }
        });
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{together<forward>, together<backward>};
}

}  // namespace sslops::info_nce
