#include "workspace.h"

#include <ATen/ATen.h>

#include <cstdlib>
#include <deque>
#include <mutex>
#include <utility>

#include "huge_pages.h"

#if defined(__linux__)
#include <unistd.h>
#endif

namespace rnnattn {
namespace {

constexpr size_t kLarge = 1 << 20;  // bytes; the allocator keeps smaller pieces by itself
constexpr size_t kPage = 1 << 21;   // a huge one

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kKeeps = false;  // it is to see what is read after its end
#else
constexpr bool kKeeps = true;
#endif

struct Block {
  void* data;
  size_t size;
};

// Free blocks, the longest free first. All calls may come from any thread, and from a child that was forked while
// another thread was in here: nobody waits for the lock.
class IdleBlocks {
 public:
  // The smallest that is large enough and not much larger, or an empty one.
  Block take(size_t size) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return {};
    auto best = blocks_.end();
    for (auto at = blocks_.begin(); at != blocks_.end(); ++at)
      if (at->size >= size && at->size <= size + size / 4 && (best == blocks_.end() || at->size < best->size)) best = at;
    if (best == blocks_.end()) return {};
    const Block block = *best;
    blocks_.erase(best);
    idle_ -= block.size;
    return block;
  }

  void give(Block block) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || block.size > limit_) return std::free(block.data);
    for (; idle_ + block.size > limit_; blocks_.pop_front()) {
      idle_ -= blocks_.front().size;
      std::free(blocks_.front().data);
    }
    blocks_.push_back(block);
    idle_ += block.size;
  }

  size_t release() {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return 0;
    for (const Block& block : blocks_) std::free(block.data);
    blocks_.clear();
    return std::exchange(idle_, 0);
  }

 private:
  // A 64th of the machine's memory.
  static size_t limit() {
#if defined(__linux__)
    return static_cast<size_t>(sysconf(_SC_PHYS_PAGES)) / 64 * static_cast<size_t>(sysconf(_SC_PAGESIZE));
#else
    return size_t{1} << 28;
#endif
  }

  std::mutex mutex_;
  std::deque<Block> blocks_;
  size_t idle_ = 0;
  const size_t limit_ = limit();
};

IdleBlocks& idle_blocks() {
  static auto* blocks = new IdleBlocks;  // never destroyed: tensors may outlive any static object
  return *blocks;
}

}  // namespace

at::Tensor workspace(at::IntArrayRef sizes, const at::TensorOptions& options) {
  size_t size = c10::multiply_integers(sizes) * options.dtype().itemsize();
  const auto& context = at::globalContext();
  const bool filled = context.deterministicAlgorithms() && context.deterministicFillUninitializedMemory();
  if (!kKeeps || size < kLarge || filled) return in_huge_pages(at::empty(sizes, options));
  size = (size + kPage - 1) / kPage * kPage;
  Block block = idle_blocks().take(size);
  if (!block.data) {
    block = {std::aligned_alloc(kPage, size), size};
    if (!block.data) return at::empty(sizes, options);  // which says what is missing
    advise_huge_pages(block.data, block.size);
  }
  return at::from_blob(block.data, sizes, [block](void*) { idle_blocks().give(block); }, options);
}

int64_t empty_workspace_cache() { return static_cast<int64_t>(idle_blocks().release()); }

}  // namespace rnnattn
