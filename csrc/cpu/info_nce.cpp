#include "info_nce.h"

#include "rows.h"
#include "softmax.h"
#include "tiles.h"

namespace sslops::info_nce {
namespace {

constexpr int64_t kBlock = 256;   // queries that a tile has at most
constexpr int64_t kTickets = 64;  // to aim at: if the queries do not fill the threads, the candidates are split
constexpr int64_t kMaxChunk = 256;

// Candidates at a time. Fixed by the shapes, as the parts are: results do not depend on the threads.
int64_t chunk_rows(int64_t candidates) { return candidates <= 1024 ? 64 : candidates <= 8192 ? 128 : kMaxChunk; }

Rows rows_from(const Tensor& x, int64_t first, bool normalize, const float* inv_norm) {
  Rows rows(x, normalize, inv_norm);
  rows.x = x.data + first * rows.d * x.item_size;
  return rows;
}

// What both directions begin with: the queries as the right operand, and of what the candidates are made.
struct Batch {
  Tensor candidates;
  bool normalize;
  int64_t b, k, d, chunk, padded;  // padded: b, up to whole groups
  int64_t first;                   // the candidate that is the positive of query 0; b before the first if none is
  const int64_t *query_ids, *candidate_ids;
  DType operand_dtype;
  Scale scale;
  Buffer<float> inv_norm;  // of the queries
  Rows query;
  Buffer<int32_t> low_ids;
  Operand q;

  Batch(const Tensor& query, const Tensor& key, const Tensor& negatives, const Tensor& query_ids,
        const Tensor& negative_ids, double temperature, bool normalize, DType operand, int64_t first)
      : candidates(negatives.dim ? negatives : key),
        normalize(normalize),
        b(query.sizes[0]),
        k(candidates.sizes[0]),
        d(query.sizes[1]),
        chunk(chunk_rows(k)),
        padded(round_up(b, kGroup)),
        first(negatives.dim ? -b : first),
        query_ids(query_ids.as<int64_t>()),
        candidate_ids(negative_ids.as<int64_t>()),
        operand_dtype(operand),
        scale(temperature, normalize),
        inv_norm(b),
        query(query, normalize, inv_norm),
        low_ids(query_ids ? padded : 0),
        q(b, d, operand) {
    for (int64_t i = 0; i < padded && query_ids; ++i) low_ids[i] = static_cast<int32_t>(i < b ? this->query_ids[i] : 0);
    parallel_tickets(padded / kGroup, [&](int64_t ticket) {
      const int64_t from = ticket * kGroup, count = at_most(b - from, kGroup);
      for (int64_t i = from; i < from + count; ++i) inv_norm[i] = this->query.norm_of(i);
      q.fill(from, count,
             [&](int64_t i, int64_t j, int lanes) { return round_to(operand_dtype, this->query.at(i, j, lanes)); });
    });
  }
};

// A chunk of candidates, the left operand, beside a thread's tile of S^T: a candidate a row, a query a column.
class Chunk {
 public:
  explicit Chunk(const Batch& x)
      : tile(kBlock, x.q.bf16),
        operand(x.chunk, x.d, x.operand_dtype, false),
        x_(x),
        inv_norm_(x.chunk),
        is_broken_(x.chunk) {}

  void load(int64_t from) {
    first = from;
    count = at_most(x_.k - from, x_.chunk);
    const Rows rows = this->rows();
    broken_ = false;
    for (int64_t i = 0; i < count; ++i) {
      // 0 times NaN is NaN: to be left out by some queries and not by others, a row must not be in the product.
      is_broken_[i] = x_.query_ids && !rows.finite(i);
      broken_ |= is_broken_[i];
      inv_norm_[i] = is_broken_[i] ? 1.f / kNormEps : rows.norm_of(i);
    }
    operand.fill(0, count, [&](int64_t i, int64_t j, int lanes) {
      return broken_ && is_broken_[i] ? F{} : rows.at(i, j, lanes);  // to round to half would gain nothing in float32
    });
  }

  // The candidates as they are stored.
  Rows rows() const { return rows_from(x_.candidates, first, x_.normalize, inv_norm_); }

  // tile = S^T for the queries i0 .. i0 + n, -inf where the candidate is no negative: a term of exactly 0.
  void multiply(int64_t i0, int64_t n) {
    tile.multiply(operand, 0, count, x_.q, i0, n);
    for (int64_t j = 0; j < count; ++j) {
      float* const s = row(j);
      for (int64_t i = 0; i < n && broken_ && is_broken_[j]; ++i) s[i] = __builtin_nanf("");
      if (x_.query_ids) leave_out(s, x_.candidate_ids[first + j], i0, n);
      if (const int64_t i = first + j - x_.first - i0; i >= 0 && i < n) s[i] = -kInf;
    }
  }

  float* row(int64_t j) { return tile.s + j * tile.ld; }

  Tile tile;
  Operand operand;
  int64_t first = 0, count = 0;

 private:
  void leave_out(float* s, int64_t id, int64_t i0, int64_t n) const {
    I any{};
    for (int64_t i = 0; i < n; i += kLanes) {
      I ids;
      std::memcpy(&ids, x_.low_ids + i0 + i, sizeof ids);
      any |= ids == static_cast<int32_t>(id);
    }
    constexpr I kNone{};
    if (id < 0 || !std::memcmp(&any, &kNone, sizeof any)) return;
    for (int64_t i = 0; i < n; ++i) s[i] = x_.query_ids[i0 + i] == id ? -kInf : s[i];
  }

  const Batch& x_;
  Buffer<float> inv_norm_;
  Buffer<bool> is_broken_;
  bool broken_ = false;  // any of them is
};

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

void forward(Tensor query, Tensor key, Tensor negatives, Tensor query_ids, Tensor negative_ids, double temperature,
             bool normalize, DType operand, int64_t first, bool decoupled, Tensor losses, Tensor logged, Tensor dquery,
             Tensor dtemperature, Tensor stats) {
  const Batch x(query, key, negatives, query_ids, negative_ids, temperature, normalize, operand, first);
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

  // Parts of 512 candidates at least, if there are 8: what they find is to be joined.
  const int64_t enough = x.k < 8 * 512 ? 8 : x.k / 512, most = blocks ? at_most(ceil_div(kTickets, blocks), enough) : 1;
  const int64_t length = chunks ? ceil_div(chunks, at_most(chunks, most)) : 1;
  const int64_t parts = ceil_div(chunks, length), rows = parts * x.padded;
  Buffer<float> top(rows), r(rows), exceeding(rows), o(dquery.numel ? rows * ld : 0);
  parallel_tickets(
      blocks * parts, [&] { return Chunk(x); },
      [&](int64_t ticket, Chunk& c) {
        const int64_t part = ticket / blocks, i0 = ticket % blocks * kBlock, n = at_most(b - i0, kBlock);
        const int64_t row = part * x.padded + i0;
        const Sums to{top + row, r + row, exceeding + row, dquery.numel ? o + row * ld : nullptr, ld};
        for (int64_t i = 0; i < round_up(n, kGroup); ++i)
          to.top[i] = x.scale.fixed ? 1.f : kLowest, to.r[i] = to.exceeding[i] = 0.f;
        if (to.o) std::memset(to.o, 0, round_up(n, kGroup) * ld * sizeof(float));
        for (int64_t j = part * length; j < at_most((part + 1) * length, chunks); ++j) {
          c.load(j * x.chunk);
          c.multiply(i0, n);
          if (!x.scale.fixed) raise(c, n, d, x.scale.inverse, to);
          (x.scale.fixed ? add<true> : add<false>)(c, n, x.scale.inverse, similarity + i0, to);
          if (to.o) c.tile.add(c.count, n, x.q, i0, nullptr, c.operand, 0, to.o);
        }
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
      const Close close = decoupled ? Close::decoupled(similarity[i], r_neg, highest, 1.f, x.scale)
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

// S^T becomes W^T. top, weights: of the queries, padded to whole vectors; weights = grad / r.
void weigh(Chunk& c, int64_t n, float inverse, const float* top, const float* weights) {
  for (int64_t j = 0; j < c.count; ++j) {
    float* const s = c.row(j);
    for (int64_t i = 0; i < n; i += kLanes)
      store(s + i, exp_nonpositive((load(s + i) - load(top + i)) * inverse) * load(weights + i));
  }
}

void backward(Tensor grad, Tensor query, Tensor key, Tensor negatives, Tensor query_ids, Tensor negative_ids,
              double temperature, bool normalize, DType operand, int64_t first, Tensor stats, Tensor dkey,
              Tensor dnegatives) {
  const Batch x(query, key, negatives, query_ids, negative_ids, temperature, normalize, operand, first);
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
            weigh(c, n, x.scale.inverse, top + i0, weights + i0);
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
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{forward, backward};
}

}  // namespace sslops::info_nce
