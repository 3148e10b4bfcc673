// What a kernel may access: global buffers of their exact size, the block's shared memory, and the
// count of what it moves.

#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "races.h"

namespace cuda_emulation {

// Of a device of compute capability 9.0, as of 10.0.
constexpr size_t kMaxSharedBytes = 227 * 1024;

struct Traffic {
  uint64_t loaded = 0, stored = 0;  // bytes
};

struct Free {
  void operator()(void* memory) const;
};
template <typename T>
using Memory = std::unique_ptr<T[], Free>;

struct Buffer {
  std::string name;
  uintptr_t address;
  size_t bytes;
  bool writable;
  Memory<char> memory;
  Memory<History> histories;  // one per byte
  Traffic traffic;            // of the running launch
};

// The library's thread-local segment is its shared memory: the static arrays of all kernels, and
// `dynamic`, which the kernels' `extern __shared__` stand for.
class SharedMemory {
 public:
  SharedMemory();

  // Poisons all of it: every float, of any width, is a NaN.
  void start_block(size_t dynamic_bytes);
  void start_launch(size_t dynamic_bytes);

  bool contains(uintptr_t address) const { return address - begin_ < bytes_; }
  // Whether an access is inside, or runs past the end of the dynamic part.
  bool allows(uintptr_t address, size_t bytes) const;
  History* histories(uintptr_t address) { return &histories_[address - begin_]; }
  size_t static_bytes() const { return bytes_ - kMaxSharedBytes; }

 private:
  uintptr_t begin_, dynamic_;
  size_t bytes_, dynamic_bytes_ = 0;
  Memory<History> histories_;
};

class GlobalMemory {
 public:
  // `offset`: bytes by which the address misses a multiple of 256.
  void* allocate(const std::string& name, size_t bytes, size_t offset, bool writable);
  void release_all();

  Buffer* find(uintptr_t address);
  // The buffer that an invalid address was most likely meant for, or null.
  const Buffer* nearest(uintptr_t address) const;

  void end_launch(const std::string& kernel);
  void reset_traffic() { traffic_.clear(); }
  std::string traffic_json() const;

 private:
  std::vector<std::unique_ptr<Buffer>> buffers_;  // by address
  Buffer* last_ = nullptr;
  std::map<std::pair<std::string, std::string>, Traffic> traffic_;  // by kernel and buffer
};

// Whether an address is in this library's code, constants or variables.
bool is_in_library(uintptr_t address);

}  // namespace cuda_emulation
