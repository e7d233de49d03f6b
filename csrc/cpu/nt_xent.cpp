#include "nt_xent.h"

#include "views.h"

namespace sslops::nt_xent {
namespace {

// similarity [views - 1, padded], of each row with its positives: the very numbers that the tiles of S hold there.
// Where all pairs are alike they cancel.
void positives(const Views& x, float* similarity) {
  constexpr int64_t kBlock = 32;
  const int64_t blocks = (x.m - x.n + kBlock - 1) / kBlock;
  parallel_tickets(
      blocks * (x.views - 1), [&] { return Tile(kBlock, x.z.bf16); },
      [&](int64_t ticket, Tile& tile) {
        const int64_t k = ticket / blocks + 1, first = ticket % blocks * kBlock, end = x.m - k * x.n;
        const int64_t count = end - first < kBlock ? end - first : kBlock;
        if (count <= 0) return;
        tile.multiply(x.z, k * x.n + first, count, x.z, first, count);
        float *const to = similarity + (k - 1) * x.padded, *const back = similarity + (x.views - k - 1) * x.padded;
        for (int64_t j = 0; j < count; ++j) to[first + j] = back[k * x.n + first + j] = tile.s[j * tile.ld + j];
      });
}

// No view of the row's own example is a negative, and none of its class.
void leave_out(const Views& x, const Part& t) {
  for (int64_t k = 0, example = t.i0 % x.n; k < t.rows; ++k, example = example + 1 < x.n ? example + 1 : 0) {
    float* const s = t.row(k);
    if (x.classes) {
      for (int64_t j = 0; j < t.width(); j += kLanes) {
        I others;
        std::memcpy(&others, x.row_classes + t.j0 + j, sizeof others);
        store(s + j, select(others == x.classes[example], splat(-kInf), load(s + j)));
      }
    } else {
      for (int64_t j = example - t.j0; j < t.columns; j += x.n)
        if (j >= 0) s[j] = -kInf;
    }
  }
}

// dz0 and dz1 of the examples from `first` on, from the gradients [M] (null: all `factor`) and the stats [V + 1, M] of
// all; returns what they add to the temperature's. held: the tiles, if forward has them.
float gradients(const Views& x, int64_t first, int64_t count, const float* grad, float factor, const float* stats,
                float* held, const Tensor& dz0, const Tensor& dz1) {
  const auto g = [&](int64_t i) { return grad ? grad[i] : factor; };
  const float* const shares = stats + 2 * x.m;
  Buffer<float> top(x.padded), weights(x.padded);
  for (int64_t i = 0; i < x.padded; ++i) {
    top[i] = i < x.m ? stats[i] : 0.f;
    weights[i] = i < x.m ? g(i) * stats[x.m + i] : 0.f;
  }
  const auto pull = [&](int64_t i, float* v) {
    for (int64_t k = 1; k < x.views; ++k) {
      const int64_t other = x.positive(i, k);
      const float pull = g(i) * shares[(k - 1) * x.m + i] + g(other) * shares[(x.views - k - 1) * x.m + other];
      for_each_vector(x.d, [&](int64_t j, int lanes) {
        store_lanes(v + j, lanes, load_lanes(v + j, lanes, 0.f) - pull * x.at(other, j, lanes));
      });
    }
  };
  return differentiate(
      x, first, count, held, [&](const Part& t) { leave_out(x, t); },
      [&](const Part& t) { weigh(t, x.scale, top, weights); }, pull, dz0, dz1);
}

void forward(Tensor z0, Tensor z1, Tensor classes, Tensor positive_weights, double temperature, bool normalize,
             bool decoupled, DType operand, int64_t first, Tensor losses, Tensor logged, Tensor inv_norm, Tensor stats,
             double factor, Tensor dz0, Tensor dz1, Tensor dtemperature) {
  const Views x(z0, z1, classes, temperature, normalize, operand, inv_norm);
  const int64_t rows = losses.numel, count = rows / x.views, padded = x.padded, pairs = x.views - 1;
  Buffer<float> top(padded), sums(padded), similarity(pairs * padded), exceeding(logged.numel ? pairs * padded : 0);
  for (int64_t i = 0; i < padded; ++i) top[i] = kLowest, sums[i] = 0.f;
  for (int64_t i = 0; i < pairs * padded; ++i) similarity[i] = 0.f;
  for (int64_t i = 0; i < pairs * padded && logged.numel; ++i) exceeding[i] = 0.f;
  const HeldTiles all(x.m);
  const bool hold = dtemperature && all.are_few();
  Buffer<float> tiles(hold ? all.count() * all.size : 0);
  float* const held = hold ? static_cast<float*>(tiles) : nullptr;
  positives(x, similarity);
  const auto prepare = [&](const Part& t) { leave_out(x, t); };
  for_each_tile(x, first, count, held, false, prepare, [&](const Tile&, const Part& t) {
    add(t, x.scale, top, sums);
    for (int64_t k = 0; k < pairs && logged.numel; ++k)
      count_exceeding(t, similarity + k * padded, exceeding + k * padded);
  });
  const float part = 1.f / static_cast<float>(pairs);
  parallel_for(rows, kGroup, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t i = x.row(k, first, count);
      float* const kept = stats.as<float>() + k;
      // Of the maxima over one positive the lowest: no sum over the negatives vanishes under it, and what a higher
      // positive adds to its sum is beyond all of them.
      float loss = 0.f, inverse = 0.f, lowest = similarity[i];
      for (int64_t p = 1; p < pairs; ++p)
        lowest = similarity[p * padded + i] < lowest ? similarity[p * padded + i] : lowest;
      const float base = x.scale.fixed ? 1.f : decoupled ? top[i] : max(lowest, top[i]);
      const float weight = positive_weights ? positive_weights.as<float>()[i] : 1.f;
      for (int64_t p = 0; p < pairs; ++p) {
        const float s = similarity[p * padded + i];
        const Close close =
            decoupled ? Close::decoupled(s, sums[i], top[i], weight, x.scale) : Close(s, sums[i], top[i], x.scale);
        loss += close.loss * part;
        inverse += close.inverse * expf((base - close.top) * x.scale.inverse) * part;
        kept[(2 + p) * rows] = close.share * part;
        if (!logged.numel) continue;
        logged.as<float>()[p * rows + k] = s;
        logged.as<float>()[(pairs + p) * rows + k] = exceeding[p * padded + i];
      }
      losses.as<float>()[k] = loss;
      kept[0] = base;
      kept[rows] = inverse;
    }
  });
  if (dtemperature)
    *dtemperature.as<float>() =
        gradients(x, 0, x.n, nullptr, static_cast<float>(factor), stats.as<float>(), held, dz0, dz1);
}

void backward(Tensor grad, Tensor z0, Tensor z1, Tensor classes, double temperature, bool normalize, DType operand,
              int64_t first, Tensor inv_norm, Tensor stats, Tensor dz0, Tensor dz1, Tensor dtemperature) {
  const Views x(z0, z1, classes, temperature, normalize, operand, inv_norm);
  const int64_t count = dz0.sizes[dz0.dim - 2];
  *dtemperature.as<float>() = gradients(x, first, count, grad.as<float>(), 0.f, stats.as<float>(), nullptr, dz0, dz1);
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{together<forward>, together<backward>};
}

}  // namespace sslops::nt_xent
