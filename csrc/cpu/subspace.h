// The parts of a gathering step's end, of one layer: see blend.cpp and core.cpp. Matrices are row-major,
// U and Z as [r, d].
#pragma once

#include <cstdint>

namespace gls_fused {
inline namespace CPU_CAPABILITY {

// mu is t / (kShift d), as SHIFT of gls_fused.reference has it.
constexpr int64_t kShift = 256;

template <typename T>
struct Estimate {
  int64_t d;
  int64_t r;
  const T* basis;
  const T* core;
  T trace;
  T samples;
  // [n, ||A||_F^2, Y'Y, (A'Y)']
  const T* sums;
};

// Z + mu S U, M + mu I, t and s.
template <typename T>
void blend(const Estimate<T>& from, double beta, T* sketch, T* core, T* trace, T* samples);

// U+ and M+, which still has mu, of Z and M.
template <typename T>
void refresh(const T* sketch, const T* core, int64_t r, int64_t d, T* basis, T* moved);

// C and lambda'^p of M, t and s, which may be infinite.
template <typename T>
void damp(const T* core, double trace, double samples, int64_t r, int64_t d, double damping,
            double power, T* inverse, T* shift);

}  // namespace CPU_CAPABILITY
}  // namespace gls_fused
