// Finds accesses to the same byte that nothing orders, at least one of them a write.
//
// Time is cut into epochs: a block's start and each of its block-wide barriers begin a new one.
// Within an epoch only __syncwarp orders accesses, kept as a vector clock over the lanes of each
// warp. Between the blocks of a launch, a write is ordered before a later access by another block
// if the writing block has executed __threadfence since (how the reader learns of it is not
// checked); atomics are ordered against each other, and before what other blocks do later.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace cuda_emulation {

enum class Access { kRead, kWrite, kAtomic };

// What is remembered of a byte; zero means never accessed.
struct History {
  uint32_t write_epoch;
  uint32_t write_clock;
  uint32_t read_epoch;
  uint32_t read_clock;
  uint32_t readers;        // lanes of reading_warp, not ordered before one another
  uint32_t foreign_reads;  // the launch, if another of its blocks has read
  uint16_t writer;
  uint16_t reading_warp;  // kSeveral for more than one
  uint32_t atomic;        // whether the last write was; 32 bits leave no padding
};

class Races {
 public:
  void start_launch() {
    launch_epoch_ = epoch_ + 1;
    fences_.clear();
  }
  void start_block(size_t threads);
  void pass_block_barrier() { ++epoch_; }
  void pass_warp_barrier(size_t warp, uint32_t mask);
  void pass_fence() { fences_.back().fence = epoch_; }

  // Null, or what the access is in conflict with. Shared memory is another one for each block.
  const char* check(History& history, size_t thread, Access access, bool shared);

 private:
  static constexpr uint16_t kSeveral = 0xffff;

  struct Fence {
    uint32_t first;  // epoch of the block
    uint32_t fence;  // epoch of its last fence, or 0
  };

  uint32_t& clock(size_t thread, size_t lane) { return clocks_[thread][lane]; }
  bool is_ordered(size_t writer, uint32_t written, size_t thread) {
    return writer == thread || (writer / 32 == thread / 32 && clock(thread, writer % 32) > written);
  }
  bool is_of_another_block(uint32_t epoch) const {
    return epoch >= launch_epoch_ && epoch < block_epoch_;
  }
  bool is_fenced(uint32_t epoch) const;
  void add_reader(History& history, size_t thread);

  uint32_t epoch_ = 0;
  uint32_t launch_epoch_ = 0;
  uint32_t block_epoch_ = 0;
  std::vector<std::array<uint32_t, 32>> clocks_;
  std::vector<Fence> fences_;  // per block of the launch, in the order they ran
};

}  // namespace cuda_emulation
