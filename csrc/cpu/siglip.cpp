#include "siglip.h"

#include "pairs.h"
#include "softplus.h"

namespace sslops::siglip {
namespace {

void forward(Tensor image, Tensor text, double logit_scale, double bias, bool normalize, DType operand, int64_t first,
             Tensor loss, Tensor dimage, Tensor dtext, Tensor dlogit_scale, Tensor dbias) {
  const Pairs x(image, text, normalize, operand, first);
  const float scale = logit_scale > 0. ? static_cast<float>(logit_scale) : __builtin_nanf(""),
              shift = static_cast<float>(bias);
  Buffer<double> losses(x.b), slopes(x.b), products(x.b);  // sums over a row: of the losses, dL/dx and s dL/dx
  for (int64_t i = 0; i < x.b; ++i) losses[i] = slopes[i] = products[i] = 0.;
  const auto weigh = [&](const Part& t, int64_t j0) {
    float pulls[kMaxSide];  // of the rows whose pair is in the tile, which is left out of the others
    for_each_pair(x, t, j0, [&](int64_t i, float& s) {
      const Softplus pair(splat(-(s * scale + shift)));
      const float pull = pulls[i - t.i0] = pair.slope[0];
      losses[i] += pair.value[0], slopes[i] -= pull;
      if (pull != 0.f) products[i] -= s * pull;
      s = -kInf;
    });
    for (int64_t k = 0; k < t.rows; ++k) {
      float* const s = t.row(k);
      F value{}, slope{}, product{};
      for (int64_t j = 0; j < t.width(); j += kLanes) {
        const F of = load(s + j);
        const Softplus other(of * scale + shift);
        value += other.value, slope += other.slope;
        product += select(other.slope == 0.f, F{}, of * other.slope);
        store(s + j, other.slope);
      }
      losses[t.i0 + k] += sum(value), slopes[t.i0 + k] += sum(slope), products[t.i0 + k] += sum(product);
    }
    for_each_pair(x, t, j0, [&](int64_t i, float& w) { w = -pulls[i - t.i0]; });
  };
  const double n = static_cast<double>(x.n);
  differentiate(x, static_cast<float>(scale / n), weigh, dimage, dtext);
  const auto mean = [&](const Buffer<double>& of) {
    double total = 0.;
    for (int64_t i = 0; i < x.b; ++i) total += of[i];
    return static_cast<float>(total / n);
  };
  *loss.as<float>() = mean(losses), *dbias.as<float>() = mean(slopes), *dlogit_scale.as<float>() = mean(products);
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{together<forward>};
}

}  // namespace sslops::siglip
