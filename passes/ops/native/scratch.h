// Scratch memory of a calling thread, kept from call to call: fresh pages cost more than what is computed in them.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

namespace hasten {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// At least `bytes`, a cache line's start; valid until the next call by this thread. Throws std::bad_alloc.
inline float* scratch(size_t bytes) {
  thread_local std::unique_ptr<float, Free> memory;
  thread_local size_t held = 0;
  if (bytes > held) {
    memory.reset();
    held = 0;
    void* p = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (p == nullptr) throw std::bad_alloc();
    memory.reset(static_cast<float*>(p));
    held = bytes;
  }
  return memory.get();
}

}  // namespace hasten
