#include "sinkhorn.h"

#include "../common/parallel.h"
#include "last_layer.h"
#include "log.h"
#include "logits.h"

namespace sslops::sinkhorn {
namespace {

// A row as it is stored.
struct Row {
  const char* data;
  DType dtype;
};

struct Scores {
  const char* data;
  DType dtype;
  int64_t views, rows, k, width, item;  // width: from a row to the next
  float inverse;

  Scores(const Tensor& x, double temperature)
      : data(x.data),
        dtype(x.dtype),
        views(x.sizes[0]),
        rows(x.sizes[1]),
        k(x.sizes[2]),
        width(k),
        item(x.item_size),
        inverse(Scale(temperature, false).inverse) {}
  // Of one view, in memory of float32.
  Scores(const float* x, int64_t rows, int64_t k, int64_t width, double temperature)
      : data(reinterpret_cast<const char*>(x)),
        dtype(DType::f32),
        views(1),
        rows(rows),
        k(k),
        width(width),
        item(sizeof(float)),
        inverse(Scale(temperature, false).inverse) {}
  Row row(int64_t view, int64_t i) const { return {data + (view * rows + i) * width * item, dtype}; }
};

// visit(view, scores) of all of them: as they are, from view 0 on; or, of features, those of a chunk of a view's rows.
template <typename Visit>
void for_each_chunk(const Tensor& x, const Tensor& prototypes, bool unit, DType operand, double temperature,
                    const Visit& visit) {
  if (!prototypes.dim) return visit(0, Scores(x, temperature));
  const int64_t rows = x.sizes[1], chunks = ceil_div(rows, LastLayer::kChunk),
                count = chunks ? ceil_div(rows, chunks) : 0;
  LastLayer layer(prototypes, unit, operand, count);
  for (int64_t view = 0; view < x.sizes[0]; ++view)
    for (int64_t first = 0; first < rows; first += count) {
      const int64_t size = at_most(count, rows - first);
      layer.multiply(size, [&](int64_t i, int64_t j, int lanes) {
        return load_as_float(x.data, x.dtype, (view * rows + first + i) * layer.d + j, lanes);
      });
      visit(view, Scores(layer.logits(), size, layer.k, layer.ld, temperature));
    }
}

// ---- columns: the tickets are ranges of them ----

constexpr int64_t kColumns = 1024;  // a ticket's
constexpr int64_t kAtOnce = 8;      // rows, in registers between their maximum and their exponentials
constexpr int64_t kSummed = 64;     // rows whose sum is one term: long sums do not gather the roundings of all rows

// kCount rows join the maxima and the sums.
template <DType kType, int kCount>
SSLOPS_INLINE void add_rows(const Scores& x, int64_t view, int64_t i, int64_t first, int64_t n, float* top,
                            float* sums) {
  const char* rows[kCount];
  for (int r = 0; r < kCount; ++r) rows[r] = x.row(view, i + r).data;
  for_each_vector(n, [&](int64_t j, int lanes) {
    const F old = load(top + j);
    F v[kCount], to = old;
    for (int r = 0; r < kCount; ++r) to = max(v[r] = load_as_float(rows[r], kType, first + j, lanes), to);
    F total = load(sums + j) * exp_nonpositive((old - to) * x.inverse);
    for (int r = 0; r < kCount; ++r) total += exp_nonpositive((v[r] - to) * x.inverse);
    store(top + j, to);
    store(sums + j, total);
  });
}

template <DType kType>
void column_range(const Scores& x, int64_t view, int64_t first, int64_t n, float* to_top, float* to_sums) {
  float top[kColumns], sums[kColumns], before[kColumns], block[kColumns];
  for (int64_t j = 0; j < round_up(n, kLanes); ++j)
    top[j] = j < n ? to_top[j] : kLowest, sums[j] = j < n ? to_sums[j] : 0.f;
  for (int64_t i = 0; i < x.rows;) {
    const int64_t end = at_most(i + kSummed, x.rows);
    for (int64_t j = 0; j < round_up(n, kLanes); ++j) before[j] = top[j], block[j] = 0.f;
    for (; i + kAtOnce <= end; i += kAtOnce) add_rows<kType, kAtOnce>(x, view, i, first, n, top, block);
    for (; i < end; ++i) add_rows<kType, 1>(x, view, i, first, n, top, block);
    for (int64_t j = 0; j < n; j += kLanes) {
      const F fall = exp_nonpositive((load(before + j) - load(top + j)) * x.inverse);
      store(sums + j, load(sums + j) * fall + load(block + j));
    }
  }
  std::memcpy(to_top, top, n * sizeof(float));
  std::memcpy(to_sums, sums, n * sizeof(float));
}

// The rows join the columns' maxima and sums [V, K].
void add_columns(const Scores& x, float* top, float* sums) {
  const int64_t wanted = round_up((x.k + 63) / 64, 64);  // enough ranges for many threads, none shorter than 512 bytes
  const int64_t width = wanted < 128 ? 128 : at_most(wanted, kColumns), ranges = (x.k + width - 1) / width;
  const auto run = x.dtype == DType::f32    ? column_range<DType::f32>
                   : x.dtype == DType::bf16 ? column_range<DType::bf16>
                                            : column_range<DType::f16>;
  parallel_tickets(x.views * ranges, [&](int64_t ticket) {
    const int64_t view = ticket / ranges, first = ticket % ranges * width, to = view * x.k + first;
    run(x, view, first, at_most(width, x.k - first), top + to, sums + to);
  });
}

void find_columns(const Tensor& scores, const Tensor& prototypes, bool unit, DType operand, double temperature,
                  int64_t k, float* top, float* sums) {
  for (int64_t j = 0; j < scores.sizes[0] * k; ++j) top[j] = kLowest, sums[j] = 0.f;
  for_each_chunk(scores, prototypes, unit, operand, temperature,
                 [&](int64_t view, const Scores& x) { add_columns(x, top + view * k, sums + view * k); });
}

void columns(Tensor scores, Tensor prototypes, bool unit, DType operand, double temperature, Tensor top, Tensor sums) {
  find_columns(scores, prototypes, unit, operand, temperature, top.sizes[1], top.as<float>(), sums.as<float>());
}

// ---- mass: the tickets are blocks of rows ----

constexpr int64_t kBlock = 16, kMaxBlocks = 32, kGroupRows = 4;

// y = x / tau + b [n, to whole vectors], -inf behind n; returns the maximum.
template <DType kType>
float scale_tile(const char* x, int64_t first, int64_t n, float inverse, const float* b, float* y) {
  return largest(n, [&](int64_t j, int lanes) {
    F v = load_as_float(x, kType, first + j, lanes) * inverse;
    v += load_lanes(b + first + j, lanes, 0.f);
    v = filled(v, lanes, -kInf);
    store(y + j, v);
    return v;
  });
}

// A thread's rows, as exponentials relative to their tiles' maxima, and what makes a softmax of each tile.
struct Group {
  const int64_t ld, tiles, rows;
  Buffer<float> e, factors, top;

  explicit Group(int64_t k)
      : ld(round_up(k, 16)),
        tiles(tiles_of(k)),
        rows(k <= 32768 ? kGroupRows : 1),  // half of the second cache
        e(rows * ld),
        factors(rows * tiles),
        top(tiles) {}

  void fill(int64_t r, const Row& row, int64_t item, int64_t k, float inverse, const float* b) {
    const auto run = row.dtype == DType::f32    ? scale_tile<DType::f32>
                     : row.dtype == DType::bf16 ? scale_tile<DType::bf16>
                                                : scale_tile<DType::f16>;
    float best = kLowest, *const sums = factors + r * tiles;
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = t * kTile, n = at_most(kTile, k - first);
      float* const y = e + r * ld + first;
      top[t] = run(row.data, first, n, inverse, b, y);
      F z[4]{};
      in_chains(n, [&](int64_t j, int chain, int) {
        prefetch(row.data + (first + kTile) * item, j, chain, sizeof(float));
        const F v = exp_nonpositive(load(y + j) - top[t]);
        store(y + j, v);
        z[chain] += v;
      });
      sums[t] = sum(z);
      best = max(top[t], best);
    }
    float total = 0.f;
    for (int64_t t = 0; t < tiles; ++t) {
      top[t] = exp_nonpositive(top[t] - best);
      total += sums[t] * top[t];
    }
    for (int64_t t = 0; t < tiles; ++t) sums[t] = top[t] / total;
  }

  template <int kCount>
  void add(int64_t k, float* mass) const {
    for (int64_t t = 0; t < tiles; ++t) {
      float factor[kCount];
      for (int r = 0; r < kCount; ++r) factor[r] = factors[r * tiles + t];
      const int64_t first = t * kTile, end = at_most(first + kTile, k);
      for (int64_t j = first; j < end; j += kLanes) {
        F v = load(mass + j);
        for (int r = 0; r < kCount; ++r) v += load(e + r * ld + j) * factor[r];
        store(mass + j, v);
      }
    }
  }
};

// The rows' softmax joins its sums [V, K].
void add_mass(const Scores& x, const float* b, float* mass) {
  const int64_t wanted = (x.rows + kBlock - 1) / kBlock, most = at_most(wanted, kMaxBlocks);
  const int64_t height = most ? (x.rows + most - 1) / most : 1, blocks = (x.rows + height - 1) / height;
  const int64_t ld = round_up(x.k, 16);
  Buffer<float> parts(x.views * blocks * ld);
  parallel_tickets(
      x.views * blocks, [&] { return Group(x.k); },
      [&](int64_t ticket, Group& group) {
        const int64_t view = ticket / blocks, begin = ticket % blocks * height, end = at_most(begin + height, x.rows);
        float* const part = parts + ticket * ld;
        std::memset(part, 0, ld * sizeof(float));
        for (int64_t i = begin; i < end; i += group.rows) {
          const int64_t count = at_most(group.rows, end - i);
          for (int64_t r = 0; r < count; ++r) group.fill(r, x.row(view, i + r), x.item, x.k, x.inverse, b + view * x.k);
          switch (count) {
            case 4:
              group.add<4>(x.k, part);
              break;
            case 3:
              group.add<3>(x.k, part);
              break;
            case 2:
              group.add<2>(x.k, part);
              break;
            default:
              group.add<1>(x.k, part);
          }
        }
      });
  const int64_t vectors = ceil_div(x.k, kLanes);
  parallel_for(x.views * vectors, 64, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t view = k / vectors, j = k % vectors * kLanes;
      const int lanes = static_cast<int>(at_most(x.k - j, kLanes));
      F total{};
      for (int64_t block = 0; block < blocks; ++block) total += load(parts + (view * blocks + block) * ld + j);
      float* const to = mass + view * x.k + j;
      store_lanes(to, lanes, load_lanes(to, lanes, 0.f) + total);
    }
  });
}

void find_mass(const Tensor& scores, const Tensor& prototypes, bool unit, DType operand, double temperature, int64_t k,
               const float* b, float* mass) {
  std::memset(mass, 0, scores.sizes[0] * k * sizeof(float));
  for_each_chunk(scores, prototypes, unit, operand, temperature,
                 [&](int64_t view, const Scores& x) { add_mass(x, b + view * k, mass + view * k); });
}

void mass(Tensor scores, Tensor prototypes, bool unit, DType operand, double temperature, Tensor b, Tensor mass) {
  find_mass(scores, prototypes, unit, operand, temperature, mass.sizes[1], b.as<float>(), mass.as<float>());
}

// ---- potentials: small numbers of theirs, in double ----

// b [V, K, to whole vectors] -= the logarithms of sums [V, K], and top / tau if there is a top; 0 where a sum is.
void lower(int64_t views, int64_t k, const float* sums, const float* top, double tau, double* b) {
  const int64_t vectors = ceil_div(k, kLanes);
  parallel_for(views * vectors, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t j = i % vectors * kLanes, at = i / vectors * k + j;
      const int lanes = static_cast<int>(at_most(k - j, kLanes));
      const F sum = load_lanes(sums + at, lanes, 0.f), some = select(sum == 0.f, splat(1.f), sum);
      // 2^64 times as much is no denormal number; NaN stays NaN.
      D by = log_of(some * 0x1p64f) - 64. * 0.6931471805599453 + widen(some - some);
      if (top) {
        const F most = load_lanes(top + at, lanes, 0.f);
        by += widen(select(sum == 0.f, F{}, most)) / tau;
      }
      D old;
      std::memcpy(&old, b + i * kLanes, sizeof old);
      old -= by;
      std::memcpy(b + i * kLanes, &old, sizeof old);
    }
  });
}

// found [V, K] = b, or b minus its mean over K: small numbers have small roundings.
void round_off(int64_t views, int64_t k, const double* b, bool centred, float* found) {
  const int64_t ld = round_up(k, kLanes);
  for (int64_t view = 0; view < views; ++view, b += ld, found += k) {
    D total{}, v;
    for (int64_t j = 0; j < ld && centred; j += kLanes) std::memcpy(&v, b + j, sizeof v), total += v;
    const double mean = sum(total) / static_cast<double>(k);
    for_each_vector(k, [&](int64_t j, int lanes) {
      std::memcpy(&v, b + j, sizeof v);
      store_lanes(found + j, lanes, __builtin_convertvector(v - mean, F));
    });
  }
}

void potentials(Tensor scores, Tensor prototypes, bool unit, DType operand, double temperature, int64_t iterations,
                bool balanced, Tensor b) {
  const int64_t views = b.sizes[0], k = b.sizes[1];
  float* const found = b.as<float>();
  Buffer<float> sums(views * k), top(balanced ? views * k : 0);
  Buffer<double> exact(views * round_up(k, kLanes));
  std::memset(exact, 0, views * round_up(k, kLanes) * sizeof(double));
  if (balanced) {
    find_columns(scores, prototypes, unit, operand, temperature, k, top, sums);
    lower(views, k, sums, top, temperature, exact);
  }
  for (int64_t pass = balanced; pass < iterations && !give_up(); ++pass) {
    round_off(views, k, exact, false, found);
    find_mass(scores, prototypes, unit, operand, temperature, k, found, sums);
    lower(views, k, sums, nullptr, temperature, exact);
  }
  round_off(views, k, exact, true, found);
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{together<columns>, together<mass>, together<potentials>};
}

}  // namespace sslops::sinkhorn
