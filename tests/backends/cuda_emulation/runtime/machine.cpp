#include "machine.h"

#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <sstream>
#include <stdexcept>

namespace cuda_emulation {
namespace {

std::ostream& operator<<(std::ostream& out, uint3 v) {
  return out << "(" << v.x << ", " << v.y << ", " << v.z << ")";
}

std::ostream& operator<<(std::ostream& out, Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return out << site.what << " of " << (slash ? slash + 1 : site.file) << ":" << site.line;
}

bool is_same(Site a, Site b) {
  return a.line == b.line && std::strcmp(a.what, b.what) == 0 && std::strcmp(a.file, b.file) == 0;
}

const char* verb(Access access) {
  return access == Access::kRead ? "read" : access == Access::kWrite ? "write" : "atomic";
}

uint3 unflatten(size_t index, dim3 shape) {
  return {unsigned(index % shape.x), unsigned(index / shape.x % shape.y),
          unsigned(index / shape.x / shape.y)};
}

size_t count(dim3 shape) { return size_t(shape.x) * shape.y * shape.z; }

// name<template arguments>, without namespace and parameters.
std::string name_kernel(const void* kernel) {
  Dl_info symbol{};
  if (!dladdr(kernel, &symbol) || !symbol.dli_sname) return "unnamed kernel";
  const std::unique_ptr<char, decltype(&std::free)> demangled(
      abi::__cxa_demangle(symbol.dli_sname, nullptr, nullptr, nullptr), &std::free);
  const std::string full = demangled ? demangled.get() : symbol.dli_sname;
  size_t begin = 0, at = 0;
  for (int depth = 0; at < full.size() && (depth > 0 || full[at] != '('); ++at) {
    depth += (full[at] == '<') - (full[at] == '>');
    if (depth == 0 && (full[at] == ' ' || full[at] == ':')) begin = at + 1;
  }
  return full.substr(begin, at - begin);
}

}  // namespace

Machine::Machine() : fibres_(&Machine::run_thread) {}

Machine& Machine::instance() {
  static Machine machine;
  return machine;
}

void Machine::run_thread() {
  Machine& self = instance();
  self.launch_->run_thread(self.launch_->call);
  const size_t me = self.fibres_.current();
  self.threads_[me].state = State::kExited;
  self.schedule.set_ready(me, false);
}

void Machine::check_launch(const Launch& launch) const {
  std::ostringstream what;
  const size_t threads = count(launch.block), shared = launch.dynamic_shared;
  const auto asked = dynamic_shared_.find(launch.kernel);
  const size_t allowed = asked == dynamic_shared_.end() ? 48 * 1024 : asked->second;
  if (threads == 0 || threads > 1024 || launch.block.z > 64) {
    what << "block " << uint3(launch.block) << ": expected 1 to 1024 threads, at most 64 in z";
  } else if (count(launch.grid) == 0 || launch.grid.x > 0x7fffffff || launch.grid.y > 65535 ||
             launch.grid.z > 65535) {
    what << "grid " << uint3(launch.grid) << ": expected 1 to (2147483647, 65535, 65535) blocks";
  } else if (shared > allowed) {
    what << "dynamic shared memory of " << shared << " bytes: expected at most " << allowed
         << " of this kernel's cudaFuncAttributeMaxDynamicSharedMemorySize";
  } else if (launch.argument_bytes > 4096) {
    what << "arguments of " << launch.argument_bytes << " bytes: expected at most 4096";
  }
  if (!what.str().empty()) throw std::runtime_error(kernel_ + ": " + what.str());
}

void Machine::run(const Launch& launch) {
  kernel_ = name_kernel(launch.kernel);
  check_launch(launch);
  launch_ = &launch;
  failure_.reset();
  const size_t threads = count(launch.block);
  fibres_.provide(threads);
  threads_.resize(threads);
  shared_.start_launch(launch.dynamic_shared);
  races_.start_launch();
  for (const size_t block : schedule.order_blocks(count(launch.grid))) {
    block_index_ = unflatten(block, launch.grid);
    run_block();
    if (failure_) break;
  }
  launch_ = nullptr;
  global.end_launch(kernel_);
  if (failure_) {
    fibres_.discard();
    throw std::runtime_error(*failure_);
  }
}

bool Machine::allow_dynamic_shared(const void* kernel, size_t bytes) {
  if (bytes > kMaxSharedBytes) return false;
  dynamic_shared_[kernel] = bytes;
  return true;
}

void Machine::run_block() {
  const size_t threads = threads_.size();
  for (size_t i = 0; i < threads; ++i) {
    threads_[i] = {unflatten(i, launch_->block), State::kReady, {}, 0, nullptr, false};
  }
  arrived_ = 0;
  votes_ = 0;
  waiting_lanes_.assign((threads + 31) / 32, 0);
  shared_.start_block(launch_->dynamic_shared);
  races_.start_block(threads);
  schedule.start_block(threads);
  while (!schedule.empty()) {
    const size_t next = schedule.pick();
    running_ = true;
    fibres_.resume(next);
    running_ = false;
    if (failure_) return;
  }
  for (const Thread& thread : threads_) {
    if (thread.state != State::kExited) failure_ = describe_divergence();
  }
}

void Machine::wait(State state, Site site) {
  const size_t me = fibres_.current();
  threads_[me].state = state;
  threads_[me].site = site;
  schedule.set_ready(me, false);
  fibres_.suspend();
}

void Machine::release(size_t thread) {
  threads_[thread].state = State::kReady;
  schedule.set_ready(thread, true);
}

int Machine::meet_block(bool predicate, Site site) {
  running_ = false;
  const size_t me = fibres_.current();
  if (arrived_ == 0) {
    first_at_barrier_ = me;
  } else if (!is_same(threads_[first_at_barrier_].site, site)) {
    fail_diverged("barrier", site, first_at_barrier_);
  }
  votes_ += predicate;
  if (++arrived_ == threads_.size()) {
    block_votes_ = std::exchange(votes_, 0);
    arrived_ = 0;
    races_.pass_block_barrier();
    for (size_t i = 0; i < threads_.size(); ++i) release(i);
    // So that whoever arrives last does not always go on first.
    fibres_.suspend();
  } else {
    wait(State::kAtBlockBarrier, site);
  }
  running_ = true;
  return block_votes_;
}

void Machine::meet_warp(unsigned mask, void* data, Combine combine, bool orders_memory, Site site) {
  running_ = false;
  const size_t me = fibres_.current(), warp = me / 32, first = warp * 32;
  if (!(mask >> me % 32 & 1)) fail_mask(site, mask, "leaves out the calling lane");
  if (first + 32 > threads_.size() && mask >> (threads_.size() - first) != 0) {
    fail_mask(site, mask, "names lanes that the block lacks");
  }
  threads_[me].mask = mask;
  threads_[me].data = data;
  uint32_t& waiting = waiting_lanes_[warp];
  if (((waiting | 1u << me % 32) & mask) != mask) {
    waiting |= 1u << me % 32;
    wait(State::kInWarp, site);
    running_ = true;
    return;
  }
  void* lanes[32] = {};
  for (size_t lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const Thread& other = threads_[first + lane];
    if (first + lane != me && (other.mask != mask || !is_same(other.site, site))) {
      fail_diverged("warp", site, first + lane);
    }
    lanes[lane] = other.data;
  }
  if (combine) combine(lanes, mask);
  if (orders_memory) races_.pass_warp_barrier(warp, mask);
  waiting &= ~mask;
  for (size_t lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) release(first + lane);
  }
  fibres_.suspend();
  running_ = true;
}

void Machine::fail_mask(Site site, unsigned mask, const char* why) {
  std::ostringstream what;
  what << site << ": its mask 0x" << std::hex << mask << " " << why;
  fail(what.str());
}

void Machine::fail_diverged(const char* where, Site site, size_t other) {
  std::ostringstream what;
  what << "divergent " << where << ": waits at " << site << ", thread " << threads_[other].index
       << " at " << threads_[other].site;
  if (is_same(site, threads_[other].site)) what << " with another mask";
  fail(what.str());
}

void Machine::fail(const std::string& what) {
  running_ = false;
  std::ostringstream message;
  message << kernel_ << ", block " << block_index_ << ", thread "
          << threads_[fibres_.current()].index << ": " << what;
  failure_ = message.str();
  fibres_.abandon();
}

std::string Machine::describe_divergence() const {
  std::ostringstream message;
  message << kernel_ << ", block " << block_index_ << ": ";
  const Thread* exited = nullptr;
  const Thread* waiting = nullptr;
  const Thread* elsewhere = nullptr;
  for (const Thread& thread : threads_) {
    if (thread.state == State::kExited) {
      exited = &thread;
    } else if (!waiting) {
      waiting = &thread;
    } else if (!is_same(thread.site, waiting->site)) {
      elsewhere = &thread;
    }
  }
  const bool block = waiting->state == State::kAtBlockBarrier;
  message << (block ? "divergent barrier" : "divergent warp") << ": thread " << waiting->index
          << " waits at " << waiting->site;
  if (elsewhere) {
    message << ", thread " << elsewhere->index << " at " << elsewhere->site;
  } else if (exited) {
    message << ", thread " << exited->index << " has exited";
  }
  return message.str();
}

void Machine::access(uintptr_t address, size_t bytes, Access access) {
  if (fibres_.on_stack_of(fibres_.current(), address)) return;
  if (shared_.contains(address)) {
    if (!shared_.allows(address, bytes))
      fail("out of bounds: past the end of dynamic shared memory");
    check_race(shared_.histories(address), bytes, access, nullptr);
    return;
  }
  if (Buffer* buffer = global.find(address)) {
    const size_t at = address - buffer->address;
    if (at + bytes <= buffer->bytes) {
      if (access != Access::kRead && !buffer->writable) fail("writes to " + buffer->name);
      if (access != Access::kWrite) buffer->traffic.loaded += bytes;
      if (access != Access::kRead) buffer->traffic.stored += bytes;
      check_race(&buffer->histories[at], bytes, access, buffer);
      return;
    }
  }
  const bool argument = address - reinterpret_cast<uintptr_t>(launch_->call) < launch_->call_bytes;
  if (access == Access::kRead && (argument || is_in_library(address))) return;
  std::ostringstream what;
  what << "out of bounds: " << verb(access) << " of " << bytes << " bytes";
  if (const Buffer* near = global.nearest(address)) {
    what << " at byte " << static_cast<intptr_t>(address - near->address) << " of " << near->name
         << ", which has " << near->bytes;
  } else {
    what << " at an address that is in no buffer";
  }
  fail(what.str());
}

void Machine::check_race(History* histories, size_t bytes, Access access, const Buffer* buffer) {
  History before{};
  for (size_t i = 0; i < bytes; ++i) {
    // The bytes of an element mostly share their history.
    if (i > 0 && std::memcmp(&histories[i], &before, sizeof(before)) == 0) {
      histories[i] = histories[i - 1];
      continue;
    }
    before = histories[i];
    const char* conflict = races_.check(histories[i], fibres_.current(), access, !buffer);
    if (conflict) {
      const std::string where = buffer ? buffer->name : "shared memory";
      fail(std::string("race: ") + verb(access) + " of " + where + " after " + conflict);
    }
  }
}

// ---- what kernels call --------------------------------------------------------------------------

uint3 thread_index() { return Machine::instance().thread_index(); }
uint3 block_index() { return Machine::instance().block_index(); }
dim3 block_dim() { return Machine::instance().launch().block; }
dim3 grid_dim() { return Machine::instance().launch().grid; }
unsigned lane() { return static_cast<unsigned>(Machine::instance().thread() % 32); }
void fail(const char* what) { Machine::instance().fail(what); }
int meet_block(bool predicate, Site site) {
  return Machine::instance().meet_block(predicate, site);
}
void meet_warp(unsigned mask, void* data, Combine combine, bool orders_memory, Site site) {
  Machine::instance().meet_warp(mask, data, combine, orders_memory, site);
}
void note_atomic(const void* address, size_t bytes) {
  Machine::instance().access(reinterpret_cast<uintptr_t>(address), bytes, Access::kAtomic);
}
void note_fence() { Machine::instance().pass_fence(); }
bool allow_dynamic_shared(const void* kernel, size_t bytes) {
  return Machine::instance().allow_dynamic_shared(kernel, bytes);
}
void run(const Launch& launch) { Machine::instance().run(launch); }

}  // namespace cuda_emulation
