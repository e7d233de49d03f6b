// Patches of images: where their pixels are, on every device.
#pragma once
#include <cstdint>

#include "host_device.h"
#include "tensor.h"

namespace sslops {

// The order of a patch's values: that of a convolution's weight, or of MAE's patchify (rows, columns, channels).
enum class Layout : int { chw = 0, hwc = 1 };

// Images [B, C, frames, H, W] of any strides (in elements), tiled by patches. An image is a video of one frame, a
// signal [B, C, W] an image of one row.
struct Patches {
  int64_t images, channels;
  int64_t grid_frames, grid_height, grid_width;  // in patches
  int64_t frames, height, width;                 // of a patch, in pixels
  int64_t image_stride, channel_stride, frame_stride, row_stride, pixel_stride;
};

// Of images [B, C, ...] with one, two or three sizes; what they lack is 1 in a patch, too.
SSLOPS_HOST Patches patches_of(const Tensor& images, int64_t frames, int64_t height, int64_t width) {
  const int64_t lacking = 5 - images.dim;
  const auto size = [&](int64_t axis) { return axis < lacking ? 1 : images.sizes[2 + axis - lacking]; };
  const auto stride = [&](int64_t axis) { return axis < lacking ? 0 : images.strides[2 + axis - lacking]; };
  return {images.sizes[0], images.sizes[1],   size(0) / frames,  size(1) / height, size(2) / width, frames,   height,
          width,           images.strides[0], images.strides[1], stride(0),        stride(1),       stride(2)};
}

SSLOPS_HOST_DEVICE int64_t patch_count(const Patches& p) { return p.grid_frames * p.grid_height * p.grid_width; }
SSLOPS_HOST_DEVICE int64_t patch_area(const Patches& p) { return p.frames * p.height * p.width; }
SSLOPS_HOST_DEVICE int64_t patch_size(const Patches& p) { return p.channels * patch_area(p); }
SSLOPS_HOST_DEVICE bool is_patch(const Patches& p, int64_t id) { return id >= 0 && id < patch_count(p); }

// A grid has fewer than 2^32 patches and a patch as few pixels, and 32 bits divide several times faster. What has one
// frame need not pay for it.
struct RowOfFrame {
  uint32_t frame, row;
};
SSLOPS_HOST_DEVICE RowOfFrame in_frame(uint32_t row, int64_t frames, int64_t height) {
  const uint32_t frame = frames > 1 ? row / static_cast<uint32_t>(height) : 0;
  return {frame, row - frame * static_cast<uint32_t>(height)};
}

// Where the first pixel of a patch is.
SSLOPS_HOST_DEVICE int64_t corner(const Patches& p, int64_t image, int64_t id) {
  const uint32_t k = static_cast<uint32_t>(id), width = static_cast<uint32_t>(p.grid_width);
  const RowOfFrame at = in_frame(k / width, p.grid_frames, p.grid_height);
  return image * p.image_stride + at.frame * p.frames * p.frame_stride + at.row * p.height * p.row_stride +
         k % width * p.width * p.pixel_stride;
}

struct Place {
  int64_t channel, offset;
};

// Value e of a patch in `layout`: its channel, and where it is from the corner.
SSLOPS_HOST_DEVICE Place place(const Patches& p, Layout layout, int64_t e) {
  const uint32_t k = static_cast<uint32_t>(e), width = static_cast<uint32_t>(p.width);
  const uint32_t channels = static_cast<uint32_t>(p.channels), area = static_cast<uint32_t>(patch_area(p));
  const uint32_t channel = layout == Layout::chw ? k / area : k % channels;
  const uint32_t pixel = layout == Layout::chw ? k % area : k / channels;
  const RowOfFrame at = in_frame(pixel / width, p.frames, p.height);
  return {channel, channel * p.channel_stride + at.frame * p.frame_stride + at.row * p.row_stride +
                       pixel % width * p.pixel_stride};
}

}  // namespace sslops
