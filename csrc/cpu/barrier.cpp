#include "barrier.h"

#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace rnnattn {
namespace {

constexpr int kSpins = 2000;  // some tens of microseconds, longer than members drift apart

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

void Barrier::wait(int member) {
  const int64_t mine = arrivals_[member].count.load(std::memory_order_relaxed) + 1;
  arrivals_[member].count.store(mine, std::memory_order_release);
  for (const Arrivals& other : arrivals_)
    for (int turns = 0; other.count.load(std::memory_order_acquire) < mine; ++turns)
      if (turns < kSpins) pause();
      else std::this_thread::yield();
}

void meet(Barrier* barrier, int member) { barrier->wait(member); }

}  // namespace rnnattn
