// What gather and scatter_add share on the CPU.
#pragma once

#include "../rows.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

// A function marked with it is compiled for several vector widths, one of which is chosen when the library is loaded.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define RADIX_VECTOR_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define RADIX_VECTOR_CLONES
#endif

namespace radix {

// The largest index, where negative ones count as larger than all others.
template <typename T>
RADIX_VECTOR_CLONES uint64_t largest_index(const T* index, int64_t length) {
  std::make_unsigned_t<T> largest = 0;
  for (int64_t i = 0; i < length; ++i) {
    largest = std::max(largest, static_cast<std::make_unsigned_t<T>>(index[i]));
  }
  return largest;
}

// Raises unless every index[i] is in [0, bound). `what` says what the bound counts.
template <typename T>
inline void check_in_range(
    const char* op, const char* name, const T* index, int64_t length, int64_t bound, const char* what) {
  // Negative int32 are at least 2^31 as unsigned, whatever the bound.
  const uint64_t limit = std::min<uint64_t>(static_cast<uint64_t>(bound), std::numeric_limits<T>::max() + uint64_t{1});
  if (length == 0 || largest_index(index, length) < limit) [[likely]] {
    return;
  }
  const T* bad = std::find_if(index, index + length, [bound](T i) { return i < 0 || i >= bound; });
  RADIX_CHECK(bound > 0, op, name, "[", bad - index, "] is ", *bad, ", but there are no ", what, " to index");
  fail(
      op,
      name,
      "[",
      bad - index,
      "] is ",
      *bad,
      ", out of range for ",
      bound,
      " ",
      what,
      " (allowed: 0 to ",
      bound - 1,
      ")");
}

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

}  // namespace radix
