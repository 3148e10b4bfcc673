#include "memory.h"

#include <link.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <sstream>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

extern "C" {
// build.py gives this address the name of every `extern __shared__` array of the kernels.
extern __thread char cuda_emulation_dynamic_shared[];
}

namespace cuda_emulation {
namespace {

// Pages that nobody touches cost nothing.
Memory<History> make_histories(size_t bytes) {
  auto* memory = static_cast<History*>(std::calloc(std::max<size_t>(bytes, 1), sizeof(History)));
  if (!memory) throw std::bad_alloc();
  return Memory<History>(memory);
}

struct Segments {
  uintptr_t within;
  std::vector<std::pair<uintptr_t, size_t>> loaded;
  uintptr_t thread_local_begin;
  size_t thread_local_bytes;
};

int collect_segments(dl_phdr_info* library, size_t, void* opaque) {
  auto& segments = *static_cast<Segments*>(opaque);
  bool mine = false;
  for (int i = 0; i < library->dlpi_phnum; ++i) {
    const ElfW(Phdr) & header = library->dlpi_phdr[i];
    const uintptr_t begin = library->dlpi_addr + header.p_vaddr;
    if (header.p_type == PT_LOAD) mine |= segments.within - begin < header.p_memsz;
  }
  if (!mine) return 0;
  for (int i = 0; i < library->dlpi_phnum; ++i) {
    const ElfW(Phdr) & header = library->dlpi_phdr[i];
    if (header.p_type == PT_LOAD) {
      segments.loaded.emplace_back(library->dlpi_addr + header.p_vaddr, header.p_memsz);
    } else if (header.p_type == PT_TLS) {
      segments.thread_local_begin = reinterpret_cast<uintptr_t>(library->dlpi_tls_data);
      segments.thread_local_bytes = header.p_memsz;
    }
  }
  return 1;
}

const Segments& segments() {
  static const Segments found = [] {
    // The segment exists once one of its variables has been used.
    *const_cast<volatile char*>(cuda_emulation_dynamic_shared) = 0;
    Segments segments{};
    segments.within = reinterpret_cast<uintptr_t>(&collect_segments);
    dl_iterate_phdr(collect_segments, &segments);
    return segments;
  }();
  return found;
}

}  // namespace

void Free::operator()(void* memory) const { std::free(memory); }

SharedMemory::SharedMemory()
    : begin_(segments().thread_local_begin),
      dynamic_(reinterpret_cast<uintptr_t>(cuda_emulation_dynamic_shared)),
      bytes_(segments().thread_local_bytes),
      histories_(make_histories(bytes_)) {}

void SharedMemory::start_launch(size_t dynamic_bytes) {
  dynamic_bytes_ = dynamic_bytes;
#ifdef __SANITIZE_ADDRESS__
  char* dynamic = reinterpret_cast<char*>(dynamic_);
  __asan_unpoison_memory_region(dynamic, kMaxSharedBytes);
  __asan_poison_memory_region(dynamic + dynamic_bytes, kMaxSharedBytes - dynamic_bytes);
#endif
}

void SharedMemory::start_block(size_t dynamic_bytes) {
  auto* begin = reinterpret_cast<char*>(begin_);
  const size_t before = dynamic_ - begin_, after = bytes_ - before - kMaxSharedBytes;
  std::memset(begin, 0xff, before + dynamic_bytes);
  std::memset(begin + before + kMaxSharedBytes, 0xff, after);
}

bool SharedMemory::allows(uintptr_t address, size_t bytes) const {
  const uintptr_t end = address + bytes;
  if (end > begin_ + bytes_) return false;
  if (end <= dynamic_ || address >= dynamic_ + kMaxSharedBytes) return true;
  return address >= dynamic_ && end <= dynamic_ + dynamic_bytes_;
}

void* GlobalMemory::allocate(const std::string& name, size_t bytes, size_t offset, bool writable) {
  // cudaMalloc's alignment. The end is exact, which is where AddressSanitizer looks.
  void* memory = nullptr;
  if (posix_memalign(&memory, 256, std::max<size_t>(offset + bytes, 1)) != 0) {
    throw std::bad_alloc();
  }
  auto buffer = std::make_unique<Buffer>();
  buffer->name = name;
  buffer->address = reinterpret_cast<uintptr_t>(memory) + offset;
  buffer->bytes = bytes;
  buffer->writable = writable;
  buffer->memory.reset(static_cast<char*>(memory));
  buffer->histories = make_histories(bytes);
  const auto place = std::upper_bound(
      buffers_.begin(), buffers_.end(), buffer->address,
      [](uintptr_t address, const auto& other) { return address < other->address; });
  return reinterpret_cast<void*>((*buffers_.insert(place, std::move(buffer)))->address);
}

void GlobalMemory::release_all() {
  buffers_.clear();
  last_ = nullptr;
}

Buffer* GlobalMemory::find(uintptr_t address) {
  if (last_ && address - last_->address < last_->bytes) return last_;
  const auto after =
      std::upper_bound(buffers_.begin(), buffers_.end(), address,
                       [](uintptr_t a, const auto& buffer) { return a < buffer->address; });
  if (after == buffers_.begin()) return nullptr;
  Buffer* found = (after - 1)->get();
  if (address - found->address >= found->bytes) return nullptr;
  return last_ = found;
}

const Buffer* GlobalMemory::nearest(uintptr_t address) const {
  const Buffer* nearest = nullptr;
  uintptr_t least = uintptr_t(1) << 20;
  for (const auto& buffer : buffers_) {
    const uintptr_t end = buffer->address + buffer->bytes;
    const uintptr_t distance = address < buffer->address ? buffer->address - address
                               : address < end           ? 0
                                                         : address - end;
    if (distance < least) {
      least = distance;
      nearest = buffer.get();
    }
  }
  return nearest;
}

void GlobalMemory::end_launch(const std::string& kernel) {
  for (const auto& buffer : buffers_) {
    const Traffic traffic = std::exchange(buffer->traffic, {});
    if (traffic.loaded == 0 && traffic.stored == 0) continue;
    Traffic& sum = traffic_[{kernel, buffer->name}];
    sum.loaded += traffic.loaded;
    sum.stored += traffic.stored;
  }
}

std::string GlobalMemory::traffic_json() const {
  std::ostringstream json;
  const char* separator = "[";
  for (const auto& [key, traffic] : traffic_) {
    json << separator << R"({"kernel": ")" << key.first << R"(", "buffer": ")" << key.second
         << R"(", "loaded": )" << traffic.loaded << R"(, "stored": )" << traffic.stored << "}";
    separator = ", ";
  }
  json << (traffic_.empty() ? "[]" : "]");
  return json.str();
}

bool is_in_library(uintptr_t address) {
  for (const auto& [begin, bytes] : segments().loaded) {
    if (address - begin < bytes) return true;
  }
  return false;
}

}  // namespace cuda_emulation
