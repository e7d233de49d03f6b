#include "gather_patches.h"

#include "../common/huge_pages.h"
#include "../common/parallel.h"
#include "patches.h"

namespace sslops::gather_patches {
namespace {

void scale_planes(float* planes, const Patches& p, const float* scale, const float* shift) {
  const int64_t area = patch_area(p);
  for (int64_t c = 0; c < p.channels; ++c, planes += area)
    for_each_vector(area, [&](int64_t j, int lanes) {
      const F v = load_lanes(planes + j, lanes, 0.f) * scale[c];
      store_lanes(planes + j, lanes, v + shift[c]);
    });
}

void forward(const void* images, DType dtype, Patches p, const int64_t* ids, int64_t k, Layout layout,
             const float* scale, const float* shift, void* out, DType out_dtype) {
  const int64_t size = patch_size(p);
  parallel_for(p.images * k, 8, [&](int64_t begin, int64_t end) {
    const Scratch<float> planes(2 * size);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t next = i + 1 < end ? i + 1 : i;
      load_planes(images, dtype, p, corner(p, i / k, ids[i]), corner(p, next / k, ids[next]), planes.data);
      if (scale) scale_planes(planes.data, p, scale, shift);
      const float* const values = arrange(planes.data, p, layout, planes.data + size);
      for_each_vector(size, [&](int64_t j, int lanes) {
        store_from_float(out, out_dtype, i * size + j, lanes, load_lanes(values + j, lanes, 0.f));
      });
    }
  });
}

void backward(void* d_images, DType dtype, Patches p, const int64_t* ids, int64_t k, Layout layout, const float* scale,
              const void* grad, DType grad_dtype) {
  const int64_t size = patch_size(p), count = patch_count(p);
  parallel_for(p.images, 1, [&](int64_t begin, int64_t end) {
    const Scratch<float> sums(2 * size);
    const Scratch<int64_t> rows(count +
                                k);  // of grad: the first of each patch, and after each row the next of the same
    int64_t *const first = rows.data, *const next = first + count;
    for (int64_t image = begin; image < end; ++image) {
      for (int64_t id = 0; id < count; ++id) first[id] = k;
      for (int64_t row = k - 1; row >= 0; --row) {
        int64_t& head = first[ids[image * k + row]];
        next[row] = head;
        head = row;
      }
      for (int64_t id = 0; id < count; ++id) {
        for (int64_t j = 0; j < size; ++j) sums.data[j] = 0.f;
        for (int64_t row = first[id]; row < k; row = next[row])
          for_each_vector(size, [&](int64_t j, int lanes) {
            const F v = load_as_float(grad, grad_dtype, (image * k + row) * size + j, lanes);
            store_lanes(sums.data + j, lanes, load_lanes(sums.data + j, lanes, 0.f) + v);
          });
        const float* planes = planes_of(sums.data, p, layout, sums.data + size);
        const int64_t from = corner(p, image, id);
        for (int64_t c = 0; c < p.channels; ++c)
          for (int64_t y = 0; y < p.height; ++y, planes += p.width)
            for_each_vector(p.width, [&](int64_t j, int lanes) {
              const F v = load_lanes(planes + j, lanes, 0.f);
              store_from_float(d_images, dtype, from + offset(p, c, y, j), lanes, scale ? v * scale[c] : v);
            });
      }
    }
  });
}

void call_forward(Tensor images, Tensor ids, int64_t height, int64_t width, bool hwc, Tensor factors, Tensor out) {
  on_huge_pages(out);
  const float* const scale = factors.as<float>();
  forward(images.data, images.dtype, patches_of(images, height, width), ids.as<int64_t>(), ids.sizes[1], Layout(hwc),
          scale, scale ? scale + images.sizes[1] : nullptr, out.data, out.dtype);
}

void call_backward(Tensor grad, Tensor ids, int64_t height, int64_t width, bool hwc, Tensor factors, Tensor d_images) {
  on_huge_pages(d_images);
  backward(d_images.data, d_images.dtype, patches_of(d_images, height, width), ids.as<int64_t>(), ids.sizes[1],
           Layout(hwc), factors.as<float>(), grad.data, grad.dtype);
}

}  // namespace

namespace SSLOPS_ISA {
extern const Table table{forward, backward, call_forward, call_backward};
}

}  // namespace sslops::gather_patches
