#include "gather_patches.h"

#include "../common/huge_pages.h"
#include "../common/parallel.h"
#include "patches.h"

namespace sslops::gather_patches {
namespace {

void forward(const void* images, DType dtype, Patches p, const int64_t* ids, int64_t k, Layout layout,
             const float* factors, void* out, DType out_dtype) {
  const int64_t size = patch_size(p);
  parallel_for(p.images * k, 8, [&](int64_t begin, int64_t end) {
    Buffer<float> planes(2 * size);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t next = i + 1 < end ? i + 1 : i;
      load_planes(images, dtype, p, corner(p, i / k, ids[i]), corner(p, next / k, ids[next]), planes);
      if (factors) scale_planes(planes, p, factors);
      const float* const values = arrange(planes, p, layout, planes + size);
      for_each_vector(size, [&](int64_t j, int lanes) {
        store_from_float(out, out_dtype, i * size + j, lanes, load_lanes(values + j, lanes, 0.f));
      });
    }
  });
}

void backward(void* d_images, DType dtype, Patches p, const int64_t* ids, int64_t k, Layout layout,
              const float* factors, const void* grad, DType grad_dtype) {
  const int64_t size = patch_size(p), count = patch_count(p);
  parallel_for(p.images, 1, [&](int64_t begin, int64_t end) {
    Buffer<float> sums(2 * size);
    // Of grad: the first row of each patch, and after each row the next of the same.
    Buffer<int64_t> rows(count + k);
    int64_t *const first = rows, *const next = first + count;
    for (int64_t image = begin; image < end; ++image) {
      for (int64_t id = 0; id < count; ++id) first[id] = k;
      for (int64_t row = k - 1; row >= 0; --row) {
        int64_t& head = first[ids[image * k + row]];
        next[row] = head;
        head = row;
      }
      for (int64_t id = 0; id < count; ++id) {
        for (int64_t j = 0; j < size; ++j) sums[j] = 0.f;
        for (int64_t row = first[id]; row < k; row = next[row])
          for_each_vector(size, [&](int64_t j, int lanes) {
            const F v = load_as_float(grad, grad_dtype, (image * k + row) * size + j, lanes);
            store_lanes(sums + j, lanes, load_lanes(sums + j, lanes, 0.f) + v);
          });
        const float* const planes = planes_of(sums, p, layout, sums + size);
        const int64_t from = corner(p, image, id);
        for_each_row(p, [&](int64_t row, int64_t at, int64_t c) {
          for_each_vector(p.width, [&](int64_t j, int lanes) {
            const F v = load_lanes(planes + at + j, lanes, 0.f);
            store_from_float(d_images, dtype, from + row + j, lanes, factors ? v * factors[c] : v);
          });
        });
      }
    }
  });
}

void call_forward(Tensor images, Tensor ids, int64_t frames, int64_t height, int64_t width, bool hwc, Tensor factors,
                  Tensor out) {
  on_huge_pages(out);
  forward(images.data, images.dtype, patches_of(images, frames, height, width), ids.as<int64_t>(), ids.sizes[1],
          Layout(hwc), factors.as<float>(), out.data, out.dtype);
}

void call_backward(Tensor grad, Tensor ids, int64_t frames, int64_t height, int64_t width, bool hwc, Tensor factors,
                   Tensor d_images) {
  on_huge_pages(d_images);
  backward(d_images.data, d_images.dtype, patches_of(d_images, frames, height, width), ids.as<int64_t>(), ids.sizes[1],
           Layout(hwc), factors.as<float>(), grad.data, grad.dtype);
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{forward, backward, call_forward, call_backward};
}

}  // namespace sslops::gather_patches
