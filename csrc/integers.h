// Index arrays of either width, as kernels of both devices read them.
#pragma once

#include "both.h"
#include "check.h"

namespace radix {

// An int32 or int64 array. The branch is the same for all threads, and one kernel serves both.
struct Integers {
  const void* data;
  bool wide;

  RADIX_BOTH int64_t operator[](int64_t i) const {
    return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int32_t*>(data)[i];
  }
};

// `tensor` must be contiguous and outlive the array.
inline Integers integers_of(const Tensor& tensor) {
  return Integers{tensor.const_data_ptr(), !is_int32(tensor)};
}

// The values of an index tensor on the CPU, each read once: another thread may write to the tensor between a check of a
// value and its use.
inline std::vector<int64_t> values_of(const Tensor& tensor) {
  const Tensor held = as_contiguous(tensor);
  const Integers integers = integers_of(held);
  std::vector<int64_t> values(held.size(0));
  for (size_t i = 0; i < values.size(); ++i) {
    values[i] = integers[static_cast<int64_t>(i)];
  }
  return values;
}

}  // namespace radix
