// The CUDA kernels against the CPU's: mixed dtypes, rows that are no multiple of what a lane takes, no tokens of a
// kind, ids out of range.
#include "cuda/restore_tokens.cu"

#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "contiguous.h"
#include "cpu/restore_tokens.h"

namespace sslops::restore_tokens {
namespace {

// Exactly as many bytes as there are elements, so that a sanitizer sees the first one past them.
struct Buffer {
  DType dtype;
  int64_t size;
  std::unique_ptr<char[]> bytes;

  Buffer(DType dtype, int64_t n) : dtype(dtype), size(n * (dtype == DType::f32 ? 4 : 2)), bytes(new char[size]()) {}
  Buffer(DType dtype, int64_t n, std::mt19937& random) : Buffer(dtype, n) {
    for (int64_t k = 0; k < n; ++k) {
      const float x = static_cast<float>(random() % 15) - 7;
      const uint16_t h = dtype == DType::bf16 ? to_bf16(x) : to_f16(x);
      std::memcpy(bytes.get() + k * (size / n), dtype == DType::f32 ? static_cast<const void*>(&x) : &h, size / n);
    }
  }
  Array array() const { return {bytes.get(), dtype}; }
  float* floats() const { return reinterpret_cast<float*>(bytes.get()); }
  bool operator==(const Buffer& other) const { return std::memcmp(bytes.get(), other.bytes.get(), size) == 0; }
};

int check(const char* what, bool same, const Shape& s, DType out) {
  if (same) return 0;
  std::printf("differs: %s, dtype %d, B %ld P %ld K %ld L %ld D %ld\n", what, static_cast<int>(out),
              static_cast<long>(s.batch), static_cast<long>(s.prefix), static_cast<long>(s.kept),
              static_cast<long>(s.length), static_cast<long>(s.d));
  return 1;
}

int compare(const Shape& s, DType visible_dtype, DType token_dtype, DType out_dtype, bool positioned,
            std::mt19937& random) {
  const int64_t rows = s.prefix + s.length;
  const Buffer visible(visible_dtype, s.batch * (s.prefix + s.kept) * s.d, random), token(token_dtype, s.d, random);
  const Buffer positions(token_dtype, rows * s.d, random), grad(out_dtype, s.batch * rows * s.d, random);
  std::vector<int64_t> ids(s.batch * s.length);
  for (int64_t& id : ids) id = random() % s.length;
  const Array added = positioned ? positions.array() : Array{nullptr, DType::f32};

  Buffer a(out_dtype, s.batch * rows * s.d), b(out_dtype, s.batch * rows * s.d);
  portable::table.forward(visible.array(), token.array(), added, ids.data(), s, a.array());
  cuda_forward(visible.array(), token.array(), added, ids.data(), s, b.array(), nullptr);
  int wrong = check("forward", a == b, s, out_dtype);

  std::vector<double> scratch(rows * s.d), parts(rows * s.d);
  Buffer sum(DType::f32, s.d), p(DType::f32, rows * s.d), q(DType::f32, rows * s.d);
  portable::table.reduce(grad.array(), ids.data(), s, scratch.data(), sum.floats(), positioned ? p.floats() : nullptr);
  cuda_reduce(grad.array(), ids.data(), s, parts.data(), positioned ? q.floats() : nullptr, nullptr);
  for (int64_t j = 0; j < s.d; ++j) {
    double total = 0;
    for (int64_t t = 0; t < rows; ++t) total += parts[t * s.d + j];
    wrong += check("mask token", static_cast<float>(total) == sum.floats()[j], s, out_dtype);
  }
  wrong += check("positions", p == q, s, out_dtype);

  if (s.length) {
    ids[0] = s.length;
    ids.back() = -1;
    cuda_forward(visible.array(), token.array(), added, ids.data(), s, b.array(), nullptr);
    float value[1];
    for (int64_t row : {s.prefix, s.batch * rows - 1}) {
      for (int64_t j = 0; j < s.d; ++j) {
        const char* const at = b.bytes.get() + (row * s.d + j) * (b.size / (s.batch * rows * s.d));
        if (out_dtype == DType::f32)
          std::memcpy(value, at, 4);
        else {
          uint16_t h;
          std::memcpy(&h, at, 2);
          value[0] = out_dtype == DType::bf16 ? bf16_to_float(h) : f16_to_float(h);
        }
        wrong += check("NaN", value[0] != value[0], s, out_dtype);
      }
    }
  }
  return wrong;
}

// What Python calls, with addresses only where there are elements.
void call_without_elements(int64_t batch, int64_t prefix, int64_t length, int64_t d) {
  std::vector<float> values((2 * batch + 2) * (prefix + length) * d + 2 * d + 1);
  std::vector<double> sums((prefix + length) * d + 1);
  std::vector<int64_t> numbers(batch * length + 1);
  float* const rest = values.data() + 2 * batch * (prefix + length) * d;
  const Contiguous<3> visible(DType::f32, 4, {batch, prefix + length, d}, values.data());
  const Contiguous<3> out(DType::f32, 4, {batch, prefix + length, d}, values.data() + visible.tensor.numel);
  const Contiguous<2> ids(DType::i64, 8, {batch, length}, numbers.data());
  const Contiguous<2> positions(DType::f32, 4, {prefix + length, d}, rest);
  const Contiguous<1> token(DType::f32, 4, {d}, rest + positions.tensor.numel);
  const Contiguous<2> parts(DType::f64, 8, {prefix + length, d}, sums.data());
  portable::table.call_forward(visible, token, positions, ids, {}, length, out);
  portable::table.call_reduce(out, ids, {}, length, parts, positions, token);
  cuda_table().forward(visible, token, positions, ids, {}, length, out, {});
  cuda_table().reduce(out, ids, {}, length, parts, positions, {});
}

int run() {
  call_without_elements(0, 1, 2, 4);
  call_without_elements(2, 0, 0, 4);
  call_without_elements(2, 1, 2, 0);
  std::mt19937 random(0);
  const DType f32 = DType::f32, bf16 = DType::bf16, f16 = DType::f16;
  int wrong = 0;
  const int64_t counts[] = {2, 9, -1};
  for (const Shape& s : {Shape{2, 1, 3, 7, 131, nullptr},
                         {3, 0, 4, 4, 8, nullptr},
                         {1, 2, 0, 5, 33, nullptr},
                         {2, 1, 0, 0, 4, nullptr},
                         {3, 1, 3, 7, 20, counts}}) {
    wrong += compare(s, f32, f32, f32, true, random);
    wrong += compare(s, bf16, f32, f32, false, random);
    wrong += compare(s, bf16, bf16, bf16, true, random);
    wrong += compare(s, f16, f16, f16, false, random);
  }
  return wrong;
}

}  // namespace
}  // namespace sslops::restore_tokens

int main() { return sslops::restore_tokens::run() != 0; }
