// How the kernels on the CPU share work among threads.
#pragma once

#include "../check.h"

namespace radix {

// Multiplications from which on all threads take part.
constexpr double kWorkOfOneThread = 1 << 18;

// Runs body(begin, end) over [0, count), in parallel where the bytes moved are worth it. `body` must not throw.
template <typename Body>
inline void parallel_over(int64_t count, int64_t bytes_each, const Body& body) {
  constexpr int64_t kBytesPerTask = 1 << 16;
  const int64_t grain = std::max<int64_t>(1, kBytesPerTask / std::max<int64_t>(bytes_each, 1));
  if (count <= grain) {
    body(int64_t{0}, count);
  } else {
    torch::stable::parallel_for(0, count, grain, body);
  }
}

// Runs work() in as many threads as the multiplications are worth. Each takes tasks from a shared counter until none is
// left: tasks differ, and a thread that has to wait for its processor holds up none of the rest.
template <typename Work>
void run_in_threads(int64_t num_tasks, double multiplications, const Work& work) {
  if (multiplications <= kWorkOfOneThread || num_tasks <= 1) {
    work();
  } else {
    torch::stable::parallel_for(0, num_tasks, 1, [&](int64_t, int64_t) { work(); });
  }
}

}  // namespace radix
