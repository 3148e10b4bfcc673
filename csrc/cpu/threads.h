// Work that threads share.
#pragma once

#include <ATen/Parallel.h>

#ifdef __SSE2__
#include <immintrin.h>
#endif

#include <cstdint>

namespace gls_fused {
inline namespace CPU_CAPABILITY {

// While it lives, its thread takes numbers below their dtype's normal range for 0. The momentum of a
// unit that has died ends there, as do the squares of a gradient below 1e-19, and an x86 CPU takes some
// hundred cycles for each. Elsewhere they cost nothing, and are kept.
class WithoutSubnormals {
 public:
#ifdef __SSE2__
  WithoutSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | kFlushResults | kZeroInputs); }
  ~WithoutSubnormals() { _mm_setcsr(before_); }
#else
  WithoutSubnormals() {}
#endif
  WithoutSubnormals(const WithoutSubnormals&) = delete;
  WithoutSubnormals& operator=(const WithoutSubnormals&) = delete;

#ifdef __SSE2__
 private:
  static constexpr unsigned kFlushResults = 0x8000, kZeroInputs = 0x0040;
  const unsigned before_;
#endif
};

// at::parallel_for of work on a model's numbers, whatever their size.
template <typename Body>
void share(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  at::parallel_for(begin, end, grain, [&](int64_t first, int64_t last) {
    const WithoutSubnormals normal;
    body(first, last);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace gls_fused
