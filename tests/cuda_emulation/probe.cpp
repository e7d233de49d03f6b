#include "cuda/probe.cu"

#include <vector>

int main() {
  for (int64_t n : {1, 255, 64 * 256, 64 * 256 + 3}) {
    std::vector<int32_t> out(n, -1);
    sslops::cuda_iota(out.data(), n, nullptr);
    for (int64_t k = 0; k < n; ++k)
      if (out[k] != k) return 1;
  }
}
