// I-JEPA's masks, a row at a time.
#pragma once
#include "../common/isa.h"
#include "../common/multi_block_mask.h"

namespace sslops::multi_block_mask {

struct Table {
  void (*draw)(const Grid& grid, const uint64_t* key, const Masks& out);

  // The same from Python: key [], ranges [3, 2].
  void (*call)(Tensor key, int64_t height, int64_t width, int64_t targets, int64_t min_keep, Tensor ranges,
               Tensor ids_context, Tensor context_counts, Tensor ids_targets, Tensor target_counts);

  static constexpr auto bound() { return std::tuple{Bound{"multi_block_mask", &Table::call}}; }
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::multi_block_mask
