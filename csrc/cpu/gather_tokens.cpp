#include "gather_tokens.h"

#include "../common/huge_pages.h"
#include "../common/parallel.h"
#include "buffer.h"
#include "vec.h"

namespace sslops::gather_tokens {
namespace {

constexpr int64_t kThreadBytes = 65536, kLine = 64;

int64_t grain(int64_t row) { return 1 + kThreadBytes / (row + 1); }

char* at(const Rows& rows, int64_t b, int64_t n) { return rows.data + b * rows.batch_stride + n * rows.row_stride; }

void forward(Rows tokens, Ids ids, int64_t row, char* out) {
  parallel_for(ids.batch * ids.count, grain(row), [&](int64_t begin, int64_t end) {
    const auto token = [&](int64_t k) -> const char* {
      const int64_t b = k / ids.count;
      return k - b * ids.count < count_of(ids.counts, b, ids.count) ? at(tokens, b, ids.ids[k]) : nullptr;
    };
    for (int64_t k = begin; k < end; ++k) {
      const char *const from = token(k), *const next = token(k + 1 < end ? k + 1 : k);
      char* const to = out + k * row;
      if (!from) {
        std::memset(to, 0, row);
        continue;
      }
      int64_t j = 0;
      for (; j + kLine <= row; j += kLine) {
        __builtin_prefetch((next ? next : from) + j);
        std::memcpy(to + j, from + j, kLine);
      }
      std::memcpy(to + j, from + j, row - j);
    }
  });
}

// The k that name a row are a list, in their order: first[n] begins it, next[k] goes on, -1 ends it.
void backward(Rows grad, DType grad_dtype, Ids ids, int64_t d, Rows out, DType out_dtype) {
  Buffer<int64_t> first(ids.batch * ids.rows), next(ids.batch * ids.count);
  std::memset(first, -1, ids.batch * ids.rows * sizeof(int64_t));
  for (int64_t b = 0; b < ids.batch; ++b)
    for (int64_t k = count_of(ids.counts, b, ids.count) - 1; k >= 0; --k) {
      const int64_t n = ids.ids[b * ids.count + k];
      if (n < 0 || n >= ids.rows) continue;
      next[b * ids.count + k] = first[b * ids.rows + n];
      first[b * ids.rows + n] = k;
    }
  const int64_t item = out_dtype == DType::f32 ? 4 : 2;
  parallel_for(ids.batch * ids.rows, grain(d * item), [&](int64_t begin, int64_t end) {
    for (int64_t at_row = begin; at_row < end; ++at_row) {
      const int64_t b = at_row / ids.rows, one = first[at_row];
      char* const to = at(out, b, at_row % ids.rows);
      if (one < 0) {
        std::memset(to, 0, d * item);
      } else if (next[b * ids.count + one] < 0 && grad_dtype == out_dtype) {
        std::memcpy(to, at(grad, b, one), d * item);
      } else {
        for_each_vector(d, [&](int64_t j, int lanes) {
          F total{};
          for (int64_t k = one; k >= 0; k = next[b * ids.count + k])
            total += load_as_float(at(grad, b, k), grad_dtype, j, lanes);
          store_from_float(to, out_dtype, j, lanes, total);
        });
      }
    }
  });
}

void call_forward(Tensor tokens, Tensor ids, Tensor counts, Tensor out) {
  if (!out.numel) return;  // no addresses
  on_huge_pages(out);
  forward(rows_of(tokens), ids_of(ids, counts, tokens), out.sizes[2] * out.item_size, out.data);
}

void call_backward(Tensor grad, Tensor ids, Tensor counts, Tensor d_tokens) {
  if (!d_tokens.numel) return;
  on_huge_pages(d_tokens);
  backward(rows_of(grad), grad.dtype, ids_of(ids, counts, d_tokens), d_tokens.sizes[2], rows_of(d_tokens),
           d_tokens.dtype);
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{forward, backward, call_forward, call_backward};
}

}  // namespace sslops::gather_tokens
