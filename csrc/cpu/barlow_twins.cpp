#include "barlow_twins.h"

#include "rows.h"
#include "vec.h"

namespace sslops::barlow_twins {
namespace {

double panel(float* s, columns::Panel c, double lambd) {
  const double n = static_cast<double>(c.n);
  const float slope = static_cast<float>(2. * lambd / (n * n));
  return sum_rows(c.p, [&](int64_t i) {
    float* row = s + i * c.d;
    const int64_t own = c.first + i;
    const double miss = 1. - static_cast<double>(row[own]) / n;
    row[own] = 0.f;
    F squares{};
    for_each_vector(c.d, [&](int64_t j, int lanes) {
      const F v = load_lanes(row + j, lanes, 0.f);
      squares += v * v;
      store_lanes(row + j, lanes, v * slope);
    });
    row[own] = static_cast<float>(-2. * miss / n);
    return lambd * sum(squares) / (n * n) + miss * miss;
  });
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{panel};
}

}  // namespace sslops::barlow_twins
