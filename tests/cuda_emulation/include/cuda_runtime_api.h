// The types of launchers' signatures; there is nothing to call here.

#pragma once

#include "emulation/vector_types.h"

using cudaStream_t = struct CUstream_st*;
