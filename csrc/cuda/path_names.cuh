// Names for the paths of a fold, without hashes.
#pragma once

#include "fold_batch.cuh"

namespace radix {

// Writes to names[token] the first token whose path equals that of the token: N tokens, in sequences of at most
// `longest`, in O(N log N log longest) and about 60 bytes each.
void name_paths(
    const char* op, const Place& place, const Device& device, const Batch& batch, int64_t longest, int32_t* names);

}  // namespace radix
