// The CUDA kernel against the CPU's, bit for bit: all pairs of dtypes, sizes around each boundary, unaligned tensors,
// shadows, rounding to nearest and stochastic, momentum and seed by value and by address.
#include "cuda/ema_update.cu"

#include <cmath>
#include <cstdio>
#include <memory>
#include <random>

#include "cpu/ema_update.h"

namespace sslops::ema_update {
namespace {

// Exactly as many bytes as there are elements, so that a sanitizer sees the first one past them.
struct Buffer {
  std::unique_ptr<char[]> bytes;
  size_t size = 0, offset = 0;

  Buffer(DType dtype, int64_t n, bool unaligned, std::mt19937& random) {
    const int64_t item = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
    offset = unaligned ? item : 0;
    size = offset + n * item;
    bytes.reset(new char[size]);
    std::normal_distribution<double> normal;
    for (int64_t k = 0; k < n; ++k) {
      const double y = normal(random) * std::exp2(static_cast<int>(random() % 40) - 32);
      const double x = random() % 50 ? y : INFINITY;  // of one sign: a NaN of two has other bits on CUDA
      const float f = static_cast<float>(x);
      const uint16_t h = dtype == DType::bf16 ? sslops::to_bf16(f) : sslops::to_f16(f);
      const void* from = dtype == DType::f64   ? static_cast<const void*>(&x)
                         : dtype == DType::f32 ? &f
                                               : static_cast<const void*>(&h);
      std::memcpy(bytes.get() + offset + k * item, from, item);
    }
  }
  Buffer(const Buffer& other) : bytes(new char[other.size]), size(other.size), offset(other.offset) {
    std::memcpy(bytes.get() + offset, other.bytes.get() + offset, size - offset);
  }
  void* data() const { return bytes.get() + offset; }
  bool operator==(const Buffer& other) const { return std::memcmp(data(), other.data(), size - offset) == 0; }
};

struct Case {
  DType target_dtype, source_dtype, shadow_dtype;
  int64_t n;
  Buffer target, source;
  bool copied;
  std::unique_ptr<Buffer> shadow;
};

Work work_of(std::vector<Case>& cases) {
  Work work;
  for (Case& c : cases) {
    const int64_t numel = c.copied ? static_cast<int64_t>(c.target.size - c.target.offset) : c.n;
    work.rows.push_back({c.target.data(), c.source.data(), c.shadow ? c.shadow->data() : nullptr, numel, work.chunks,
                         c.target_dtype, c.source_dtype, c.shadow_dtype, c.copied});
    work.chunks += chunks(work.rows.back());
    work.elements += numel;
  }
  return work;
}

std::vector<Case> copy(const std::vector<Case>& cases) {
  std::vector<Case> copies;
  for (const Case& c : cases)
    copies.push_back({c.target_dtype, c.source_dtype, c.shadow_dtype, c.n, c.target, c.source, c.copied,
                      c.shadow ? std::make_unique<Buffer>(*c.shadow) : nullptr});
  return copies;
}

int compare(std::vector<Case>& cases, double m, Momentum momentum, Seed seed, uint64_t key) {
  std::vector<Case> on_cpu = copy(cases), on_cuda = copy(cases);
  const Work cpu_work = work_of(on_cpu), cuda_work = work_of(on_cuda);
  portable::table.update(cpu_work, m, seed.stochastic ? &key : nullptr);
  std::vector<Row> rows(cuda_work.rows.size());
  cuda_upload(cuda_work, rows.data(), nullptr);
  cuda_update(cuda_work, rows.data(), momentum, seed, nullptr);
  int wrong = 0;
  for (size_t k = 0; k < cases.size(); ++k) {
    const Case &a = on_cpu[k], &b = on_cuda[k];
    if (a.target == b.target && (!a.shadow || *a.shadow == *b.shadow)) continue;
    std::printf("differs: dtypes %d <- %d, %ld elements, momentum %g\n", static_cast<int>(a.target_dtype),
                static_cast<int>(a.source_dtype), static_cast<long>(a.n), m);
    ++wrong;
  }
  return wrong;
}

// Momentum 1 writes nothing: of all NaN, each of which a conversion would make another.
int kept(bool stochastic) {
  std::mt19937 random(1);
  int wrong = 0;
  for (DType dtype : {DType::f16, DType::bf16, DType::f32, DType::f64}) {
    std::vector<Case> cases;
    cases.push_back({dtype, DType::f32, DType::f32, 3000, Buffer(dtype, 3000, false, random),
                     Buffer(DType::f32, 3000, false, random), false, nullptr});
    for (size_t k = 0; k < cases[0].target.size; ++k)
      cases[0].target.bytes[k] = static_cast<char>(k % 2 ? 0x7f | k << 7 : 0x80 | k >> 1);
    std::vector<Case> updated = copy(cases);
    const Work work = work_of(updated);
    std::vector<Row> rows(1);
    cuda_upload(work, rows.data(), nullptr);
    cuda_update(work, rows.data(), {1, nullptr, false}, {stochastic, 5, nullptr}, nullptr);
    if (!(updated[0].target == cases[0].target)) {
      std::printf("momentum 1 differs: dtype %d\n", static_cast<int>(dtype));
      ++wrong;
    }
  }
  return wrong;
}

int run() {
  std::mt19937 random(0);
  std::vector<Case> cases;
  const auto add = [&](DType target, DType source, int64_t n, bool unaligned, bool shadow, DType shadow_dtype) {
    cases.push_back({target, source, shadow_dtype, n, Buffer(target, n, unaligned, random),
                     Buffer(source, n, false, random), false, nullptr});
    if (shadow) cases.back().shadow = std::make_unique<Buffer>(shadow_dtype, n, unaligned, random);
  };
  const DType all[] = {DType::f32, DType::f16, DType::bf16, DType::f64};
  for (DType target : all)
    for (DType source : all)
      for (int64_t n : {1, 8, 2063}) add(target, source, n, n == 8, false, DType::f32);
  for (DType shadow : {DType::f16, DType::bf16})
    for (int64_t n : {7, 100}) add(DType::f32, DType::bf16, n, n == 100, true, shadow);
  add(DType::bf16, DType::f32, kChunk, false, false, DType::f32);
  add(DType::f32, DType::f32, 2 * kChunk + 1, false, false, DType::f32);
  for (int64_t n : {3, 5000}) {
    add(DType::f64, DType::f64, n, n == 3, false, DType::f32);
    cases.back().copied = true;
  }
  // More rows than travel in one packet, and than a block has threads to search them.
  std::vector<Case> many;
  cases.swap(many);
  for (int64_t k = 0; k < 300; ++k) add(DType::f32, DType::bf16, 1 + k % 3, false, false, DType::f32);
  cases.swap(many);

  const float m32 = 0.996f, above = 1.5f;
  const double m64 = 0.25;
  const uint64_t key = 0x123456789abcdef0;
  int wrong = compare(cases, 0.999, {0.999, nullptr, false}, {false, 0, nullptr}, 0);
  wrong += compare(cases, m32, {0, &m32, false}, {true, key, nullptr}, key);
  wrong += compare(cases, m64, {0, &m64, true}, {true, 0, &key}, key);
  wrong += compare(many, 0.999, {0.999, nullptr, false}, {false, 0, nullptr}, 0);
  wrong += compare(cases, 1, {0, &above, false}, {false, 0, nullptr}, 0);
  return wrong + kept(false) + kept(true);
}

}  // namespace
}  // namespace sslops::ema_update

int main() { return sslops::ema_update::run() != 0; }
