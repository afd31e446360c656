// radix::unpad: where the tokens of a padded batch stand, each row one stretch of 1s in a mask of 0s.
#pragma once

#include "both.h"
#include "check.h"

namespace radix {

// A mask's values, which are bool, int32 or int64.
struct Mask {
  const void* data;
  int64_t element_size;

  RADIX_BOTH int64_t operator[](int64_t i) const {
    return element_size == 1   ? static_cast<const uint8_t*>(data)[i] != 0
           : element_size == 4 ? static_cast<const int32_t*>(data)[i]
                               : static_cast<const int64_t*>(data)[i];
  }
};

// What a row, or a part of it, holds: its 1s, where the first and the last of them stand, and whether all else is 0.
struct Stretch {
  int64_t count;
  int64_t first;
  int64_t last;
  bool is_mask;

  RADIX_BOTH bool is_unbroken() const {
    return is_mask && (count == 0 || last - first + 1 == count);
  }

  // The places from the first 1 to the last, in whatever row.
  RADIX_BOTH int64_t length() const {
    return count == 0 ? 0 : last - first + 1;
  }
};

// `num_columns` is where the first 1 of no 1s would stand.
RADIX_BOTH inline Stretch no_stretch(int64_t num_columns) {
  return Stretch{0, num_columns, -1, true};
}

RADIX_BOTH inline Stretch joined(const Stretch& a, const Stretch& b) {
  return Stretch{
      a.count + b.count,
      a.first < b.first ? a.first : b.first,
      a.last > b.last ? a.last : b.last,
      a.is_mask && b.is_mask};
}

RADIX_BOTH inline Stretch stretch_of(int64_t value, int64_t column, int64_t num_columns) {
  return value == 1 ? Stretch{1, column, column, true} : Stretch{0, num_columns, -1, value == 0};
}

inline void check_mask(const char* op, const Tensor& mask, const Place& place) {
  check_place(op, "attention_mask", mask, place);
  RADIX_CHECK(mask.dim() == 2, op, "attention_mask must have 2 dimensions, got shape ", shape_of(mask));
  const int32_t code = dtype_code_of(mask);
  RADIX_CHECK(
      code == aoti_torch_dtype_bool() || is_index_dtype(mask),
      op,
      "attention_mask must be bool, int32 or int64, got ",
      dtype_of(mask));
  // Either may be 0 where the other is large.
  RADIX_CHECK(
      mask.numel() <= kMaxRows && mask.size(0) <= kMaxRows,
      op,
      "attention_mask holds ",
      mask.numel(),
      " values in ",
      mask.size(0),
      " rows; at most ",
      kMaxRows,
      " are allowed");
}

}  // namespace radix
