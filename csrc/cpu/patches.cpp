// Some of the patches of images, which are the rows of a convolution: on the CPU, where torch's
// indexing takes ten times as long.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <optional>
#include <vector>

#include "../check.h"

namespace gls_fused {
inline namespace CPU_CAPABILITY {

using at::IntArrayRef;
using at::Tensor;

namespace {

constexpr int64_t kMaxAxes = 3;
// Below so many elements waking another thread takes longer than it saves.
constexpr int64_t kSerial = 1 << 15;

// One spatial dimension, of images, window and outputs. One that is not there has one pixel.
struct Axis {
  int64_t size = 1, pixel_stride = 0, kernel = 1, stride = 1, padding = 0, dilation = 1, out = 1;

  // Which pixel a tap of the window at an output is, as an offset; -1 outside and between pixels.
  int64_t locate(int64_t position, int64_t tap, bool transposed) const {
    int64_t at = position * stride - padding + tap * dilation;
    if (transposed) {
      const int64_t stuffed = position + padding - tap * dilation;
      if (stuffed < 0 || stuffed % stride) return -1;
      at = stuffed / stride;
    }
    return at < 0 || at >= size ? -1 : at * pixel_stride;
  }
};

struct Patches {
  std::array<Axis, kMaxAxes> axes;
  bool transposed;
  int64_t groups, channels, image_stride, channel_stride, taps, total;

  // The patch of an output, [channels, taps]; `offsets` holds as many as there are taps.
  template <typename T>
  void take(const T* images, int64_t place, std::vector<int64_t>& offsets, T* patch) const {
    std::array<int64_t, kMaxAxes> position;
    for (int64_t axis = kMaxAxes - 1; axis >= 0; --axis) {
      position[axis] = place % axes[axis].out;
      place /= axes[axis].out;
    }
    size_t next = 0;
    for (int64_t z = 0; z < axes[0].kernel; ++z) {
      const int64_t deep = axes[0].locate(position[0], z, transposed);
      for (int64_t y = 0; y < axes[1].kernel; ++y) {
        const int64_t down = axes[1].locate(position[1], y, transposed);
        for (int64_t x = 0; x < axes[2].kernel; ++x) {
          const int64_t across = axes[2].locate(position[2], x, transposed);
          const bool inside = deep >= 0 && down >= 0 && across >= 0;
          offsets[next++] = inside ? deep + down + across : -1;
        }
      }
    }
    const T* from = images + place / groups * image_stride +
                    place % groups * channels * channel_stride;
    if (taps == 1) {
      const int64_t only = offsets[0];
      for (int64_t c = 0; c < channels; ++c) {
        patch[c] = only < 0 ? T(0) : from[c * channel_stride + only];
      }
      return;
    }
    for (int64_t c = 0; c < channels; ++c, patch += taps, from += channel_stride) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        patch[tap] = offsets[tap] < 0 ? T(0) : from[offsets[tap]];
      }
    }
  }
};

Patches describe(const Tensor& images, IntArrayRef kernel_size, IntArrayRef stride,
                 IntArrayRef padding, IntArrayRef dilation,
                 const at::OptionalIntArrayRef& output_padding, int64_t groups) {
  const int64_t count = images.dim() - 2;
  TORCH_CHECK(count >= 1 && count <= kMaxAxes, "take_patches: expected images [N, c, ...] of 1 to ",
              kMaxAxes, " spatial dimensions, got ", images.sizes());
  for (const IntArrayRef part : {kernel_size, stride, padding, dilation}) {
    TORCH_CHECK(static_cast<int64_t>(part.size()) == count, "take_patches: expected ", count,
                " numbers each of kernel_size, stride, padding and dilation, got ", part);
  }
  TORCH_CHECK(!output_padding || static_cast<int64_t>(output_padding->size()) == count,
              "take_patches: expected ", count, " numbers of output_padding, got ",
              output_padding.value_or(IntArrayRef()));
  TORCH_CHECK(groups > 0 && images.size(1) % groups == 0, "take_patches: expected channels in ",
              groups, " equal groups, got ", images.size(1));
  Patches found{{}, output_padding.has_value(), groups, images.size(1) / groups,
                images.stride(0), images.stride(1), 1, images.size(0) * groups};
  for (int64_t i = 0; i < count; ++i) {
    Axis& axis = found.axes[kMaxAxes - count + i];
    axis = {images.size(2 + i), images.stride(2 + i), kernel_size[i], stride[i],
            padding[i], dilation[i], 0};
    TORCH_CHECK(axis.kernel > 0 && axis.stride > 0 && axis.dilation > 0,
                "take_patches: expected kernel_size, stride and dilation above 0, got ",
                kernel_size, ", ", stride, " and ", dilation);
    const int64_t span = axis.dilation * (axis.kernel - 1) + 1;
    axis.out = found.transposed
                   ? (axis.size - 1) * axis.stride - 2 * axis.padding + span + (*output_padding)[i]
                   : (axis.size + 2 * axis.padding - span) / axis.stride + 1;
    found.taps *= axis.kernel;
    found.total *= std::max<int64_t>(0, axis.out);
  }
  return found;
}

Tensor take_patches(const Tensor& images, IntArrayRef kernel_size, IntArrayRef stride,
                    IntArrayRef padding, IntArrayRef dilation,
                    at::OptionalIntArrayRef output_padding, int64_t groups, const Tensor& places) {
  const Patches patches =
      describe(images, kernel_size, stride, padding, dilation, output_padding, groups);
  check_device("take_patches", images, places);
  TORCH_CHECK(places.dim() == 1 && places.scalar_type() == at::kLong && places.is_contiguous(),
              "take_patches: expected contiguous places [n] of Long, got ", places.sizes(), " of ",
              places.scalar_type());
  const int64_t n = places.size(0), size = patches.channels * patches.taps;
  const Tensor found = at::empty({n, size}, images.options());
  const int64_t* where = places.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < n; ++i) {
    TORCH_CHECK(where[i] >= 0 && where[i] < patches.total, "take_patches: expected places in [0, ",
                patches.total, "), got ", where[i]);
  }
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, images.scalar_type(), "take_patches", [&] {
        const scalar_t* from = images.const_data_ptr<scalar_t>();
        scalar_t* to = found.data_ptr<scalar_t>();
        const int64_t grain = std::max<int64_t>(1, kSerial / std::max<int64_t>(1, size));
        at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
          std::vector<int64_t> offsets(patches.taps);
          for (int64_t i = begin; i < end; ++i) {
            patches.take(from, where[i], offsets, to + i * size);
          }
        });
      });
  return found;
}

}  // namespace
}  // namespace CPU_CAPABILITY

TORCH_LIBRARY_IMPL(gls_fused, CPU, m) { m.impl("take_patches", &take_patches); }

}  // namespace gls_fused
