#include <emulation/driver.h>

#include "samples.cuh"

using cuda_emulation::guarded;

EMULATED add(const float* x, const float* y, float* z, int64_t n) {
  const auto blocks = static_cast<unsigned>((n + 4 * 64 - 1) / (4 * 64));
  return guarded([&] { samples::add_kernel<<<blocks, 64, 0, nullptr>>>(x, y, z, n); });
}

EMULATED sum(const float* x, float* sums, int64_t n, int blocks) {
  return guarded([&] { samples::sum_kernel<96><<<blocks, 96, 0, nullptr>>>(x, sums, n); });
}

EMULATED sum_once(const float* x, float* partial, unsigned* finished, float* total, int64_t n,
                  int blocks) {
  return guarded([&] {
    samples::sum_once_kernel<<<blocks, 40, 0, nullptr>>>(x, partial, finished, total, n);
  });
}

EMULATED multiply(const float* a, const float* b, float* c, int m, int n, int k) {
  constexpr int kTile = 8;
  const dim3 grid((n + kTile - 1) / kTile, (m + kTile - 1) / kTile), block(kTile, kTile);
  return guarded([&] {
    samples::multiply_kernel<kTile>
        <<<grid, block, 2 * kTile * kTile * sizeof(float), nullptr>>>(a, b, c, m, n, k);
  });
}

// dtype: 0 bfloat16, 1 float16, 2 float32 as tf32.
EMULATED multiply_on_tensor_cores(int dtype, const void* a, const void* b, float* c, int n, int k) {
  using nvcuda::wmma::precision::tf32;
  const auto run = [&](auto kernel, auto element) {
    using T = decltype(element);
    kernel<<<n / 16, 32, 0, nullptr>>>(static_cast<const T*>(a), static_cast<const T*>(b), c, n, k);
  };
  return guarded([&] {
    if (dtype == 0) {
      run(samples::tensor_core_kernel<__nv_bfloat16, __nv_bfloat16, 16>, __nv_bfloat16());
    } else if (dtype == 1) {
      run(samples::tensor_core_kernel<__half, __half, 16>, __half());
    } else {
      run(samples::tensor_core_kernel<tf32, float, 8>, float());
    }
  });
}

// half: float16, otherwise bfloat16; widen: from it to float32, otherwise back.
EMULATED convert(bool half, bool widen, const void* from, void* to, int64_t n) {
  const auto blocks = static_cast<unsigned>((n + 127) / 128);
  const auto run = [&](auto narrow) {
    using T = decltype(narrow);
    if (widen) {
      samples::convert_kernel<T, float>
          <<<blocks, 128, 0, nullptr>>>(static_cast<const T*>(from), static_cast<float*>(to), n);
    } else {
      samples::convert_kernel<float, T>
          <<<blocks, 128, 0, nullptr>>>(static_cast<const float*>(from), static_cast<T*>(to), n);
    }
  };
  return guarded([&] { half ? run(__half()) : run(__nv_bfloat16()); });
}

EMULATED use_warp(unsigned votes, int* results) {
  return guarded([&] { samples::warp_kernel<<<1, 32, 0, nullptr>>>(votes, results); });
}

EMULATED rotate(const int* x, int* y) {
  return guarded([&] { samples::rotate_kernel<<<1, 64, 0, nullptr>>>(x, y); });
}
