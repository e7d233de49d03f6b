// What both directions of InfoNCE read: the queries, chunks of candidates beside tiles of S^T, and the negatives that
// are a query's alone.
#pragma once
#include "rows.h"
#include "softmax.h"
#include "tiles.h"

namespace sslops::info_nce {
namespace {

constexpr int64_t kBlock = 256;  // queries that a tile has at most

Rows rows_from(const Tensor& x, int64_t first, bool normalize, const float* inv_norm) {
  Rows rows(x, normalize, inv_norm);
  rows.x = x.data + first * rows.d * x.item_size;
  return rows;
}

// [B, n] bool of any strides, false for what is left out; or none.
struct Mask {
  const char* data;
  int64_t row, column;

  explicit Mask(const Tensor& x) : data(x.data), row(x ? x.strides[0] : 0), column(x ? x.strides[1] : 0) {}
  explicit operator bool() const { return data != nullptr; }
  bool operator()(int64_t i, int64_t j) const { return !data || data[i * row + j * column]; }
  // A byte each of columns j .. j + n, at most 8, the first in the lowest.
  uint64_t word(int64_t i, int64_t j, int64_t n) const {
    const char* const from = data + i * row + j * column;
    uint64_t found = 0;
    if (n == 8 && column == 1)
      std::memcpy(&found, from, 8);
    else
      for (int64_t k = 0; k < n; ++k) found |= static_cast<uint64_t>(from[k * column] != 0) << 8 * k;
    return found;
  }
};

// Bytes [8, 8], a word a row.
SSLOPS_INLINE void transpose(uint64_t (&w)[8]) {
  uint64_t low = 0xffffffff;
  for (int step = 4; step; low ^= low << 4 * step, step /= 2)
    for (int k = 0; k < 8; ++k) {
      if (k & step) continue;
      const uint64_t swapped = (w[k] >> 8 * step ^ w[k + step]) & low;
      w[k] ^= swapped << 8 * step;
      w[k + step] ^= swapped;
    }
}

// What both directions begin with: the queries as the right operand, and of what the candidates are made.
struct Batch {
  Tensor candidates, paired;
  bool normalize;
  int64_t b, k, m, d, chunk, padded;  // m: paired negatives of a query; padded: b, up to whole groups
  int64_t first;                      // the candidate that is the positive of query 0; b before the first if none is
  const int64_t *query_ids, *candidate_ids;
  Mask mask, paired_mask;
  DType operand_dtype;
  Scale scale;
  Buffer<float> inv_norm;  // of the queries
  Rows query;
  Buffer<int32_t> low_ids;
  Operand q;

  Batch(const Tensor& query, const Tensor& key, const Tensor& negatives, const Tensor& query_ids,
        const Tensor& negative_ids, const Tensor& negative_mask, const Tensor& paired, const Tensor& paired_mask,
        double temperature, bool normalize, DType operand, int64_t first)
      : candidates(negatives.dim ? negatives : key),
        paired(paired),
        normalize(normalize),
        b(query.sizes[0]),
        k(candidates.sizes[0]),
        m(paired.dim ? paired.sizes[1] : 0),
        d(query.sizes[1]),
        chunk(chunk_rows(k)),
        padded(round_up(b, kGroup)),
        first(negatives.dim ? -b : first),
        query_ids(query_ids.as<int64_t>()),
        candidate_ids(negative_ids.as<int64_t>()),
        mask(negative_mask),
        paired_mask(paired_mask),
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
        is_broken_(x.chunk),
        counted_(x.mask ? round_up(x.chunk, 8) * kBlock : 0) {}

  void load(int64_t from) {
    first = from;
    count = at_most(x_.k - from, x_.chunk);
    const Rows rows = this->rows();
    broken_ = false;
    for (int64_t i = 0; i < count; ++i) {
      // 0 times NaN is NaN: to be left out by some queries and not by others, a row must not be in the product.
      is_broken_[i] = (x_.query_ids || x_.mask) && !rows.finite(i);
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
    if (x_.mask) read_mask(i0, n);
    for (int64_t j = 0; j < count; ++j) {
      float* const s = row(j);
      for (int64_t i = 0; i < n && broken_ && is_broken_[j]; ++i) s[i] = __builtin_nanf("");
      if (x_.query_ids) leave_out(s, x_.candidate_ids[first + j], i0, n);
      if (x_.mask) leave_out(s, counted_ + j * kBlock, n);
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

  // The mask's bytes, a row a candidate.
  void read_mask(int64_t i0, int64_t n) {
    for (int64_t i = 0; i < n; i += 8)
      for (int64_t j = 0; j < count; j += 8) {
        uint64_t block[8]{};
        for (int64_t k = 0; k < at_most(n - i, 8); ++k)
          block[k] = x_.mask.word(i0 + i + k, first + j, at_most(count - j, 8));
        transpose(block);
        for (int64_t k = 0; k < 8; ++k) std::memcpy(counted_ + (j + k) * kBlock + i, block + k, 8);
      }
  }
  static void leave_out(float* s, const uint8_t* counted, int64_t n) {
    typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
    for (int64_t i = 0; i < n; i += kLanes) {
      Bytes raw;
      std::memcpy(&raw, counted + i, sizeof raw);
      store(s + i, select(__builtin_convertvector(raw, I) != 0, sslops::load(s + i), splat(-kInf)));
    }
  }

  const Batch& x_;
  Buffer<float> inv_norm_;
  Buffer<bool> is_broken_;
  Buffer<uint8_t> counted_;
  bool broken_ = false;  // any of them is
};

// The sums of the lanes of kLanes vectors, in the order of sum(F); one after the other they take longer than the rows.
SSLOPS_INLINE F sum_each(const float* lanes) {
  typedef float Quarter __attribute__((vector_size(16)));
  float sums[kLanes];
  for (int k = 0; k < kLanes; ++k) {
    Quarter part[kLanes / 4];
    std::memcpy(part, lanes + k * kLanes, sizeof part);
    for (int half = kLanes / 8; half; half /= 2)
      for (int t = 0; t < half; ++t) part[t] += part[t + half];
    sums[k] = (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
  }
  return load(sums);
}

// A query's paired negatives as a thread goes through them, a vector of those that count at a time.
class Paired {
 public:
  explicit Paired(const Batch& x)
      : ld(round_up(x.d, kLanes)),
        q(ld),
        x_(x),
        as_stored_(x.paired.dtype == DType::f32 && ld == x.d),
        copies_(kLanes * ld) {}

  void load(int64_t i) {
    query_ = i;
    next_ = 0;
    fill(q, [&](int64_t j, int lanes) { return round_to(x_.operand_dtype, x_.query.at(i, j, lanes)); });
  }

  // s of the next ones, -inf beyond `count`; false if there are none.
  bool read() {
    for (count = 0; next_ < x_.m && count < kLanes; ++next_)
      if (x_.paired_mask(query_, next_)) row[count++] = query_ * x_.m + next_;
    if (!count) return false;
    float squares[kLanes * kLanes]{}, products[kLanes * kLanes]{};
    for (int k = 0; k < count; ++k) {
      at[k] = as_stored_ ? x_.paired.as<float>() + row[k] * x_.d : copy(k, 1.f);
      F square[4]{}, product[4]{};
      in_chains(ld, [&](int64_t j, int chain, int) {
        const F v = sslops::load(at[k] + j);
        square[chain] += v * v;
        product[chain] += v * sslops::load(q + j);
      });
      store(squares + k * kLanes, (square[0] + square[1]) + (square[2] + square[3]));
      store(products + k * kLanes, (product[0] + product[1]) + (product[2] + product[3]));
    }
    for (int k = count; k < kLanes; ++k) at[k] = at[0];
    s = sum_each(products);
    const F square = sum_each(squares);
    for (int k = 0; k < kLanes; ++k) factor[k] = inv_norm[k] = x_.normalize ? 1.f / __builtin_sqrtf(square[k]) : 1.f;
    s *= sslops::load(factor);
    const unsigned there = (1u << count) - 1;
    float of[kLanes];
    store(of, s);
    // Beyond float32's range the rows are made unit first.
    for (unsigned k = 0, odd = x_.normalize ? there & ~bits((square > 1e-20f) & (square < 1e30f)) : 0; odd >> k; ++k) {
      if (!(odd >> k & 1)) continue;
      inv_norm[k] = sslops::inv_norm(x_.paired.data, x_.paired.dtype, row[k] * x_.d, x_.d);
      factor[k] = 1.f;
      at[k] = copy(k, inv_norm[k]);
      F product{};
      for (int64_t j = 0; j < ld; j += kLanes) product += sslops::load(at[k] + j) * sslops::load(q + j);
      of[k] = sum(product);
    }
    for (int k = count; k < kLanes; ++k) of[k] = -kInf, factor[k] = 0.f;
    s = sslops::load(of);
    return true;
  }

  // o [ld] += the negatives with these weights, 0 where there is none.
  void add(F weights, float* o) const {
    float w[kLanes];
    store(w, weights * sslops::load(factor));
    for (int k = 0; k < count; k += 4)
      for (int64_t j = 0; j < ld; j += kLanes) {
        F v = sslops::load(o + j);
        for (int t = k; t < k + 4; ++t) v += sslops::load(at[t] + j) * w[t];
        store(o + j, v);
      }
  }

  const int64_t ld;
  Buffer<float> q;          // the query as operand; zeros to whole vectors, here and in what `at` has
  const float* at[kLanes];  // rows that are unit but for a factor
  float factor[kLanes], inv_norm[kLanes];
  int64_t row[kLanes];  // of [B M, D]
  F s;
  int count = 0;

 private:
  template <typename At>
  void fill(float* to, const At& value) {
    if (const int64_t whole = x_.d / kLanes * kLanes; whole < ld) store(to + whole, F{});
    for_each_vector(x_.d, [&](int64_t j, int lanes) { store_lanes(to + j, lanes, value(j, lanes)); });
  }
  const float* copy(int k, float scale) {
    const Tensor& from = x_.paired;
    fill(copies_ + k * ld,
         [&](int64_t j, int lanes) { return load_as_float(from.data, from.dtype, row[k] * x_.d + j, lanes) * scale; });
    return copies_ + k * ld;
  }

  const Batch& x_;
  const bool as_stored_;  // rows are read where they lie
  Buffer<float> copies_;
  int64_t query_ = 0, next_ = 0;
};

}  // namespace
}  // namespace sslops::info_nce
