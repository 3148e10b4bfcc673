// Runs one broken kernel: a program, as sanitizers end the process that they find at fault.

#include <cstdio>
#include <cstdlib>
#include <cstring>

extern "C" {
void* emulation_allocate(const char* name, size_t bytes, size_t offset, bool writable);
const char* run_kernel(const char* name, bool mended, const float* x, float* y, int n);
}

// main KERNEL mended|broken N
int main(int, char** arguments) {
  const int n = std::atoi(arguments[3]);
  auto* x = static_cast<float*>(emulation_allocate("x", n * sizeof(float), 0, false));
  auto* y = static_cast<float*>(emulation_allocate("y", n * sizeof(float), 0, true));
  std::memset(x, 0, n * sizeof(float));
  std::memset(y, 0, n * sizeof(float));
  const char* message = run_kernel(arguments[1], std::strcmp(arguments[2], "mended") == 0, x, y, n);
  if (message) std::fprintf(stderr, "%s\n", message);
  return message ? 1 : 0;
}
