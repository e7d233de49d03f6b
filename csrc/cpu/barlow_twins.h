// Barlow Twins' loss over a panel of rows of the cross-correlation C = A^T B / N (arXiv 2103.03230, Eq. 1).
#pragma once
#include <cstdint>

#include "columns.h"

namespace sslops::barlow_twins {

struct Table {
  // s [P, D] = N C, the rows from panel.first, becomes dL/dC / N; returns these rows' share of the loss.
  double (*panel)(float* s, columns::Panel panel, double lambd);
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::barlow_twins
