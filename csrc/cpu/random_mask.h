// Random masks by a stable sort of each row's noise.
#pragma once
#include "../common/isa.h"
#include "../common/random_mask.h"

namespace sslops::random_mask {

struct Table {
  void (*draw)(const Noise& noise, int64_t batch, const Mask& out);

  // The same from Python: noise [B, L] or a key [], lengths and counts [B] or None.
  void (*call)(Tensor noise, int64_t num_prefix, Tensor lengths, Tensor counts, int64_t blocks, int64_t size,
               int64_t width, bool first, Tensor ids_keep, Tensor ids_mask, Tensor mask, Tensor ids_restore);

  static constexpr auto bound() { return std::tuple{Bound{"random_mask", &Table::call}}; }
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::random_mask
