// Uniform draws that are functions of seed, step and place: draw_uniform of gls_fused/reference.py.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define GLS_FUSED_ANYWHERE __host__ __device__
#else
#define GLS_FUSED_ANYWHERE
#endif

namespace gls_fused {
#ifdef CPU_CAPABILITY
inline namespace CPU_CAPABILITY {
#endif

// The finalizer of MurmurHash3.
GLS_FUSED_ANYWHERE inline uint32_t mix_bits(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
  x = (x ^ (x >> 13)) * 0xC2B2AE35u;
  return x ^ (x >> 16);
}

// In [0, 1), with 24 bits.
GLS_FUSED_ANYWHERE inline float draw_uniform(uint32_t seed, uint32_t step, int64_t place) {
  const uint32_t low = static_cast<uint32_t>(place), high = static_cast<uint32_t>(place >> 32);
  const uint32_t key = mix_bits(mix_bits(seed + 0x9E3779B9u * step) + high);
  return static_cast<float>(mix_bits(mix_bits(low ^ key) + key) >> 8) * 0x1p-24f;
}

#ifdef CPU_CAPABILITY
}  // namespace CPU_CAPABILITY
#endif
}  // namespace gls_fused
