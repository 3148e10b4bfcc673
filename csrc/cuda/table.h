// Tables that travel as kernel arguments: what one launch is told of many matrices or parameters.
//
// A launch has one chunk of one entry to a block. Tables have no list of chunks: a block finds its
// entry by bisection in `first`, so that only the number of entries, never their size, makes another
// launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace gls_fused::cuda {

// Of the 32,764 bytes of arguments that CUDA has had since 12.1 (compute capability 7.0, driver 530)
// or of the 4 KiB before; as torch's own multi-tensor kernels, from 13.0 on. Options stand beside.
constexpr int kTableBytes = CUDART_VERSION >= 13000 ? 32400 : 3880;

template <typename Entry>
struct Table {
  static constexpr int kMost = kTableBytes / int(sizeof(Entry));
  Entry entries[kMost];  // the first `count` of them
  int32_t count;
  uint32_t blocks;

  // Not the entries, of which most stay unused.
  Table() : count(0), blocks(0) {}
};

}  // namespace gls_fused::cuda
