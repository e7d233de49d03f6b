#include "restore_tokens.h"

#include "../common/huge_pages.h"
#include "../common/parallel.h"
#include "buffer.h"
#include "vec.h"

namespace sslops::restore_tokens {
namespace {

constexpr int64_t kThreadElements = 16384;

void forward(Array visible, Array mask_token, Array positions, const int64_t* ids, Shape s, Array out) {
  const int64_t rows = s.prefix + s.length, item = visible.dtype == DType::f32 ? 4 : 2;
  parallel_for(s.batch * rows, 1 + kThreadElements / (s.d + 1), [&](int64_t begin, int64_t end) {
    const auto place = [&](int64_t row) {  // of its token; -1: the mask token
      const int64_t b = row / rows, t = row % rows;
      const int64_t id = t < s.prefix ? -1 : ids[b * s.length + t - s.prefix];
      return is_masked(s, b, id) ? -1 : b * (s.prefix + s.kept) + (id < 0 ? t : s.prefix + id);
    };
    for (int64_t row = begin, own = place(begin), next; row < end; ++row, own = next) {
      next = row + 1 < end ? place(row + 1) : -1;
      const int64_t t = row % rows, first = own < 0 ? 0 : own * s.d;
      const Array from = own < 0 ? mask_token : visible;
      for_each_vector(s.d, [&](int64_t j, int lanes) {
        if (next >= 0) __builtin_prefetch(static_cast<const char*>(visible.data) + (next * s.d + j) * item);
        F v = load_as_float(from.data, from.dtype, first + j, lanes);
        if (positions.data) v += load_as_float(positions.data, positions.dtype, t * s.d + j, lanes);
        store_from_float(out.data, out.dtype, row * s.d + j, lanes, v);
      });
    }
  });
}

void add(Array grad, int64_t first, int64_t next, int64_t d, double* total) {
  const int64_t item = grad.dtype == DType::f32 ? 4 : 2;
  for_each_vector(d, [&](int64_t j, int lanes) {
    __builtin_prefetch(static_cast<const char*>(grad.data) + (next + j) * item);
    const D v = __builtin_convertvector(load_as_float(grad.data, grad.dtype, first + j, lanes), D);
    D sum{};
    std::memcpy(&sum, total + j, lanes * sizeof(double));
    sum += v;
    std::memcpy(total + j, &sum, lanes * sizeof(double));
  });
}

void reduce(Array grad, const int64_t* ids, Shape s, double* parts, float* token, float* positions) {
  const int64_t rows = s.prefix + s.length;
  // One thread adds up all that comes to a position.
  parallel_for(rows, 1, [&](int64_t begin, int64_t end) {
    Buffer<double> visible(s.d);
    for (int64_t t = begin; t < end; ++t) {
      double* const masked = parts + t * s.d;
      std::memset(visible, 0, s.d * sizeof(double));
      std::memset(masked, 0, s.d * sizeof(double));
      // Rows of one position are far apart: of each the next one that counts is fetched meanwhile.
      const auto of_mask = [&](int64_t b) {
        return t >= s.prefix && is_masked(s, b, ids[b * s.length + t - s.prefix]);
      };
      const auto counting = [&](int64_t b) {
        while (b < s.batch && !positions && !of_mask(b)) ++b;
        return b;
      };
      for (int64_t b = counting(0), next; b < s.batch; b = next) {
        next = counting(b + 1);
        add(grad, (b * rows + t) * s.d, ((next < s.batch ? next : b) * rows + t) * s.d, s.d,
            of_mask(b) ? masked : visible);
      }
      if (positions)
        for (int64_t j = 0; j < s.d; ++j) positions[t * s.d + j] = static_cast<float>(masked[j] + visible[j]);
    }
  });
  for (int64_t t = 1; t < rows; ++t)
    for (int64_t j = 0; j < s.d; ++j) parts[j] += parts[t * s.d + j];
  for (int64_t j = 0; j < s.d; ++j) token[j] = rows ? static_cast<float>(parts[j]) : 0.f;
}

void call_forward(Tensor visible, Tensor mask_token, Tensor positions, Tensor ids, Tensor counts, int64_t kept,
                  Tensor out) {
  if (!out.numel) return;  // no addresses
  on_huge_pages(out);
  forward(array(visible), array(mask_token), array(positions), ids.as<int64_t>(), shape(ids, counts, kept, out),
          array(out));
}

void call_reduce(Tensor grad, Tensor ids, Tensor counts, int64_t kept, Tensor parts, Tensor positions, Tensor token) {
  if (!token.numel) return;
  reduce(array(grad), ids.as<int64_t>(), shape(ids, counts, kept, grad), parts.as<double>(), token.as<float>(),
         positions.as<float>());
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{forward, reduce, call_forward, call_reduce};
}

}  // namespace sslops::restore_tokens
