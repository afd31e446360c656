// The inverse of an index on CUDA.
#pragma once

#include "common.cuh"

namespace radix {

// Sorts 0 .. length - 1 by index[i], keeping their order among equals: afterwards members[indptr[j]:indptr[j + 1]] are
// the i with index[i] == j, ascending. An index out of [0, num_rows) is a device assert. indptr holds num_rows + 1;
// Out is int32_t or, for a length that it does not hold, int64_t.
template <typename Out>
void invert_index(
    const char* op,
    const Place& place,
    const Device& device,
    const Integers& index,
    int64_t length,
    int64_t num_rows,
    Out* indptr,
    Out* members);

}  // namespace radix
