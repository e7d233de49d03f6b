// Sequences put back together, and what the mask token and the positions get of their gradient.
#pragma once
#include "../common/isa.h"
#include "../common/restore_tokens.h"

namespace sslops::restore_tokens {

struct Table {
  // out[b, t] = token + positions[t], in float32 rounded once. positions.data may be null. The ids have been checked.
  void (*forward)(Array visible, Array mask_token, Array positions, const int64_t* ids, Shape shape, Array out);
  // token [D]: the sum of grad [B, P + L, D] over the rows that are mask tokens; positions [P + L, D], which may be
  // null: the sums over B. Both in float32, added up in double. parts: [P + L, D] scratch.
  void (*reduce)(Array grad, const int64_t* ids, Shape shape, double* parts, float* token, float* positions);

  // The same from Python: ids [B, L], counts [B] or None, kept = K.
  void (*call_forward)(Tensor visible, Tensor mask_token, Tensor positions, Tensor ids, Tensor counts, int64_t kept,
                       Tensor out);
  void (*call_reduce)(Tensor grad, Tensor ids, Tensor counts, int64_t kept, Tensor parts, Tensor positions,
                      Tensor token);

  static constexpr auto bound() {
    return std::tuple{Bound{"restore_tokens", &Table::call_forward},
                      Bound{"restore_tokens_reduce", &Table::call_reduce}};
  }
};

SSLOPS_DECLARE_TABLE

}  // namespace sslops::restore_tokens
