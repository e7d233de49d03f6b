#include "skip_gram.h"

#include "parts.h"
#include "softplus.h"

namespace sslops::skip_gram {
namespace {

constexpr int64_t kPairs = 64, kRows = 64;  // a ticket's
constexpr int64_t kAhead = 8;               // rows that are fetched before a sum needs them
constexpr int kWide = 8;                    // vectors of a sum at once
constexpr int kDigit = 11;                  // bits that a pass sorts by

SSLOPS_INLINE F at(const Tensor& x, int64_t row, int64_t j, int lanes) {
  return load_as_float(x.data, x.dtype, row * x.sizes[1] + j, lanes);
}

// Rows lie anywhere in a table that fits no cache: those of the next pair come while this one's are multiplied.
void fetch(const Tensor& x, int64_t row) {
  const int64_t bytes = x.sizes[1] * x.item_size;
  const char* const from = x.data + row * bytes;
  for (int64_t k = 0; k < bytes; k += 64) __builtin_prefetch(from + k);
}

// Rows and what each weighs; those before `fetched` are fetched ahead.
struct Terms {
  const Tensor& rows;
  const int64_t* source;
  const float* weights;
  int64_t n, fetched;
};

// kCount vectors of row r of out from column j on, or fewer if so few are left.
template <int kCount>
SSLOPS_INLINE void combine_columns(const Terms& x, const Tensor& out, int64_t r, int64_t j) {
  const int64_t d = out.sizes[1], left = d - j;
  if constexpr (kCount > 1)
    if (left <= (kCount - 1) * kLanes) return combine_columns<kCount - 1>(x, out, r, j);
  const auto add = [&](int lanes) {
    constexpr int kLast = kCount - 1;
    F total[kCount]{};
    for (int64_t p = 0; p < x.n; ++p) {
      if (j == 0 && p + kAhead < x.fetched) fetch(x.rows, x.source[p + kAhead]);
      for (int c = 0; c < kLast; ++c) total[c] += x.weights[p] * at(x.rows, x.source[p], j + c * kLanes, kLanes);
      total[kLast] += x.weights[p] * at(x.rows, x.source[p], j + kLast * kLanes, lanes);
    }
    for (int c = 0; c < kLast; ++c) store_from_float(out.data, out.dtype, r * d + j + c * kLanes, kLanes, total[c]);
    store_from_float(out.data, out.dtype, r * d + j + kLast * kLanes, lanes, total[kLast]);
  };
  if (left >= kCount * kLanes) return add(kLanes);
  add(static_cast<int>(left - (kCount - 1) * kLanes));
}

// Row r of out becomes the sum of the weighted rows, in their order.
void combine(const Terms& x, const Tensor& out, int64_t r) {
  for (int64_t j = 0; j < out.sizes[1]; j += kWide * kLanes) combine_columns<kWide>(x, out, r, j);
}

// The products of kAtOnce rows of the output table with one of the input's
template <int kAtOnce>
SSLOPS_INLINE void multiply(const Tensor& input, int64_t center, const Tensor& output, const int64_t* ids, float* y) {
  F total[kAtOnce][2]{};
  const auto add = [&](int64_t j, int chain, int lanes) {
    const F u = at(input, center, j, lanes);
    for (int k = 0; k < kAtOnce; ++k) total[k][chain] += u * at(output, ids[k], j, lanes);
  };
  const int64_t d = input.sizes[1];
  int64_t j = 0;
  for (; j + 2 * kLanes <= d; j += 2 * kLanes) add(j, 0, kLanes), add(j + kLanes, 1, kLanes);
  for_each_vector(d - j, [&](int64_t i, int lanes) { add(j + i, 0, lanes); });
  for (int k = 0; k < kAtOnce; ++k) y[k] = sum(total[k][0] + total[k][1]);
}

void forward(Tensor input, Tensor output, Tensor centers, Tensor contexts, Tensor negatives, bool mean, Tensor loss,
             Tensor slopes, Tensor dcenter) {
  const int64_t b = centers.numel, n = negatives.sizes[1], terms = n + 1, padded = round_up(terms, kLanes);
  const int64_t* const center = centers.as<int64_t>();
  Buffer<float> losses(b);
  struct State {
    Buffer<float> y;
    Buffer<int64_t> ids;  // of the pair's rows of the output table, the context's first
  };
  parallel_parts(
      ceil_div(b, kPairs), [&] { return State{Buffer<float>(padded), Buffer<int64_t>(2 * terms)}; },
      [&](int64_t ticket, State& state) {
        float* const y = state.y;
        int64_t *ids = state.ids, *next = ids + terms;
        const auto look_up = [&](int64_t i, int64_t* to) {
          to[0] = contexts.as<int64_t>()[i];
          std::memcpy(to + 1, negatives.as<int64_t>() + i * n, n * sizeof(int64_t));
        };
        const int64_t first = ticket * kPairs, end = at_most(first + kPairs, b);
        look_up(first, ids);
        for (int64_t i = first; i < end; ++i) {
          const bool more = i + 1 < end;
          if (more) look_up(i + 1, next), fetch(input, center[i + 1]);
          int64_t k = 0;
          for (; k + 2 <= terms; k += 2) {
            if (more) fetch(output, next[k]), fetch(output, next[k + 1]);
            multiply<2>(input, center[i], output, ids + k, y + k);
          }
          if (k < terms) {
            if (more) fetch(output, next[k]);
            multiply<1>(input, center[i], output, ids + k, y + k);
          }
          y[0] = -y[0];
          for (k = 1; k < terms; ++k)
            if (ids[k] == ids[0]) y[k] = -kInf;
          for (k = terms; k < padded; ++k) y[k] = -kInf;
          F total{};
          for (k = 0; k < padded; k += kLanes) {
            const Softplus term(load(y + k));
            total += term.value;
            store(y + k, term.slope);
          }
          losses[i] = sum(total);
          y[0] = -y[0];
          if (slopes.numel) std::memcpy(slopes.as<float>() + i * terms, y, terms * sizeof(float));
          if (dcenter.numel) combine({output, ids, y, terms, 0}, dcenter, i);
          int64_t* const other = ids;
          ids = next, next = other;
        }
      });
  if (loss.dim) return static_cast<void>(std::memcpy(loss.data, losses, b * sizeof(float)));
  double total = 0.;
  for (int64_t i = 0; i < b; ++i) total += losses[i];
  *loss.as<float>() = static_cast<float>(mean ? total / static_cast<double>(b) : total);
}

// By digits, from the lowest on: each pass keeps the order of the one before.
int64_t sort(Tensor ids, int64_t highest, Tensor order, Tensor begin, Tensor unique) {
  struct Place {
    int64_t id, place;
  };
  const int64_t n = ids.numel;
  Buffer<Place> first(n), second(n);
  Place *from = first, *to = second;
  for (int64_t p = 0; p < n; ++p) from[p] = {ids.as<int64_t>()[p], p};
  constexpr int64_t kMask = (1 << kDigit) - 1;
  for (int shift = 0; shift < 63 && highest >> shift; shift += kDigit) {
    int64_t start[kMask + 2]{};
    for (int64_t p = 0; p < n; ++p) ++start[(from[p].id >> shift & kMask) + 1];
    for (int64_t k = 0; k < kMask; ++k) start[k + 1] += start[k];
    for (int64_t p = 0; p < n; ++p) to[start[from[p].id >> shift & kMask]++] = from[p];
    Place* const other = from;
    from = to, to = other;
  }
  int64_t count = 0;
  for (int64_t p = 0; p < n; ++p) {
    order.as<int64_t>()[p] = from[p].place;
    if (p && from[p].id == from[p - 1].id) continue;
    unique.as<int64_t>()[count] = from[p].id;
    begin.as<int64_t>()[count++] = p;
  }
  begin.as<int64_t>()[count] = n;
  return count;
}

void sum(Tensor rows, Tensor centers, Tensor slopes, Tensor grad, bool mean, Tensor order, Tensor begin, Tensor unique,
         int64_t count, Tensor out) {
  const int64_t pairs = centers ? centers.numel : rows.sizes[0], terms = slopes ? slopes.sizes[1] : 1;
  const int64_t *const places = order.as<int64_t>(), *const starts = begin.as<int64_t>();
  const float over = mean ? static_cast<float>(pairs) : 1.f, *const g = grad.as<float>();
  Buffer<int64_t> source(order.numel);
  Buffer<float> weights(order.numel);
  parallel_parts(ceil_div(count, kRows), [&](int64_t ticket) {
    const int64_t first = ticket * kRows, last = at_most(first + kRows, count), end = starts[last];
    for (int64_t p = starts[first]; p < end; ++p) {
      const int64_t pair = places[p] / terms;
      source[p] = centers ? centers.as<int64_t>()[pair] : pair;
      weights[p] = (slopes ? slopes.as<float>()[places[p]] : 1.f) * (g[grad.dim ? pair : 0] / over);
      if (p < starts[first] + kAhead) fetch(rows, source[p]);
    }
    for (int64_t k = first; k < last; ++k) {
      const int64_t p = starts[k];
      combine({rows, source + p, weights + p, starts[k + 1] - p, end - p}, out,
              count < out.sizes[0] ? unique.as<int64_t>()[k] : k);
    }
  });
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{forward, sort, sum};
}

}  // namespace sslops::skip_gram
