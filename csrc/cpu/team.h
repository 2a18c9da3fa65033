// Threads that compute one layer together: torch's number of threads, but no more than there are
// processors, as they wait for one another.
#pragma once

#include <ATen/Parallel.h>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include <algorithm>
#include <atomic>

namespace rnnattn {

// A child of fork has none of its parent's threads, and OpenMP hangs waiting for them.
inline std::atomic<bool>& forked() {
  static std::atomic<bool> flag{false};
  return flag;
}

inline void watch_forks() {
#if defined(__unix__) || defined(__APPLE__)
  forked();
  pthread_atfork(nullptr, nullptr, [] { forked() = true; });
#endif
}

// To be called before anything that may use threads. One thread from then on in a forked child: torch's
// own operations hang there with more, as well.
inline void adapt_to_fork() {
  if (forked() && at::get_num_threads() != 1) at::set_num_threads(1);
}

inline int team_size() {
#if defined(_OPENMP)
  if (at::in_parallel_region()) return 1;
  return std::clamp(at::get_num_threads(), 1, omp_get_num_procs());
#else
  return 1;
#endif
}

// Calls body(thread) on `threads` threads at once; false, and no call, where the system has not as many.
// body must not throw: nothing may leave a parallel region.
template <typename Body>
bool run_team(int threads, const Body& body) {
  if (threads == 1) {
    body(0);
    return true;
  }
  std::atomic<bool> complete{true};
#if defined(_OPENMP)
  // Opened for torch's number of threads: a smaller one would end the others, to be started again by torch's next operation.
#pragma omp parallel
  {
    if (omp_get_num_threads() < threads) complete = false;
    else if (omp_get_thread_num() < threads) body(omp_get_thread_num());
  }
#else
  complete = false;
#endif
  return complete;
}

}  // namespace rnnattn
