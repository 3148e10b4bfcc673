#include "races.h"

#include <algorithm>

namespace cuda_emulation {

void Races::start_block(size_t threads) {
  block_epoch_ = ++epoch_;
  fences_.push_back({epoch_, 0});
  clocks_.assign(threads, {});
}

void Races::pass_warp_barrier(size_t warp, uint32_t mask) {
  std::array<uint32_t, 32> joined{};
  for (size_t lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    std::array<uint32_t, 32>& mine = clocks_[warp * 32 + lane];
    ++mine[lane];
    for (size_t i = 0; i < 32; ++i) joined[i] = std::max(joined[i], mine[i]);
  }
  for (size_t lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) clocks_[warp * 32 + lane] = joined;
  }
}

bool Races::is_fenced(uint32_t epoch) const {
  const auto after = std::upper_bound(fences_.begin(), fences_.end(), epoch,
                                      [](uint32_t e, const Fence& f) { return e < f.first; });
  return (after - 1)->fence >= epoch;
}

void Races::add_reader(History& history, size_t thread) {
  const auto warp = static_cast<uint16_t>(thread / 32);
  const uint32_t now = clock(thread, thread % 32);
  if (history.read_epoch != epoch_) {
    if (is_of_another_block(history.read_epoch)) history.foreign_reads = launch_epoch_;
    history.read_epoch = epoch_;
    history.reading_warp = warp;
    history.readers = 0;
    history.read_clock = now;
  }
  if (history.reading_warp != warp) {
    history.reading_warp = kSeveral;
    return;
  }
  for (uint32_t lane = 0; lane < 32; ++lane) {
    if (clock(thread, lane) > history.read_clock) history.readers &= ~(1u << lane);
  }
  history.readers |= 1u << thread % 32;
  history.read_clock = std::max(history.read_clock, now);
}

const char* Races::check(History& history, size_t thread, Access access, bool shared) {
  const bool atomic = access == Access::kAtomic;
  if (history.write_epoch == epoch_) {
    if (!(atomic && history.atomic) && !is_ordered(history.writer, history.write_clock, thread)) {
      return "a write by another thread of the block";
    }
  } else if (!shared && is_of_another_block(history.write_epoch)) {
    if (!history.atomic && !is_fenced(history.write_epoch)) return "a write by another block";
  }
  if (access == Access::kRead) {
    add_reader(history, thread);
    return nullptr;
  }
  if (history.read_epoch == epoch_) {
    if (history.reading_warp == kSeveral) return "reads by several warps";
    for (size_t lane = 0; lane < 32; ++lane) {
      if (history.readers >> lane & 1 &&
          !is_ordered(history.reading_warp * size_t(32) + lane, history.read_clock, thread)) {
        return "a read by another thread of the block";
      }
    }
  }
  if (!shared &&
      (is_of_another_block(history.read_epoch) || history.foreign_reads == launch_epoch_)) {
    return "a read by another block";
  }
  history.write_epoch = epoch_;
  history.write_clock = clock(thread, thread % 32);
  history.writer = static_cast<uint16_t>(thread);
  history.atomic = atomic;
  return nullptr;
}

}  // namespace cuda_emulation
