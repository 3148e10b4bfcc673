// Barriers, shuffles and votes.

#pragma once

#include <cstring>

#include "machine.h"

// The caller's line, so that two barriers in one function are two sites.
#define CUDA_EMULATION_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

inline void __syncthreads(CUDA_EMULATION_HERE) {
  cuda_emulation::meet_block(false, {"__syncthreads", file, line});
}
inline int __syncthreads_count(int predicate, CUDA_EMULATION_HERE) {
  return cuda_emulation::meet_block(predicate != 0, {"__syncthreads_count", file, line});
}
inline int __syncthreads_or(int predicate, CUDA_EMULATION_HERE) {
  return cuda_emulation::meet_block(predicate != 0, {"__syncthreads_or", file, line}) > 0;
}
inline int __syncthreads_and(int predicate, CUDA_EMULATION_HERE) {
  return cuda_emulation::meet_block(predicate == 0, {"__syncthreads_and", file, line}) == 0;
}

inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_EMULATION_HERE) {
  cuda_emulation::meet_warp(mask, nullptr, nullptr, true, {"__syncwarp", file, line});
}

inline void __threadfence() { cuda_emulation::note_fence(); }
inline void __threadfence_block() {}

namespace cuda_emulation {

template <typename T>
struct Exchange {
  T value;
  int source;  // lane to read from
  T result;
};

// A lane outside the mask has no value: all bits set, a NaN.
template <typename T>
void exchange(void* const data[32], unsigned mask) {
  for (unsigned i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    auto* mine = static_cast<Exchange<T>*>(data[i]);
    if (mask >> mine->source & 1) {
      mine->result = static_cast<Exchange<T>*>(data[mine->source])->value;
    } else {
      std::memset(static_cast<void*>(&mine->result), 0xff, sizeof(T));
    }
  }
}

template <typename T>
T shuffle(unsigned mask, const T& value, int source, Site site) {
  static_assert(sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8, "as CUDA's shuffles");
  Exchange<T> data{value, source, value};
  meet_warp(mask, &data, exchange<T>, false, site);
  return data.result;
}

struct Ballot {
  bool predicate;
  unsigned result;
};

inline void count_votes(void* const data[32], unsigned mask) {
  unsigned votes = 0;
  for (unsigned i = 0; i < 32; ++i) {
    if (mask >> i & 1 && static_cast<Ballot*>(data[i])->predicate) votes |= 1u << i;
  }
  for (unsigned i = 0; i < 32; ++i) {
    if (mask >> i & 1) static_cast<Ballot*>(data[i])->result = votes;
  }
}

inline unsigned ballot(unsigned mask, bool predicate, Site site) {
  Ballot data{predicate, 0};
  meet_warp(mask, &data, count_votes, false, site);
  return data.result;
}

}  // namespace cuda_emulation

// In each of these, `width` lanes are a segment and a source outside it is the lane itself.

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_EMULATION_HERE) {
  const int me = static_cast<int>(cuda_emulation::lane());
  const int from = (me & ~(width - 1)) + (source & (width - 1));
  return cuda_emulation::shuffle(mask, value, from, {"__shfl_sync", file, line});
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_EMULATION_HERE) {
  const int me = static_cast<int>(cuda_emulation::lane());
  const int from = me - static_cast<int>(delta);
  const int source = from < (me & ~(width - 1)) ? me : from;
  return cuda_emulation::shuffle(mask, value, source, {"__shfl_up_sync", file, line});
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_EMULATION_HERE) {
  const int me = static_cast<int>(cuda_emulation::lane());
  const int from = me + static_cast<int>(delta);
  const int source = from > (me | (width - 1)) ? me : from;
  return cuda_emulation::shuffle(mask, value, source, {"__shfl_down_sync", file, line});
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, CUDA_EMULATION_HERE) {
  const int me = static_cast<int>(cuda_emulation::lane());
  const int from = me ^ lane_mask;
  const int source = from > (me | (width - 1)) ? me : from;
  return cuda_emulation::shuffle(mask, value, source, {"__shfl_xor_sync", file, line});
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_EMULATION_HERE) {
  return cuda_emulation::ballot(mask, predicate != 0, {"__ballot_sync", file, line});
}
inline int __any_sync(unsigned mask, int predicate, CUDA_EMULATION_HERE) {
  return cuda_emulation::ballot(mask, predicate != 0, {"__any_sync", file, line}) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_EMULATION_HERE) {
  return cuda_emulation::ballot(mask, predicate == 0, {"__all_sync", file, line}) == 0;
}

#undef CUDA_EMULATION_HERE
