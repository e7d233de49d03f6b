#include "supcon.h"

#include "supcon_tiles.h"

namespace sslops::supcon {
namespace {

// to [padded]: those of the n examples, view by view, and then -1.
void spread(const int32_t* of, int64_t n, int64_t m, int64_t padded, int32_t* to) {
  for (int64_t i = 0; i < padded; ++i) to[i] = i < m ? of[i % n] : -1;
}

// dz of the examples from `first` on, from the gradients [M] (null: all `factor`) and the stats [4, M] of all; returns
// what they add to the temperature's. held: the tiles, if forward has them.
float gradients(const Views& x, const Groups& groups, bool inside, int64_t first, int64_t count, const float* grad,
                float factor, const float* stats, float* held, const Tensor& dz) {
  Buffer<float> top(x.padded), weights(x.padded), top_p(x.padded), wanted(x.padded);
  for (int64_t i = 0; i < x.padded; ++i) {
    const float* const kept = stats + i;
    const float g = i >= x.m ? 0.f : grad ? grad[i] : factor;
    top[i] = i < x.m ? kept[0] : 0.f;
    weights[i] = i < x.m ? g * kept[x.m] : 0.f;
    top_p[i] = i < x.m ? kept[2 * x.m] : 0.f;
    wanted[i] = i < x.m ? g * kept[3 * x.m] : 0.f;
  }
  const Weights of{top, weights, top_p, wanted};
  return differentiate(
      x, first, count, held, [&](const Part& t) { leave_out(groups, t); },
      [&](const Part& t) { weigh(groups, x.scale, inside, t, of); }, [](int64_t, float*) {}, dz, {});
}

void forward(Tensor z, Tensor classes, Tensor ids, Tensor weights, double temperature, bool normalize, bool inside,
             DType operand, int64_t first, Tensor losses, Tensor positives, Tensor inv_norm, Tensor stats,
             double factor, Tensor dz, Tensor dtemperature) {
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
  const HeldTiles all(x.m);
  const bool hold = dtemperature && all.are_few();
  Buffer<float> tiles(hold ? all.count() * all.size : 0);
  float* const held = hold ? static_cast<float*>(tiles) : nullptr;
  for_each_tile(
      x, first, count, held, false, [&](const Part& t) { leave_out(groups, t); },
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
  if (dtemperature)
    *dtemperature.as<float>() =
        gradients(x, groups, inside, 0, x.n, nullptr, static_cast<float>(factor), stats.as<float>(), held, dz);
}

void backward(Tensor grad, Tensor z, Tensor classes, Tensor ids, double temperature, bool normalize, bool inside,
              DType operand, int64_t first, Tensor inv_norm, Tensor stats, Tensor dz, Tensor dtemperature) {
  const Views x(z, {}, classes, temperature, normalize, operand, inv_norm);
  Buffer<int32_t> row_ids(ids ? x.padded : 0);
  if (ids) spread(ids.as<int32_t>(), x.n, x.m, x.padded, row_ids);
  const Groups groups{x.row_classes, ids ? static_cast<const int32_t*>(row_ids) : nullptr};
  const int64_t count = dz.sizes[dz.dim - 2];
  *dtemperature.as<float>() =
      gradients(x, groups, inside, first, count, grad.as<float>(), 0.f, stats.as<float>(), nullptr, dz);
}

// What rows are compared with instead of each other, a chunk at a time, in parts that are joined in order. Fixed by the
// shapes: results do not depend on the threads.
struct Keys {
  int64_t count, chunk, length, parts, padded;  // length: of a part, in keys; padded: count to whole groups
  Buffer<float> inv_norm;
  Rows rows;

  Keys(const Tensor& keys, bool normalize, int64_t blocks)
      : count(keys.sizes[0]),
        chunk(chunk_rows(count)),
        padded(round_up(count, kGroup)),
        inv_norm(count),
        rows(keys, normalize, inv_norm) {
    length = chunks_of_part(count, blocks) * chunk;
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
extern const Table table{together<forward>, together<backward>, together<among_keys>};
}

}  // namespace sslops::supcon
