#include "barlow_twins.h"

#include "rows.h"
#include "vec.h"

namespace sslops::barlow_twins {
namespace {

double panel(float* s, columns::Panel c, double lambd) {
  const float inv_n = static_cast<float>(1. / static_cast<double>(c.n)), slope = static_cast<float>(2. * lambd) * inv_n;
  return sum_rows(c.p, [&](int64_t i) {
    float* row = s + i * c.d;
    const int64_t own = c.first + i;
    const float diagonal = row[own] * inv_n;
    row[own] = 0.f;
    F squares{};
    for_each_vector(c.d, [&](int64_t j, int lanes) {
      const F v = load_lanes(row + j, lanes, 0.f) * inv_n;
      squares += v * v;
      store_lanes(row + j, lanes, v * slope);
    });
    row[own] = -2.f * (1.f - diagonal) * inv_n;
    return lambd * sum(squares) + (1. - diagonal) * (1. - diagonal);
  });
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{panel};
}

}  // namespace sslops::barlow_twins
