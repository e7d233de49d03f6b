#include "restore_tokens.h"

#include "../common/huge_pages.h"
#include "../common/parallel.h"
#include "buffer.h"
#include "stream.h"

namespace sslops::restore_tokens {
namespace {

constexpr int64_t kThreadElements = 16384;

// One row of out, `at` elements from its beginning: from[first ...] + positions[position ...], while the row at `next`,
// unless it is null, is fetched. kDType: of all three, unless kMixed. All by value, for the stores could change what is
// referred to.
template <bool kMixed, DType kDType>
void write(Array from, int64_t first, const char* next, Array positions, int64_t position, int64_t d, Array out,
           int64_t at, bool streams) {
  const DType from_dtype = kMixed ? from.dtype : kDType, out_dtype = kMixed ? out.dtype : kDType;
  const DType positions_dtype = kMixed ? positions.dtype : kDType;
  const int64_t item = from_dtype == DType::f32 ? 4 : 2;
  for_each_vector(d, [&](int64_t j, int lanes) {
    if (next) __builtin_prefetch(next + j * item);
    F v = load_as_float(from.data, from_dtype, first + j, lanes);
    if (positions.data) v += load_as_float(positions.data, positions_dtype, position + j, lanes);
    if (streams) return stream_from_float(out.data, out_dtype, at + j, v);
    store_from_float(out.data, out_dtype, at + j, lanes, v);
  });
}

void forward(Array visible, Array mask_token, Array positions, const int64_t* ids, Shape s, Array out) {
  const int64_t rows = s.prefix + s.length, row_bytes = s.d * (out.dtype == DType::f32 ? 4 : 2);
  const int64_t item = visible.dtype == DType::f32 ? 4 : 2;
  const bool streams = worth_streaming(out.data, s.batch * rows * row_bytes, row_bytes);
  const bool mixed =
      visible.dtype != out.dtype || mask_token.dtype != out.dtype || (positions.data && positions.dtype != out.dtype);
  const auto write_row = mixed                      ? write<true, DType::f32>
                         : out.dtype == DType::f32  ? write<false, DType::f32>
                         : out.dtype == DType::bf16 ? write<false, DType::bf16>
                                                    : write<false, DType::f16>;
  parallel_for(s.batch * rows, 1 + kThreadElements / (s.d + 1), [&](int64_t begin, int64_t end) {
    const auto place = [&](int64_t row) {  // of its token; -1: the mask token
      const int64_t b = row / rows, t = row % rows;
      const int64_t id = t < s.prefix ? -1 : ids[b * s.length + t - s.prefix];
      return is_masked(s, b, id) ? -1 : b * (s.prefix + s.kept) + (id < 0 ? t : s.prefix + id);
    };
    for (int64_t row = begin, own = place(begin), next; row < end; ++row, own = next) {
      next = row + 1 < end ? place(row + 1) : -1;
      const char* const ahead = next < 0 ? nullptr : static_cast<const char*>(visible.data) + next * s.d * item;
      write_row(own < 0 ? mask_token : visible, own < 0 ? 0 : own * s.d, ahead, positions, row % rows * s.d, s.d, out,
                row * s.d, streams);
    }
    if (streams) end_stream();
  });
}

// Adds rows of grad to total, which is loaded and stored once for all of them; as many of `next` are fetched meanwhile.
template <int kRows, DType kDType>
void add(const void* grad, const int64_t* rows, const int64_t* next, int64_t d, double* total) {
  constexpr int64_t kItem = kDType == DType::f32 ? 4 : 2;
  int64_t from[kRows], ahead[kRows];
  for (int k = 0; k < kRows; ++k) from[k] = rows[k], ahead[k] = next[k];
  for_each_vector(d, [&](int64_t j, int lanes) {
    D sum{};
    std::memcpy(&sum, total + j, lanes * sizeof(double));
    for (int k = 0; k < kRows; ++k) {
      __builtin_prefetch(static_cast<const char*>(grad) + (ahead[k] + j) * kItem);
      sum += widen(load_as_float(grad, kDType, from[k] + j, lanes));
    }
    std::memcpy(total + j, &sum, lanes * sizeof(double));
  });
}

template <int kRows>
auto adding(DType dtype) {
  return dtype == DType::f32    ? add<kRows, DType::f32>
         : dtype == DType::bf16 ? add<kRows, DType::bf16>
                                : add<kRows, DType::f16>;
}

void reduce(Array grad, const int64_t* ids, Shape s, double* parts, float* token, float* positions) {
  constexpr int kGroup = 4;
  const auto add_group = adding<kGroup>(grad.dtype), add_one = adding<1>(grad.dtype);
  const int64_t rows = s.prefix + s.length;
  // One thread adds up all that comes to a position.
  parallel_for(rows, 1, [&](int64_t begin, int64_t end) {
    Buffer<double> visible(s.d);
    Buffer<int64_t> at(s.batch + kGroup);  // where the rows are that count: those of the mask token, the others
    for (int64_t t = begin; t < end; ++t) {
      double* const masked = parts + t * s.d;
      std::memset(visible, 0, s.d * sizeof(double));
      std::memset(masked, 0, s.d * sizeof(double));
      int64_t count = 0;
      const auto list = [&](bool of_mask) {
        for (int64_t b = 0; b < s.batch; ++b)
          if ((t >= s.prefix && is_masked(s, b, ids[b * s.length + t - s.prefix])) == of_mask)
            at[count++] = (b * rows + t) * s.d;
      };
      list(true);
      const int64_t of_mask = count;
      if (positions) list(false);
      for (int k = 0; k < kGroup && count; ++k) at[count + k] = at[count - 1];
      // Rows of one position are far apart: of each the next one that counts is fetched meanwhile.
      for (int64_t k = 0; k < count;) {
        double* const total = k < of_mask ? masked : visible;
        const bool whole = k + kGroup <= (k < of_mask ? of_mask : count);
        (whole ? add_group : add_one)(grad.data, at + k, at + k + (whole ? kGroup : 1), s.d, total);
        k += whole ? kGroup : 1;
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
