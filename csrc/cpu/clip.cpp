#include "clip.h"

#include "pairs.h"

namespace sslops::clip {
namespace {

Scale scale_of(double logit_scale, bool normalize) { return {1. / logit_scale, normalize}; }

// rows [3, B] and columns [2, N], as sums() has them
void add_up(const Pairs& x, const Scale& scale, float* rows, float* columns) {
  Buffer<float> top(x.sums()), r(x.sums());
  for (int64_t i = 0; i < x.sums(); ++i) top[i] = scale.fixed ? 1.f : kLowest, r[i] = 0.f;
  for_each_tile(x, [&](const Tile&, const Part& t, int64_t j0) {
    for_each_pair(x, t, j0, [&](int64_t i, float& s) { rows[2 * x.b + i] = s, s = -kInf; });
    add(t, scale, top, r);
  });
  for (int64_t i = 0; i < x.b; ++i) rows[i] = top[i], rows[x.b + i] = r[i];
  for (int64_t j = 0; j < x.n; ++j) columns[j] = top[x.padded + j], columns[x.n + j] = r[x.padded + j];
}

void sums(Tensor image, Tensor text, double logit_scale, bool normalize, DType operand, int64_t first, Tensor rows,
          Tensor columns) {
  const Pairs x(image, text, normalize, operand, first);
  add_up(x, scale_of(logit_scale, normalize), rows.as<float>(), columns.as<float>());
}

// losses [N] and stats [5, N] from rows [3, N] and columns [parts, 2, N]
void finish(const float* rows, const float* columns, int64_t n, int64_t parts, const Scale& scale, float* losses,
            float* stats) {
  parallel_for(n, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float top = kLowest, r = 0.f;
      for (int64_t part = 0; part < parts; ++part) top = max(columns[2 * part * n + i], top);
      for (int64_t part = 0; part < parts; ++part) {
        const float* const of = columns + 2 * part * n + i;
        r += of[n] * (scale.fixed ? 1.f : expf((of[0] - top) * scale.inverse));
      }
      const float s = rows[2 * n + i];
      const Close row(s, rows[n + i], rows[i], scale), column(s, r, top, scale);
      losses[i] = 0.5f * (row.loss + column.loss);
      const float kept[] = {row.top, row.inverse, column.top, column.inverse, row.share + column.share};
      for (int64_t k = 0; k < 5; ++k) stats[k * n + i] = kept[k];
    }
  });
}

void close(Tensor rows, Tensor columns, double logit_scale, bool normalize, Tensor losses, Tensor stats) {
  finish(rows.as<float>(), columns.as<float>(), losses.numel, columns.sizes[0], scale_of(logit_scale, normalize),
         losses.as<float>(), stats.as<float>());
}

// dimage and dtext, or one of them, from the gradients [N] (null: all `factor`) and stats [5, N]; returns
// logit_scale's.
float gradients(const Pairs& x, const Scale& scale, const float* grad, float factor, const float* stats,
                const Tensor& dimage, const Tensor& dtext) {
  const auto g = [&](int64_t i) { return grad ? grad[i] : factor; };
  Buffer<float> top(x.sums()), weights(x.sums());
  for (int64_t k = 0; k < x.sums(); ++k) top[k] = weights[k] = 0.f;
  for (int64_t i = 0; i < x.b; ++i) {
    const int64_t pair = x.first + i;
    top[i] = stats[pair], weights[i] = g(pair) * stats[x.n + pair];
  }
  for (int64_t j = 0; j < x.n; ++j)
    top[x.padded + j] = stats[2 * x.n + j], weights[x.padded + j] = g(j) * stats[3 * x.n + j];
  const auto weigh_tile = [&](const Part& t, int64_t j0) {
    weigh(t, scale, top, weights);
    for_each_pair(x, t, j0, [&](int64_t i, float& w) { w = -g(x.first + i) * stats[4 * x.n + x.first + i]; });
  };
  const double scaled = 1. / scale.tau;
  return static_cast<float>(differentiate(x, static_cast<float>(0.5 * scaled), weigh_tile, dimage, dtext) / scaled);
}

void with_gradients(Tensor image, Tensor text, double logit_scale, bool normalize, DType operand, double factor,
                    Tensor losses, Tensor dimage, Tensor dtext, Tensor dlogit_scale) {
  const Scale scale = scale_of(logit_scale, normalize);
  const int64_t n = losses.numel;
  const bool hold = n * n * static_cast<int64_t>(sizeof(float)) <= kMaxHeld;
  Buffer<float> s(hold ? n * n : 0), rows(3 * n), columns(2 * n), stats(5 * n);
  Pairs x(image, text, normalize, operand, 0, hold ? static_cast<float*>(s) : nullptr);
  add_up(x, scale, rows, columns);
  finish(rows, columns, n, 1, scale, losses.as<float>(), stats);
  x.known = hold;
  *dlogit_scale.as<float>() = gradients(x, scale, nullptr, static_cast<float>(factor), stats, dimage, dtext);
}

void backward(Tensor grad, Tensor image, Tensor text, double logit_scale, bool normalize, DType operand, int64_t first,
              Tensor stats, Tensor dimage, Tensor dtext, Tensor dlogit_scale) {
  const Pairs x(image, text, normalize, operand, first);
  *dlogit_scale.as<float>() =
      gradients(x, scale_of(logit_scale, normalize), grad.as<float>(), 0.f, stats.as<float>(), dimage, dtext);
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{together<with_gradients>, together<sums>, close, together<backward>};
}

}  // namespace sslops::clip
