// Helpers over index arrays that the fold and scatter_add share.
#pragma once

#include <algorithm>
#include <cstdint>

namespace radix {

// out[i] = first + i
template <typename T>
inline void fill_range(T* out, T first, int64_t length) {
  const T count = static_cast<T>(length);
  for (T i = 0; i < count; ++i) {
    out[i] = first + i;
  }
}

// Sorts 0 .. length - 1 by index[i], keeping their order among equals: afterwards members[indptr[j]:indptr[j + 1]]
// are the i with index[i] == j, ascending. Every index[i] must be in [0, num_rows). indptr holds num_rows + 1.
template <typename Index, typename Out>
inline void invert_index(const Index* index, int64_t length, int64_t num_rows, Out* indptr, Out* members) {
  std::fill(indptr, indptr + num_rows + 1, Out{0});
  for (int64_t i = 0; i < length; ++i) {
    ++indptr[index[i] + 1];
  }
  for (int64_t j = 0; j < num_rows; ++j) {
    indptr[j + 1] += indptr[j];
  }
  // indptr[j] serves as the cursor of row j and ends where row j + 1 begins, so one shift restores it.
  for (int64_t i = 0; i < length; ++i) {
    members[indptr[index[i]]++] = static_cast<Out>(i);
  }
  for (int64_t j = num_rows; j > 0; --j) {
    indptr[j] = indptr[j - 1];
  }
  indptr[0] = 0;
}

}  // namespace radix
