#include "pool.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/MemoryFormat.h>
#include <c10/util/Exception.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <list>
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
    const size_t rounded = (bytes + PAGE - 1) / PAGE * PAGE;
    // What is held is whole pages, so it is compared with whole pages. Of two that fit alike the one last used is
    // likelier to be in the caches.
    auto found = idle_.end();
    for (auto it = idle_.begin(); it != idle_.end(); ++it)
      if (it->held >= rounded && it->held <= rounded + rounded / 4 && (found == idle_.end() || it->held <= found->held))
        found = it;
    void* p = nullptr;
    if (found != idle_.end()) {
      *held = found->held;
      p = found->memory;
      idle_bytes_ -= found->held;
      idle_.erase(found);
    } else {
      *held = rounded;
      const size_t most = std::max(peak_, used_ + *held);
      while (!idle_.empty() && used_ + *held + idle_bytes_ > most + most / 10) drop_oldest();
      p = std::aligned_alloc(PAGE, *held);
      if (p == nullptr) {
        while (!idle_.empty()) drop_oldest();
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
    idle_.push_back({held, p});
    idle_bytes_ += held;
  }

 private:
  struct Block {
    size_t held;
    void* memory;
  };

  void drop_oldest() {
    idle_bytes_ -= idle_.front().held;
    std::free(idle_.front().memory);
    idle_.pop_front();
  }

  std::mutex mutex_;
  std::list<Block> idle_;  // the longest idle first
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
