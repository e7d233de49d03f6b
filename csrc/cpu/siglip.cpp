#include "siglip.h"

#include "pairs.h"

namespace sslops::siglip {
namespace {

// log(1 + u) for u in [0, 1], relative error below 1e-7: 2 artanh(u / (2 + u)) by a polynomial in its square.
SSLOPS_INLINE F log1p_of_unit(F u) {
  const F t = u / (u + 2.f), z = t * t;
  F p = splat(0.281577796f);
  p = p * z + 0.279651582f;
  p = p * z + 0.400245965f;
  p = p * z + 0.666663229f;
  p = p * z + 2.f;
  return t * p;
}

// log(1 + e^y) and its derivative
struct Softplus {
  F value, slope;

  SSLOPS_INLINE explicit Softplus(F y) {
    const I positive = y > 0.f;
    const F u = exp_nonpositive(select(positive, -y, y)), share = 1.f / (u + 1.f);
    value = select(positive, y, F{}) + log1p_of_unit(u);
    slope = select(positive, share, u * share);
  }
};

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
extern const Table table{forward};
}

}  // namespace sslops::siglip
