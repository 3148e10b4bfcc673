// __half and its conversions, as cuda_fp16.h has them. Arithmetic is done in float.

#pragma once

#include "cuda_runtime.h"

namespace cuda_emulation {

// Round to nearest even. Adding a power of two leaves the wanted bits at the end of the sum's
// mantissa, rounded by the addition itself.
inline uint16_t half_of_float(float value) {
  const uint16_t sign = bits_as<uint32_t>(value) >> 16 & 0x8000;
  if (value != value) return 0x7fff;
  const float size = std::fabs(value);
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size < 0x1p-14f) {  // subnormal: units of 2^-24
    return sign | uint16_t(bits_as<uint32_t>(size + 0.5f) - bits_as<uint32_t>(0.5f));
  }
  const uint32_t word = bits_as<uint32_t>(size);
  const uint32_t rounded = word + 0x0fff + (word >> 13 & 1);
  return sign | uint16_t((rounded >> 13) - (112u << 10));
}

inline float float_of_half(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16;
  const uint32_t exponent = half >> 10 & 0x1f, mantissa = half & 0x3ff;
  if (exponent == 0) {
    const float size = float(mantissa) * 0x1p-24f;
    return bits_as<float>(sign | bits_as<uint32_t>(size));
  }
  const uint32_t biased = exponent == 0x1f ? 0xff : exponent + 112;
  return bits_as<float>(sign | biased << 23 | mantissa << 13);
}

}  // namespace cuda_emulation

struct __align__(2) __half {
  __half() = default;
  __half(float value) : bits(cuda_emulation::half_of_float(value)) {}
  operator float() const { return cuda_emulation::float_of_half(bits); }

  uint16_t bits;
};

struct __align__(4) __half2 {
  __half x, y;
};

using half = __half;
using half2 = __half2;

inline __half __float2half(float x) { return x; }
inline __half __float2half_rn(float x) { return x; }
inline float __half2float(__half x) { return x; }
inline __half2 __floats2half2_rn(float x, float y) { return {x, y}; }
inline __half2 __float22half2_rn(float2 v) { return {v.x, v.y}; }
inline __half2 __halves2half2(__half x, __half y) { return {x, y}; }
inline float2 __half22float2(__half2 v) { return {v.x, v.y}; }
inline float __low2float(__half2 v) { return v.x; }
inline float __high2float(__half2 v) { return v.y; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short bits) {
  __half x;
  x.bits = bits;
  return x;
}
