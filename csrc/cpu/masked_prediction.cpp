#include "masked_prediction.h"

#include "parts.h"
#include "patches.h"

namespace sslops::masked_prediction {
namespace {

// Sum of term(j, lanes), in four parts that need not wait for each other.
template <typename Term>
SSLOPS_INLINE float sum_of(int64_t n, Term&& term) {
  F part[4]{};
  in_chains(n, [&](int64_t j, int k, int lanes) { part[k] += term(j, lanes); });
  return sum(part);
}

Normal normal_of(const float* x, int64_t n, Norm norm, float eps) {
  const float mean = sum_of(n, [&](int64_t j, int lanes) { return load_lanes(x + j, lanes, 0.f); }) / n;
  const float share = 1.f / n;
  F differences[4]{}, squares[4]{};
  in_chains(n, [&](int64_t j, int k, int lanes) {
    const F d = load_lanes(x + j, lanes, mean) - mean;
    differences[k] += d;
    squares[k] += d * (d * share);
  });
  return normal(norm, n, mean, sum(differences), sum(squares), eps);
}

void normalize(float* x, int64_t n, const Normal& normal) {
  for_each_vector(
      n, [&](int64_t j, int lanes) { store_lanes(x + j, lanes, apply(normal, load_lanes(x + j, lanes, 0.f))); });
}

// Of differences d, what their error is, and its slope.
template <Loss kLoss>
SSLOPS_INLINE F error_of(F d, float beta) {
  if constexpr (kLoss == Loss::squared) return d * d;
  const F size = select(d < 0.f, -d, d);
  return kLoss == Loss::l1 ? size : select(size < beta, d * d * (0.5f / beta), size - 0.5f * beta);
}
template <Loss kLoss>
SSLOPS_INLINE F slope_of(F d, float beta) {
  if constexpr (kLoss == Loss::squared) return d + d;
  const F sign = select(d > 0.f, splat(1.f), select(d < 0.f, splat(-1.f), F{}));
  return kLoss == Loss::l1 ? sign : select(d > beta, sign, select(d < -beta, sign, d * (1.f / beta)));
}

// Where the values of a patch lie: of the prediction, of the one that comes next, of its gradient.
struct Values {
  int64_t from, next, to;
};

// The error of pred against x, normalised by `norm`, and, unless d_pred is null, its gradient times `weight`. All by
// value: what is written to d_pred could be anything that is referred to, and would be loaded again for each vector.
template <Loss kLoss, DType kDType>
float compare(const void* pred, Values at, const float* x, Normal norm, int64_t size, float beta, float weight,
              void* d_pred) {
  return sum_of(size, [&](int64_t j, int lanes) {
    prefetch(pred, kDType, at.next + j);
    F d = load_as_float(pred, kDType, at.from + j, lanes) - apply(norm, load_lanes(x + j, lanes, 0.f));
    if (d_pred) store_from_float(d_pred, kDType, at.to + j, lanes, slope_of<kLoss>(d, beta) * weight);
    if (lanes < kLanes) d = load(reinterpret_cast<const float*>(&d), lanes, 0.f);  // the others must not count
    return error_of<kLoss>(d, beta);
  });
}

template <DType kDType>
float compare_directions(const void* pred, Values at, const float* x, Normal, int64_t size, float, float weight,
                         void* d_pred) {
  const auto of_pred = [&](int64_t j, int lanes) { return load_as_float(pred, kDType, at.from + j, lanes); };
  const auto of_x = [&](int64_t j, int lanes) { return load_lanes(x + j, lanes, 0.f); };
  const float product = sum_of(size, [&](int64_t j, int lanes) {
    prefetch(pred, kDType, at.next + j);
    return of_pred(j, lanes) * of_x(j, lanes);
  });
  const float squares = sum_of(size, [&](int64_t j, int lanes) {
    const F v = of_pred(j, lanes);
    return v * v;
  });
  const PatchError c = cosine(product, squares, sum_of(size, [&](int64_t j, int lanes) {
                                const F v = of_x(j, lanes);
                                return v * v;
                              }));
  if (d_pred)
    for_each_vector(size, [&](int64_t j, int lanes) {
      const F d = of_pred(j, lanes) * c.of_p - of_x(j, lanes) * c.of_x;
      store_from_float(d_pred, kDType, at.to + j, lanes, d * weight);
    });
  return c.error;
}

template <DType kDType>
auto comparison(Loss loss) {
  return loss == Loss::squared     ? compare<Loss::squared, kDType>
         : loss == Loss::l1        ? compare<Loss::l1, kDType>
         : loss == Loss::smooth_l1 ? compare<Loss::smooth_l1, kDType>
                                   : compare_directions<kDType>;
}

Sums loss(Prediction pred, Target t, Error error, const float* factors, const float* mask, const float* grad, bool each,
          float* errors, void* d_pred) {
  const Patches& p = t.patches;
  const int64_t size = patch_size(p), area = patch_area(p), count = patch_count(p), patches = p.images * count;
  const int64_t row = size * (pred.dtype == DType::f32 ? 4 : 2);
  const auto compared = pred.dtype == DType::f32    ? comparison<DType::f32>(error.loss)
                        : pred.dtype == DType::bf16 ? comparison<DType::bf16>(error.loss)
                                                    : comparison<DType::f16>(error.loss);
  Sums sums{};
  for (int64_t i = 0; i < patches; ++i) sums.weight += mask[i];
  const float own = terms(error, p);
  const double over = each ? 1. : sums.weight == 0. ? 0. : 1. / sums.weight;
  constexpr int64_t kBlock = 64;
  const auto make = [&] { return Buffer<float>(2 * size); };
  parallel_parts(ceil_div(patches, kBlock), make, [&](int64_t block, float* planes) {
    const int64_t begin = block * kBlock, end = at_most(begin + kBlock, patches);
    const auto of_pred = [&](int64_t i) { return i / count * pred.image_stride + i % count * pred.patch_stride; };
    const auto of_image = [&](int64_t i) { return corner(p, i / count, i % count); };
    for (int64_t i = begin; i < end; ++i) {
      if (mask[i] == 0.f) {
        errors[i] = 0.f;
        if (d_pred) std::memset(static_cast<char*>(d_pred) + i * row, 0, row);
        continue;
      }
      int64_t next = i + 1;
      while (next < end && mask[next] == 0.f) ++next;
      if (next == end) next = i;
      load_planes(t.images, t.dtype, p, of_image(i), of_image(next), planes);
      if (factors) scale_planes(planes, p, factors);
      Normal norm{0.f, 0.f, 1.f};
      if (t.norm == Norm::channel)
        for (int64_t c = 0; c < p.channels; ++c)
          normalize(planes + c * area, area, normal_of(planes + c * area, area, t.norm, t.eps));
      else if (t.norm != Norm::none)
        norm = normal_of(planes, size, t.norm, t.eps);
      if (error.loss == Loss::cosine) normalize(planes, size, norm);
      const float* const x = arrange(planes, p, t.layout, planes + size);
      const double weight = over / own * mask[i] * (d_pred ? grad[each ? i : 0] : 0.f);
      const float found = compared(pred.data, {of_pred(i), of_pred(next), i * size}, x, norm, size, error.beta,
                                   static_cast<float>(weight), d_pred);
      errors[i] = mask[i] * (found / own);
    }
  });
  for (int64_t i = 0; i < patches; ++i) sums.error += errors[i];
  return sums;
}

void call_forward(Tensor pred, Tensor images, Tensor mask, int64_t frames, int64_t height, int64_t width, bool hwc,
                  Tensor factors, int64_t norm, double eps, int64_t kind, double beta, Tensor errors, Tensor result,
                  Tensor inverse, Tensor d_pred) {
  const float one = 1.f;
  const Sums sums = loss(prediction(pred), target(images, frames, height, width, hwc, norm, eps), error(kind, beta),
                         factors.as<float>(), mask.as<float>(), &one, false, errors.as<float>(), d_pred.data);
  const double over = sums.weight == 0. ? 0. : 1. / sums.weight;
  if (result) *result.as<float>() = static_cast<float>(sums.error * over);
  *inverse.as<float>() = static_cast<float>(over);
}

void call_backward(Tensor pred, Tensor images, Tensor mask, int64_t frames, int64_t height, int64_t width, bool hwc,
                   Tensor factors, int64_t norm, double eps, int64_t kind, double beta, Tensor grad, Tensor,
                   Tensor d_pred) {
  Buffer<float> errors(mask.numel);
  loss(prediction(pred), target(images, frames, height, width, hwc, norm, eps), error(kind, beta), factors.as<float>(),
       mask.as<float>(), grad.as<float>(), grad.dim > 0, errors, d_pred.data);
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{loss, call_forward, call_backward};
}

}  // namespace sslops::masked_prediction
