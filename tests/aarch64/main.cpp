// The kernels on another architecture, without Python or torch: beside their formulas in double. For cross-compilers
// and qemu: test_vectors.py.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../../csrc/common/huge_pages.h"
#include "../../csrc/cpu/info_nce.h"
#include "../../csrc/cpu/nt_xent.h"
#include "../../csrc/cpu/random.h"

using namespace sslops;

int failures = 0;

void check(const char* what, double error, double bound) {
  std::printf("%-32s error %.1e, bound %.1e\n", what, error, bound);
  if (!(error <= bound)) ++failures;
}

struct Array {
  std::vector<int64_t> sizes, strides;
  std::vector<float> values;

  explicit Array(std::vector<int64_t> of) : sizes(std::move(of)), strides(sizes.size(), 1) {
    int64_t numel = 1;
    for (size_t k = sizes.size(); k-- > 0; numel *= sizes[k]) strides[k] = numel;
    values.assign(static_cast<size_t>(numel), NAN);
  }
  Tensor tensor() {
    Tensor t{};
    t.data = reinterpret_cast<char*>(values.data());
    t.numel = static_cast<int64_t>(values.size()), t.dim = static_cast<int64_t>(sizes.size());
    t.sizes = sizes.data(), t.strides = strides.data();
    t.item_size = 4, t.dtype = DType::f32, t.floating = true;
    return t;
  }
};

Array noise(std::vector<int64_t> sizes) {
  static std::mt19937 generator(0);
  Array x(std::move(sizes));
  for (float& v : x.values) v = std::normal_distribution<float>()(generator);
  return x;
}

// Of floats, relative to the largest number.
double error_of(const std::vector<float>& found, const std::vector<double>& truth) {
  double error = 0., size = 0.;
  for (size_t k = 0; k < truth.size(); ++k) {
    error = std::fmax(error, std::fabs(found[k] - truth[k])), size = std::fmax(size, std::fabs(truth[k]));
    if (std::isnan(found[k])) return NAN;
  }
  return error / size;
}

std::vector<double> unit_rows(const Array& x) {
  const size_t d = static_cast<size_t>(x.sizes[1]);
  std::vector<double> unit(x.values.begin(), x.values.end());
  for (size_t i = 0; i < unit.size(); i += d) {
    double squares = 0.;
    for (size_t j = i; j < i + d; ++j) squares += unit[j] * unit[j];
    for (size_t j = i; j < i + d; ++j) unit[j] /= std::sqrt(squares);
  }
  return unit;
}

double dot(const double* a, const double* b, size_t d) {
  double sum = 0.;
  for (size_t k = 0; k < d; ++k) sum += a[k] * b[k];
  return sum;
}

// dL/dx from dL/dz of rows z = x / |x|.
std::vector<double> through_norm(const Array& x, const std::vector<double>& z, const std::vector<double>& dz) {
  const size_t d = static_cast<size_t>(x.sizes[1]);
  std::vector<double> dx(dz.size());
  for (size_t i = 0; i < dz.size(); i += d) {
    double squares = 0.;
    for (size_t k = i; k < i + d; ++k) squares += static_cast<double>(x.values[k]) * x.values[k];
    const double along = dot(&z[i], &dz[i], d);
    for (size_t k = i; k < i + d; ++k) dx[k] = (dz[k] - along * z[k]) / std::sqrt(squares);
  }
  return dx;
}

void nt_xent_of(int64_t n, int64_t d, double tau) {
  Array x = noise({2 * n, d}), z0({n, d}), z1({n, d}), losses({2 * n}), inv_norm({2 * n}), stats({3, 2 * n});
  Array grad({2 * n}), dz0({n, d}), dz1({n, d}), ahead0({n, d}), ahead1({n, d}), dtemperature({1});
  std::copy_n(x.values.begin(), n * d, z0.values.begin());
  std::copy_n(x.values.begin() + n * d, n * d, z1.values.begin());
  grad.values.assign(grad.values.size(), 1.f);
  const Tensor a = z0.tensor(), b = z1.tensor();
  const nt_xent::Table& table = nt_xent::table();
  table.forward(a, b, {}, {}, tau, true, false, DType::f32, 0, losses.tensor(), {}, inv_norm.tensor(), stats.tensor(),
                1., ahead0.tensor(), ahead1.tensor(), dtemperature.tensor());
  table.backward(grad.tensor(), a, b, {}, tau, true, DType::f32, 0, inv_norm.tensor(), stats.tensor(), dz0.tensor(),
                 dz1.tensor(), dtemperature.tensor());

  const size_t m = static_cast<size_t>(2 * n), width = static_cast<size_t>(d);
  const std::vector<double> z = unit_rows(x);
  std::vector<double> truth(m), dz(z.size());
  for (size_t i = 0; i < m; ++i) {
    const size_t positive = (i + m / 2) % m;
    std::vector<double> p(m);
    double sum = 0.;
    for (size_t j = 0; j < m; ++j) sum += p[j] = j == i ? 0. : std::exp(dot(&z[i * width], &z[j * width], width) / tau);
    truth[i] = std::log(sum / p[positive]);
    for (size_t j = 0; j < m; ++j) {
      const double w = (p[j] / sum - (j == positive ? 1. : 0.)) / tau;
      for (size_t k = 0; k < width; ++k) {
        dz[i * width + k] += w * z[j * width + k];
        dz[j * width + k] += w * z[i * width + k];
      }
    }
  }
  check("nt_xent, losses", error_of(losses.values, truth), 1e-6);
  const std::vector<double> dx = through_norm(x, z, dz);
  const auto of_both = [](std::vector<float> first, const std::vector<float>& second) {
    first.insert(first.end(), second.begin(), second.end());
    return first;
  };
  check("nt_xent, gradient", error_of(of_both(dz0.values, dz1.values), dx), 2e-6);
  check("nt_xent, forward's gradient", error_of(of_both(ahead0.values, ahead1.values), dx), 2e-6);
}

void info_nce_of(int64_t b, int64_t candidates, int64_t d, double tau) {
  Array query = noise({b, d}), key = noise({b, d}), negatives = noise({candidates, d});
  Array losses({b}), logged({2, b}), dquery({b, d}), dtemperature({b}), stats({3, b});
  info_nce::table().forward(query.tensor(), key.tensor(), negatives.tensor(), {}, {}, {}, {}, {}, {}, tau, true,
                            DType::f32, 0, false, losses.tensor(), logged.tensor(), dquery.tensor(),
                            dtemperature.tensor(), stats.tensor());
  const std::vector<double> q = unit_rows(query), positive = unit_rows(key), c = unit_rows(negatives);
  const size_t width = static_cast<size_t>(d);
  std::vector<double> truth, dq(q.size());
  for (size_t i = 0; i < q.size(); i += width) {
    std::vector<double> p{std::exp(dot(&q[i], &positive[i], width) / tau)};
    for (size_t j = 0; j < c.size(); j += width) p.push_back(std::exp(dot(&q[i], &c[j], width) / tau));
    double sum = 0.;
    for (const double each : p) sum += each;
    truth.push_back(std::log(sum / p[0]));
    for (size_t k = 0; k < width; ++k) {
      dq[i + k] = (p[0] / sum - 1.) * positive[i + k] / tau;
      for (size_t j = 0; j < c.size() / width; ++j) dq[i + k] += p[j + 1] / sum * c[j * width + k] / tau;
    }
  }
  check("info_nce, losses", error_of(losses.values, truth), 1e-6);
  check("info_nce, gradient", error_of(dquery.values, through_norm(query, q, dq)), 2e-6);
}

int main() {
  uint32_t words[4 * kBlocks];
  draw_blocks(12345678901234567u, (uint64_t{1} << 32) - 3, RandomStream::random_mask, words);
  int wrong = 0;
  for (uint64_t k = 0; k < 4 * kBlocks; ++k)
    wrong +=
        words[k] != philox(12345678901234567u, (uint64_t{1} << 32) - 3 + k / 4, RandomStream::random_mask).word[k % 4];
  check("philox, wrong words", wrong, 0);

  std::mt19937 generator(1);
  int fused_wrong = 0, halves_wrong = 0;
  for (int k = 0; k < 100000; ++k) {
    const auto draw = [&] {
      return std::ldexp(std::normal_distribution<float>()(generator), static_cast<int>(generator() % 40) - 30);
    };
    const float x = draw(), y = draw(), z = draw();
    fused_wrong += fused(splat(x), splat(y), splat(z))[0] != std::fma(x, y, z);
    uint16_t half[kLanes];
    store_from_float(half, DType::f16, 0, kLanes, splat(x));
    const float back = load_as_float(half, DType::f16, 0, kLanes)[kLanes - 1];
    const double unit = std::ldexp(1., std::max(std::ilogb(x), -14) - 10);  // of float16 at x
    halves_wrong += std::fabs(x) < 65504.f && back != std::nearbyint(x / unit) * unit;
  }
  check("fused, wrong of 100,000", fused_wrong, 0);
  check("float16, wrong of 100,000", halves_wrong, 0);

  for (const int64_t n : {3, 37, 300}) nt_xent_of(n, 33, 0.1);
  nt_xent_of(60, 128, 0.01);
  for (const int64_t b : {5, 70}) info_nce_of(b, 3000, 33, 0.1);
  return failures != 0;
}
