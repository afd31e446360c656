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

}  // namespace radix
