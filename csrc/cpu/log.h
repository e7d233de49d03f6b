// The natural logarithm of float32 numbers, in double: of sums that an exponential will follow, or a root.
#pragma once
#include "vec.h"

namespace sslops {
namespace {

// Of x >= 2^-126, to 5e-11: with x = m 2^e and s = (m - 1) / (m + 1), ln m is 2 atanh s.
SSLOPS_INLINE D log_of(F x) {
  const U bits = (U)x + (0x3f800000u - 0x3f3504f3u);  // m in [sqrt 1/2, sqrt 2)
  const D e = widen(__builtin_convertvector((I)(bits >> 23) - 127, F));
  const D m = widen((F)((bits & 0x7fffffu) + 0x3f3504f3u)), s = (m - 1.) / (m + 1.), square = s * s;
  D p = square * (1. / 11.) + 1. / 9.;
  p = p * square + 1. / 7.;
  p = p * square + 1. / 5.;
  p = p * square + 1. / 3.;
  return e * 0.6931471805599453 + (s * square * p + s) * 2.;
}

}  // namespace
}  // namespace sslops
