// Which thread of a block runs next, and which block.

#pragma once

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <random>
#include <vector>

namespace cuda_emulation {

enum class Order {
  kForward,  // threads in turn
  kReverse,  // the same from the last to the first, blocks too
  kRandom,   // any thread, any block
  kWarps,    // a warp for as long as any of its threads can run
};

class Schedule {
 public:
  void set(Order order, unsigned seed) {
    order_ = order;
    random_.seed(seed);
  }

  std::vector<size_t> order_blocks(size_t count) {
    std::vector<size_t> blocks(count);
    std::iota(blocks.begin(), blocks.end(), size_t(0));
    if (order_ == Order::kReverse) std::reverse(blocks.begin(), blocks.end());
    if (order_ == Order::kRandom) std::shuffle(blocks.begin(), blocks.end(), random_);
    return blocks;
  }

  // All of the block's threads are ready.
  void start_block(size_t threads) {
    ready_.assign(threads, true);
    count_ = threads;
    last_ = order_ == Order::kReverse ? 0 : threads - 1;
  }

  void set_ready(size_t thread, bool ready) {
    if (ready_[thread] == ready) return;
    ready_[thread] = ready;
    count_ += ready ? 1 : -1;
  }

  bool empty() const { return count_ == 0; }

  size_t pick() {
    const size_t threads = ready_.size();
    if (order_ == Order::kRandom) {
      // Skips from any place to the next ready thread: not uniform, and need not be.
      last_ = random_() % threads;
      while (!ready_[last_]) last_ = (last_ + 1) % threads;
      return last_;
    }
    if (order_ == Order::kWarps) {
      const size_t first = last_ / 32 * 32, end = std::min(first + 32, threads);
      for (size_t thread = first; thread < end; ++thread) {
        if (ready_[thread]) return last_ = thread;
      }
      last_ = end - 1;
    }
    const size_t step = order_ == Order::kReverse ? threads - 1 : 1;
    do {
      last_ = (last_ + step) % threads;
    } while (!ready_[last_]);
    return last_;
  }

 private:
  Order order_ = Order::kForward;
  std::mt19937 random_;
  std::vector<char> ready_;
  size_t count_ = 0;
  size_t last_ = 0;
};

}  // namespace cuda_emulation
