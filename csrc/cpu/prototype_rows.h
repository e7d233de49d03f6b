// Tiles of a row of logits: their exponentials, and what a softmax and a cross entropy add up from them. Exponents are
// (x - top) / temperature, which no large logit makes inexact.
#pragma once
#include "logits.h"

namespace sslops::prototypes {
namespace {

// 1 / temperature as a float, as Scale has it, and what it lacks.
struct Inverse {
  float high, low;

  explicit Inverse(double temperature)
      : high(Scale(temperature, false).inverse), low(static_cast<float>(1. / temperature - high)) {}
};

// Of x, or of x inverse + bias.
template <DType kType>
float top_of(const char* x, int64_t first, int64_t n, float inverse, const float* bias) {
  return largest(n, [&](int64_t j, int lanes) {
    const F v = load_as_float(x, kType, first + j, lanes);
    return bias ? v * inverse + load_lanes(bias + first + j, lanes, 0.f) : v;
  });
}

constexpr float kNothing = -1000.f;  // an exponent behind the end, which adds nothing to either sum

// The tile's sum of e^d, and of q d.
struct Sums {
  float of_e, cross;
};
// e, unless it is null: [n] e^d.
template <DType kType, bool kKeep>
Sums sums_of(const char* x, int64_t item, int64_t first, int64_t n, float inverse, float top, const float* q,
             float* e) {
  F z[4]{}, cross[4]{};
  const char* const next = x + (first + kTile) * item;
  in_chains(n, [&](int64_t j, int k, int lanes) {
    prefetch(next, j, k, item);
    const F d = filled((load_as_float(x, kType, first + j, lanes) - top) * inverse, lanes, kNothing);
    const F v = exp_nonpositive(d);
    if (kKeep) __builtin_prefetch(e + j + kTile, 1), store_lanes(e + j, lanes, v);
    z[k] += v;
    cross[k] += load(q + j) * d;
  });
  return {sum(z), sum(cross)};
}

// A gradient, however it is come by: the same bits from forward and from backward.
SSLOPS_INLINE F gradient_of(F e, float p, F q, float scale) { return e * p - q * scale; }

template <DType kType>
void gradient(const char* x, int64_t first, int64_t n, float inverse, float top, float p, const float* q, float scale,
              char* to) {
  for_each_vector(n, [&](int64_t j, int lanes) {
    const F d = (load_as_float(x, kType, first + j, lanes) - top) * inverse;
    store_from_float(to, kType, first + j, lanes, gradient_of(exp_nonpositive(d), p, load(q + j), scale));
  });
}

// The same from the e that are where it goes.
void gradient_in_place(float* g, int64_t n, float p, const float* q, float scale) {
  const float* const next = g + kTile;
  for_each_vector(n, [&](int64_t j, int lanes) {
    __builtin_prefetch(next + j, 1);
    store_lanes(g + j, lanes, gradient_of(load_lanes(g + j, lanes, 0.f), p, load(q + j), scale));
  });
}

// e [n, to whole vectors] = e^d of a teacher's tile; d (x - top) / temperature, or (x / temperature + b) - top with
// what its rounding lost: targets are as exact as their logits. Returns the sums of e and of e d.
template <DType kType>
Sums exponentials_of(const char* x, int64_t item, int64_t first, int64_t n, const Inverse& inverse, const float* bias,
                     float top, float* e) {
  F z[4]{}, cross[4]{};
  const char* const next = x + (first + kTile) * item;
  const auto exponent = [&](int64_t j, int lanes) {
    const F v = load_as_float(x, kType, first + j, lanes);
    if (!bias) return (v - top) * inverse.high;
    const F b = load_lanes(bias + first + j, lanes, 0.f), y = v * inverse.high + b, product = y - b;
    const F lost = (v * inverse.high - product) - ((y - product) - b) + v * inverse.low;
    return (y - top) + select(lost * 0.f == F{}, lost, F{});  // where y is not finite
  };
  in_chains(n, [&](int64_t j, int k, int lanes) {
    prefetch(next, j, k, item);
    const F d = filled(exponent(j, lanes), lanes, kNothing), v = exp_nonpositive(d);
    store(e + j, v);
    z[k] += v;
    cross[k] += v * max(d, splat(-100.f));  // 0 where v is, not 0 times infinity
  });
  return {sum(z), sum(cross)};
}

// For the dtype of some rows.
struct Kernels {
  float (*top_of)(const char*, int64_t, int64_t, float, const float*);
  Sums (*exponentials_of)(const char*, int64_t, int64_t, int64_t, const Inverse&, const float*, float, float*);
  Sums (*sums_of)(const char*, int64_t, int64_t, int64_t, float, float, const float*, float*);
  Sums (*kept_sums_of)(const char*, int64_t, int64_t, int64_t, float, float, const float*, float*);
  void (*gradient)(const char*, int64_t, int64_t, float, float, float, const float*, float, char*);
};
template <DType kType>
constexpr Kernels kernels_of() {
  return {top_of<kType>, exponentials_of<kType>, sums_of<kType, false>, sums_of<kType, true>, gradient<kType>};
}
Kernels kernels_of(DType dtype) {
  return dtype == DType::f32    ? kernels_of<DType::f32>()
         : dtype == DType::bf16 ? kernels_of<DType::bf16>()
                                : kernels_of<DType::f16>();
}

// A row's softmax and its cross entropy with q, as its tiles pass by.
struct Softmax {
  float top = kLowest;
  double sum = 0., cross = 0., mass = 0.;  // of e^d, of q d, of q

  void add(float tile_top, const Sums& tile, float tile_mass, float inverse) {
    const float raised = max(tile_top, top);
    const double old = (static_cast<double>(top) - raised) * inverse;
    const double rise = (static_cast<double>(tile_top) - raised) * inverse;
    if (mass != 0.) cross += mass * old;  // at first there is no maximum
    sum = sum * exp_nonpositive(static_cast<float>(old)) + tile.of_e * exp_nonpositive(static_cast<float>(rise));
    cross += tile.cross + tile_mass * rise;
    mass += tile_mass;
    top = raised;
  }
};

}  // namespace
}  // namespace sslops::prototypes
