// For drivers: the functions that Python calls return null, or the message of what went wrong.

#pragma once

#include <exception>

#include "machine.h"

namespace cuda_emulation {

const char* keep_message(const char* message);

template <typename Function>
const char* guarded(const Function& function) {
  try {
    function();
    return nullptr;
  } catch (const std::exception& error) {
    return keep_message(error.what());
  }
}

}  // namespace cuda_emulation

#define EMULATED extern "C" __attribute__((visibility("default"))) const char*
