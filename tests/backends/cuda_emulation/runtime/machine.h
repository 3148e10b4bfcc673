// Runs the threads of one block after the other, and judges what they do.

#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "../include/emulation/machine.h"
#include "fibres.h"
#include "memory.h"
#include "races.h"
#include "schedule.h"

namespace cuda_emulation {

class Machine {
 public:
  static Machine& instance();

  Schedule schedule;
  GlobalMemory global;

  void run(const Launch& launch);
  // Whether the device has as much; without it a kernel is given at most 48 KiB.
  bool allow_dynamic_shared(const void* kernel, size_t bytes);

  // The rest is called from within a kernel.
  const Launch& launch() const { return *launch_; }
  uint3 thread_index() const { return threads_[fibres_.current()].index; }
  uint3 block_index() const { return block_index_; }
  size_t thread() const { return fibres_.current(); }
  bool is_running() const { return running_; }

  int meet_block(bool predicate, Site site);
  void meet_warp(unsigned mask, void* data, Combine combine, bool orders_memory, Site site);
  void access(uintptr_t address, size_t bytes, Access access);
  void pass_fence() { races_.pass_fence(); }
  [[noreturn]] void fail(const std::string& what);

 private:
  enum class State { kReady, kAtBlockBarrier, kInWarp, kExited };

  struct Thread {
    uint3 index;
    State state;
    Site site;
    unsigned mask;
    void* data;
    bool predicate;
  };

  Machine();
  static void run_thread();
  void check_launch(const Launch& launch) const;
  void run_block();
  void wait(State state, Site site);
  void release(size_t thread);
  void check_race(History* histories, size_t bytes, Access access, const Buffer* buffer);
  [[noreturn]] void fail_mask(Site site, unsigned mask, const char* why);
  [[noreturn]] void fail_diverged(const char* where, Site site, size_t other);
  std::string describe_divergence() const;

  Fibres fibres_;
  SharedMemory shared_;
  Races races_;
  std::vector<Thread> threads_;
  std::map<const void*, size_t> dynamic_shared_;  // allowed to a kernel
  std::vector<uint32_t> waiting_lanes_;           // of each warp
  const Launch* launch_ = nullptr;
  std::string kernel_;
  uint3 block_index_{};
  size_t arrived_ = 0;  // at the block's barrier
  size_t first_at_barrier_ = 0;
  int votes_ = 0;
  int block_votes_ = 0;
  bool running_ = false;  // a thread of the kernel is
  std::optional<std::string> failure_;
};

}  // namespace cuda_emulation
