#include "barlow_twins.h"

#include "../common/parallel.h"
#include "vec.h"

namespace sslops::barlow_twins {
namespace {

double panel(float* s, columns::Panel c, double lambd) {
  constexpr int64_t kMaxRows = 4096;
  double row_loss[kMaxRows];
  const float inv_n = static_cast<float>(1. / static_cast<double>(c.n)), slope = static_cast<float>(2. * lambd) * inv_n;
  parallel_for(c.p, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
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
      row_loss[i] = lambd * sum(squares) + (1. - diagonal) * (1. - diagonal);
    }
  });
  double loss = 0.;
  for (int64_t i = 0; i < c.p; ++i) loss += row_loss[i];
  return loss;
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{panel};
}

}  // namespace sslops::barlow_twins
