#include "pool.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/MemoryFormat.h>
#include <c10/util/Exception.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>

namespace hasten {
namespace {

constexpr size_t SMALL = 1 << 20;   // bytes; malloc keeps what is smaller
constexpr size_t PAGE = 2 << 20;    // of a huge page

// Idle and used memory together stay within a tenth of the most that was ever used at once.
class Pool {
 public:
  void* take(size_t bytes, size_t* held) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto found = idle_.lower_bound(bytes);
    void* p = nullptr;
    if (found != idle_.end() && found->first <= bytes + bytes / 4) {
      *held = found->first;
      p = found->second;
      idle_bytes_ -= found->first;
      idle_.erase(found);
    } else {
      *held = (bytes + PAGE - 1) / PAGE * PAGE;
      const size_t most = std::max(peak_, used_ + *held);
      while (!idle_.empty() && used_ + *held + idle_bytes_ > most + most / 10) drop(std::prev(idle_.end()));
      p = std::aligned_alloc(PAGE, *held);
      if (p == nullptr) {
        while (!idle_.empty()) drop(idle_.begin());
        p = std::aligned_alloc(PAGE, *held);
        TORCH_CHECK(p != nullptr, "hasten: there is no memory for a result of ", bytes, " bytes");
      }
      madvise(p, *held, MADV_HUGEPAGE);
    }
    used_ += *held;
    peak_ = std::max(peak_, used_);
    return p;
  }

  void give(void* p, size_t held) {
    const std::lock_guard<std::mutex> lock(mutex_);
    used_ -= held;
    idle_.emplace(held, p);
    idle_bytes_ += held;
  }

 private:
  void drop(std::multimap<size_t, void*>::iterator at) {
    idle_bytes_ -= at->first;
    std::free(at->second);
    idle_.erase(at);
  }

  std::mutex mutex_;
  std::multimap<size_t, void*> idle_;
  size_t idle_bytes_ = 0, used_ = 0, peak_ = 0;
};

Pool& pool() {
  static Pool* made = new Pool;  // tensors may outlive static objects
  return *made;
}

}  // namespace

at::Tensor pooled_empty(at::IntArrayRef sizes, bool channels_last) {
  int64_t count = 1;
  for (const int64_t size : sizes) count *= size;
  const auto format = channels_last && sizes.size() == 4   ? at::MemoryFormat::ChannelsLast
                      : channels_last && sizes.size() == 5 ? at::MemoryFormat::ChannelsLast3d
                                                           : at::MemoryFormat::Contiguous;
  const auto options = at::TensorOptions().dtype(at::kFloat);
  const size_t bytes = count * sizeof(float);
  if (bytes < SMALL) return at::empty(sizes, options, format);
  std::vector<int64_t> strides(sizes.size());
  if (format == at::MemoryFormat::ChannelsLast) {
    strides = c10::get_channels_last_strides_2d(sizes);
  } else if (format == at::MemoryFormat::ChannelsLast3d) {
    strides = c10::get_channels_last_strides_3d(sizes);
  } else {
    int64_t step = 1;
    for (size_t i = sizes.size(); i-- > 0; step *= sizes[i]) strides[i] = step;
  }
  size_t held = 0;
  void* p = pool().take(bytes, &held);
  return at::from_blob(p, sizes, strides, [held](void* q) { pool().give(q, held); }, options);
}

}  // namespace hasten
