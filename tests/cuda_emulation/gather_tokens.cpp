// The CUDA kernels against the CPU's: all dtypes, aligned rows and others, repeated ids, ids that name no row.
#include "cuda/gather_tokens.cu"

#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "contiguous.h"
#include "cpu/gather_tokens.h"

namespace sslops::gather_tokens {
namespace {

struct Shape {
  int64_t batch, rows, count, d;
};

int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

// Exactly as many bytes as there are elements; small whole numbers, so that sums are the same in every dtype.
std::unique_ptr<char[]> numbers(DType dtype, int64_t n, std::mt19937& random) {
  std::unique_ptr<char[]> bytes(new char[n * size_of(dtype)]);
  for (int64_t k = 0; k < n; ++k) {
    const float x = static_cast<float>(random() % 15) - 7;
    const uint16_t h = dtype == DType::bf16 ? to_bf16(x) : to_f16(x);
    std::memcpy(bytes.get() + k * size_of(dtype), dtype == DType::f32 ? static_cast<const void*>(&x) : &h,
                size_of(dtype));
  }
  return bytes;
}

int check(const char* what, const std::unique_ptr<char[]>& a, const std::unique_ptr<char[]>& b, int64_t size,
          const Shape& s, DType dtype) {
  if (std::memcmp(a.get(), b.get(), size) == 0) return 0;
  std::printf("differs: %s, dtype %d, %ld x %ld x %ld, %ld ids\n", what, static_cast<int>(dtype),
              static_cast<long>(s.batch), static_cast<long>(s.rows), static_cast<long>(s.d),
              static_cast<long>(s.count));
  return 1;
}

int compare(const Shape& s, DType dtype, DType grad_dtype, std::mt19937& random) {
  const int64_t row = s.d * size_of(dtype), grad_row = s.d * size_of(grad_dtype);
  const std::unique_ptr<char[]> tokens = numbers(dtype, s.batch * s.rows * s.d, random);
  const std::unique_ptr<char[]> grad = numbers(grad_dtype, s.batch * s.count * s.d, random);
  const std::unique_ptr<int64_t[]> repeated(new int64_t[s.batch * s.count]), once(new int64_t[s.batch * s.count]);
  for (int64_t k = 0; k < s.batch * s.count; ++k) {
    repeated[k] = random() % s.rows;
    once[k] = (k % s.count * 7 + k / s.count) % s.rows;  // 7 divides no number of rows below
  }
  const auto buffer = [](int64_t size) { return std::unique_ptr<char[]>(new char[size]()); };
  const std::unique_ptr<char[]> a = buffer(s.batch * s.count * row), b = buffer(s.batch * s.count * row);
  const std::unique_ptr<char[]> c = buffer(s.batch * s.rows * row), d = buffer(s.batch * s.rows * row);
  const auto rows = [](char* data, int64_t count, int64_t row) { return Rows{data, count * row, row}; };
  int wrong = 0;

  Ids ids{repeated.get(), s.batch, s.count, s.rows, nullptr};
  // Behind the counts ids are not looked at.
  const int64_t counts[] = {s.count / 2, s.count + 5, -1};
  ids.counts = counts;
  portable::table.forward(rows(tokens.get(), s.rows, row), ids, row, a.get());
  cuda_forward(rows(tokens.get(), s.rows, row), ids, row, b.get(), nullptr);
  wrong += check("forward of counts", a, b, s.batch * s.count * row, s, dtype);
  portable::table.backward(rows(grad.get(), s.count, grad_row), grad_dtype, ids, s.d, rows(c.get(), s.rows, row),
                           dtype);
  cuda_backward(rows(grad.get(), s.count, grad_row), grad_dtype, ids, s.d, rows(d.get(), s.rows, row), dtype, nullptr);
  wrong += check("backward of counts", c, d, s.batch * s.rows * row, s, dtype);
  ids.counts = nullptr;
  portable::table.forward(rows(tokens.get(), s.rows, row), ids, row, a.get());
  cuda_forward(rows(tokens.get(), s.rows, row), ids, row, b.get(), nullptr);
  wrong += check("forward", a, b, s.batch * s.count * row, s, dtype);

  // Some name no row: the backward passes them over, forward makes NaN of them.
  for (int64_t k = 0; k < s.batch * s.count; k += 5) repeated[k] = k % 2 ? -1 : int64_t{1} << 40;
  cuda_forward(rows(tokens.get(), s.rows, row), ids, row, b.get(), nullptr);
  for (int64_t k = 0; k < s.batch * s.count; k += 5) std::memset(a.get() + k * row, 0xff, row);
  wrong += check("forward out of range", a, b, s.batch * s.count * row, s, dtype);
  portable::table.backward(rows(grad.get(), s.count, grad_row), grad_dtype, ids, s.d, rows(c.get(), s.rows, row),
                           dtype);
  cuda_backward(rows(grad.get(), s.count, grad_row), grad_dtype, ids, s.d, rows(d.get(), s.rows, row), dtype, nullptr);
  wrong += check("backward", c, d, s.batch * s.rows * row, s, dtype);

  if (s.count > s.rows || dtype != grad_dtype) return wrong;
  if (s.count > 2) once[2] = s.rows;
  ids.ids = once.get();
  portable::table.backward(rows(grad.get(), s.count, row), dtype, ids, s.d, rows(c.get(), s.rows, row), dtype);
  std::memset(d.get(), 0, s.batch * s.rows * row);
  cuda_scatter(grad.get(), ids, row, rows(d.get(), s.rows, row), nullptr);
  wrong += check("scatter", c, d, s.batch * s.rows * row, s, dtype);
  ids.counts = counts;
  portable::table.backward(rows(grad.get(), s.count, row), dtype, ids, s.d, rows(c.get(), s.rows, row), dtype);
  std::memset(d.get(), 0, s.batch * s.rows * row);
  cuda_scatter(grad.get(), ids, row, rows(d.get(), s.rows, row), nullptr);
  wrong += check("scatter of counts", c, d, s.batch * s.rows * row, s, dtype);
  return wrong;
}

// What Python calls, with addresses only where there are elements.
void call_without_elements(int64_t batch, int64_t rows, int64_t count, int64_t d) {
  std::vector<float> values(batch * (rows + count) * d + 1);
  std::vector<int64_t> numbers(batch * count + 1);
  const Contiguous<3> tokens(DType::f32, 4, {batch, rows, d}, values.data());
  const Contiguous<3> out(DType::f32, 4, {batch, count, d}, values.data() + batch * rows * d);
  const Contiguous<2> ids(DType::i64, 8, {batch, count}, numbers.data());
  portable::table.call_forward(tokens, ids, {}, out);
  portable::table.call_backward(out, ids, {}, tokens);
  cuda_table().forward(tokens, ids, {}, out, {});
  cuda_table().backward(out, ids, {}, tokens, {});
  cuda_table().scatter(out, ids, {}, tokens, {});
}

int run() {
  call_without_elements(0, 3, 2, 4);
  call_without_elements(2, 3, 0, 4);
  call_without_elements(2, 3, 2, 0);
  std::mt19937 random(0);
  int wrong = 0;
  const Shape even{2, 5, 3, 8}, odd{1, 3, 40, 131}, many{3, 10, 10, 33};
  for (const Shape& s : {even, odd, many}) wrong += compare(s, DType::f32, DType::f32, random);
  for (DType dtype : {DType::bf16, DType::f16}) {
    wrong += compare(even, dtype, dtype, random);
    wrong += compare(many, dtype, DType::f32, random);
  }
  return wrong;
}

}  // namespace
}  // namespace sslops::gather_tokens

int main() { return sslops::gather_tokens::run() != 0; }
