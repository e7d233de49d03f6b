// Patches of images: where their pixels are, on every device.
#pragma once
#include <cstdint>

#include "host_device.h"
#include "tensor.h"

namespace sslops {

// The order of a patch's values: that of a convolution's weight, or of MAE's patchify (rows, columns, channels).
enum class Layout : int { chw = 0, hwc = 1 };

// Images [B, C, H, W] of any strides (in elements), tiled by grid_height x grid_width patches.
struct Patches {
  int64_t images, channels, grid_height, grid_width, height, width;  // of the grid in patches; of a patch in pixels
  int64_t image_stride, channel_stride, row_stride, pixel_stride;
};

SSLOPS_HOST Patches patches_of(const Tensor& images, int64_t height, int64_t width) {
  const int64_t *const n = images.sizes, *const stride = images.strides;
  return {n[0], n[1], n[2] / height, n[3] / width, height, width, stride[0], stride[1], stride[2], stride[3]};
}

SSLOPS_HOST_DEVICE int64_t patch_count(const Patches& p) { return p.grid_height * p.grid_width; }
SSLOPS_HOST_DEVICE int64_t patch_area(const Patches& p) { return p.height * p.width; }
SSLOPS_HOST_DEVICE int64_t patch_size(const Patches& p) { return p.channels * patch_area(p); }
SSLOPS_HOST_DEVICE bool is_patch(const Patches& p, int64_t id) { return id >= 0 && id < patch_count(p); }

// Where the first pixel of a patch is.
SSLOPS_HOST_DEVICE int64_t corner(const Patches& p, int64_t image, int64_t id) {
  return image * p.image_stride + id / p.grid_width * p.height * p.row_stride +
         id % p.grid_width * p.width * p.pixel_stride;
}

// Where a pixel is, from the corner of its patch.
SSLOPS_HOST_DEVICE int64_t offset(const Patches& p, int64_t channel, int64_t row, int64_t column) {
  return channel * p.channel_stride + row * p.row_stride + column * p.pixel_stride;
}

struct Place {
  int64_t channel, offset;
};

// Value e of a patch in `layout`: its channel, and where it is from the corner.
SSLOPS_HOST_DEVICE Place place(const Patches& p, Layout layout, int64_t e) {
  // A patch has fewer than 2^32 values, and 32 bits divide several times faster.
  const uint32_t k = static_cast<uint32_t>(e), width = static_cast<uint32_t>(p.width);
  const uint32_t channels = static_cast<uint32_t>(p.channels), area = static_cast<uint32_t>(patch_area(p));
  const uint32_t channel = layout == Layout::chw ? k / area : k % channels;
  const uint32_t pixel = layout == Layout::chw ? k % area : k / channels;
  return {channel, offset(p, channel, pixel / width, pixel % width)};
}

}  // namespace sslops
