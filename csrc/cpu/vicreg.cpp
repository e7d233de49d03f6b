#include "vicreg.h"

#include "rows.h"
#include "vec.h"

namespace sslops::vicreg {
namespace {

double off_diagonal(float* s, columns::Panel c) {
  return sum_rows(c.p, [&](int64_t i) {
    float* row = s + i * c.d;
    row[c.first + i] = 0.f;
    D squares{};
    for_each_vector(c.d, [&](int64_t j, int lanes) {
      const D v = __builtin_convertvector(load_lanes(row + j, lanes, 0.f), D);
      squares += v * v;
    });
    return sum(squares);
  });
}

double squared_distance(const void* x, const void* y, DType dtype, int64_t n, int64_t d) {
  return sum_rows(n, [&](int64_t i) {
    F squares{};
    for_each_vector(d, [&](int64_t j, int lanes) {
      const F v = load_as_float(x, dtype, i * d + j, lanes) - load_as_float(y, dtype, i * d + j, lanes);
      squares += v * v;
    });
    return static_cast<double>(sum(squares));
  });
}

void finish(const float* t, int64_t ld, double weight, const float* a, const float* diagonal, const void* x,
            const float* mean, const float* spread, const void* other, double pull, double grad, columns::Panel c,
            DType dtype, void* dx) {
  const float w = static_cast<float>(weight * grad), k = static_cast<float>(pull * grad), g = static_cast<float>(grad);
  parallel_for(c.n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for_each_vector(c.p, [&](int64_t j, int lanes) {
        const int64_t at = i * c.d + c.first + j;
        const F own = load_as_float(x, dtype, at, lanes);
        F off = load_lanes(t + i * ld + j, lanes, 0.f);
        if (a) off -= load_lanes(a + i * c.p + j, lanes, 0.f) * load_lanes(diagonal + j, lanes, 0.f);
        F v = off * w + (own - load_lanes(mean + j, lanes, 0.f)) * (load_lanes(spread + j, lanes, 0.f) * g);
        if (other) v += (own - load_as_float(other, dtype, at, lanes)) * k;
        store_from_float(dx, dtype, at, lanes, v);
      });
  });
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{off_diagonal, squared_distance, finish};
}

}  // namespace sslops::vicreg
