// What emulator.py calls, beside a driver's own functions.

#include <string>

#include "../include/emulation/driver.h"
#include "machine.h"

using cuda_emulation::Machine;
using cuda_emulation::Order;

extern "C" {
#pragma GCC visibility push(default)

void* emulation_allocate(const char* name, size_t bytes, size_t offset, bool writable) {
  return Machine::instance().global.allocate(name, bytes, offset, writable);
}

void emulation_release_all() { Machine::instance().global.release_all(); }

void emulation_set_order(int order, unsigned seed) {
  Machine::instance().schedule.set(static_cast<Order>(order), seed);
}

void emulation_reset_traffic() { Machine::instance().global.reset_traffic(); }

const char* emulation_traffic() {
  static std::string json;
  json = Machine::instance().global.traffic_json();
  return json.c_str();
}

#pragma GCC visibility pop
}

namespace cuda_emulation {

const char* keep_message(const char* message) {
  static std::string kept;
  kept = message;
  return kept.c_str();
}

}  // namespace cuda_emulation
