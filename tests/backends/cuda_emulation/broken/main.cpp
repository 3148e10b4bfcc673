// Runs one broken kernel: a program, as sanitizers end the process that they find at fault.

#include <cstdio>
#include <cstdlib>
#include <cstring>

extern "C" {
void* emulation_allocate(const char* name, size_t bytes, size_t offset, bool writable);
void emulation_set_order(int order, unsigned seed);
const char* run_kernel(const char* name, bool mended, const float* x, float* y, int n);
}

// main KERNEL mended|broken N ORDER: prints y for x = 0, 1, ..., N - 1.
int main(int, char** arguments) {
  const int n = std::atoi(arguments[3]);
  auto* x = static_cast<float*>(emulation_allocate("x", n * sizeof(float), 0, false));
  auto* y = static_cast<float*>(emulation_allocate("y", n * sizeof(float), 0, true));
  for (int i = 0; i < n; ++i) x[i] = float(i);
  std::memset(y, 0, n * sizeof(float));
  emulation_set_order(std::atoi(arguments[4]), 1);
  const char* message = run_kernel(arguments[1], std::strcmp(arguments[2], "mended") == 0, x, y, n);
  if (message) std::fprintf(stderr, "%s\n", message);
  for (int i = 0; i < n; ++i) std::printf("%g\n", y[i]);
  return message ? 1 : 0;
}
