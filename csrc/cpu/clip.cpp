#include "clip.h"

#include "pairs.h"

namespace sslops::clip {
namespace {

Scale scale_of(double logit_scale, bool normalize) { return {1. / logit_scale, normalize}; }

void sums(Tensor image, Tensor text, double logit_scale, bool normalize, DType operand, int64_t first,
          Tensor similarity, Tensor rows, Tensor columns) {
  const Pairs x(image, text, normalize, operand, first, similarity);
  const Scale scale = scale_of(logit_scale, normalize);
  Buffer<float> top(x.sums()), r(x.sums());
  for (int64_t i = 0; i < x.sums(); ++i) top[i] = scale.fixed ? 1.f : kLowest, r[i] = 0.f;
  float *const of_rows = rows.as<float>(), *const of_columns = columns.as<float>();
  for_each_tile(x, [&](const Tile&, const Part& t, int64_t j0) {
    for_each_pair(x, t, j0, [&](int64_t i, float& s) { of_rows[2 * x.b + i] = s, s = -kInf; });
    add(t, scale, top, r);
  });
  for (int64_t i = 0; i < x.b; ++i) of_rows[i] = top[i], of_rows[x.b + i] = r[i];
  for (int64_t j = 0; j < x.n; ++j) of_columns[j] = top[x.padded + j], of_columns[x.n + j] = r[x.padded + j];
}

void close(Tensor rows, Tensor columns, double logit_scale, bool normalize, Tensor losses, Tensor stats) {
  const Scale scale = scale_of(logit_scale, normalize);
  const int64_t n = losses.numel, parts = columns.sizes[0];
  const float *const of_rows = rows.as<float>(), *const of_columns = columns.as<float>();
  parallel_for(n, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float top = kLowest, r = 0.f;
      for (int64_t part = 0; part < parts; ++part) top = max(of_columns[2 * part * n + i], top);
      for (int64_t part = 0; part < parts; ++part) {
        const float* const of = of_columns + 2 * part * n + i;
        r += of[n] * (scale.fixed ? 1.f : expf((of[0] - top) * scale.inverse));
      }
      const float s = of_rows[2 * n + i];
      const Close row(s, of_rows[n + i], of_rows[i], scale), column(s, r, top, scale);
      losses.as<float>()[i] = 0.5f * (row.loss + column.loss);
      const float kept[] = {row.top, row.inverse, column.top, column.inverse, row.share + column.share};
      for (int64_t k = 0; k < 5; ++k) stats.as<float>()[k * n + i] = kept[k];
    }
  });
}

void backward(Tensor grad, Tensor image, Tensor text, double logit_scale, bool normalize, DType operand, int64_t first,
              Tensor similarity, Tensor stats, Tensor dimage, Tensor dtext, Tensor dlogit_scale) {
  const Pairs x(image, text, normalize, operand, first, similarity, similarity.data != nullptr);
  const Scale scale = scale_of(logit_scale, normalize);
  const float *const g = grad.as<float>(), *const kept = stats.as<float>();
  Buffer<float> top(x.sums()), weights(x.sums());
  for (int64_t k = 0; k < x.sums(); ++k) top[k] = weights[k] = 0.f;
  for (int64_t i = 0; i < x.b; ++i) {
    const int64_t pair = x.first + i;
    top[i] = kept[pair], weights[i] = g[pair] * kept[x.n + pair];
  }
  for (int64_t j = 0; j < x.n; ++j)
    top[x.padded + j] = kept[2 * x.n + j], weights[x.padded + j] = g[j] * kept[3 * x.n + j];
  const auto weigh_tile = [&](const Part& t, int64_t j0) {
    weigh(t, scale, top, weights);
    for_each_pair(x, t, j0, [&](int64_t i, float& w) { w = -g[x.first + i] * kept[4 * x.n + x.first + i]; });
  };
  const double scaled = 1. / scale.tau,
               product = differentiate(x, static_cast<float>(0.5 * scaled), weigh_tile, dimage, dtext);
  *dlogit_scale.as<float>() = static_cast<float>(product / scaled);
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{together<sums>, close, together<backward>};
}

}  // namespace sslops::clip
