// The barrier at which the threads that scan one group of rows meet at every step. Knows no torch.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace rnnattn {

// Every member counts its own arrivals, on cache lines of its own, and waits for the others to have
// as many: no line is written by two threads. A member that waits long gives its core away, so that
// a machine with more threads than cores gets on.
class Barrier {
 public:
  explicit Barrier(int members) : arrivals_(members) {}
  void wait(int member);

 private:
  struct alignas(128) Arrivals {  // two lines: the prefetcher fetches pairs
    std::atomic<int64_t> count{0};
  };
  std::vector<Arrivals> arrivals_;
};

// Out of line, for kernels that are compiled for one instruction set and must not instantiate the
// standard library for it.
void meet(Barrier* barrier, int member);

}  // namespace rnnattn
