#include "restore_tokens.h"

#include "../common/huge_pages.h"
#include "../common/parallel.h"
#include "buffer.h"
#include "vec.h"

namespace sslops::restore_tokens {
namespace {

constexpr int64_t kThreadElements = 16384;

void forward(Array visible, Array mask_token, Array positions, const int64_t* ids, Shape s, Array out) {
  const int64_t rows = s.prefix + s.length;
  parallel_for(s.batch * rows, 1 + kThreadElements / (s.d + 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t b = row / rows, t = row % rows;
      const int64_t place = t < s.prefix ? t : s.prefix + ids[b * s.length + t - s.prefix];
      const bool masked = t >= s.prefix && is_masked(s, b, place - s.prefix);
      const Array from = masked ? mask_token : visible;
      const int64_t first = masked ? 0 : (b * (s.prefix + s.kept) + place) * s.d;
      for_each_vector(s.d, [&](int64_t j, int lanes) {
        F v = load_as_float(from.data, from.dtype, first + j, lanes);
        if (positions.data) v += load_as_float(positions.data, positions.dtype, t * s.d + j, lanes);
        store_from_float(out.data, out.dtype, row * s.d + j, lanes, v);
      });
    }
  });
}

void add(Array grad, int64_t first, int64_t d, double* total) {
  for_each_vector(d, [&](int64_t j, int lanes) {
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
      for (int64_t b = 0; b < s.batch; ++b) {
        const bool of_mask = t >= s.prefix && is_masked(s, b, ids[b * s.length + t - s.prefix]);
        if (of_mask || positions) add(grad, (b * rows + t) * s.d, s.d, of_mask ? masked : visible);
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
