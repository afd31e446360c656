// The batch that a fold on CUDA reads.
#pragma once

#include "../hash.h"
#include "common.cuh"

namespace radix {

constexpr int32_t kNone = -1;

// The packed tokens. `sequences` holds the sequence of each. Until the host knows whether cu_seqlens is well-formed,
// what is read from it is clamped before it is used as an index. With `front` the tokens end where cu_seqlens ends,
// which the host learns with that verdict: num_tokens is then how many there may be. With `from_zero` there are no
// positions, and a token's is its place in its sequence.
struct Batch {
  Integers ids;
  Integers positions;
  Integers cu_seqlens;
  int64_t num_tokens;
  int64_t num_sequences;
  int32_t* sequences;
  bool from_zero;
  bool front;
  HashKey key;

  __device__ int64_t tokens() const {
    if (!front) {
      return num_tokens;
    }
    const int64_t end = cu_seqlens[num_sequences];
    return end < 0 ? 0 : end > num_tokens ? num_tokens : end;
  }

  __device__ int64_t start(int64_t token) const {
    const int64_t start = cu_seqlens[sequences[token]];
    return start < 0 ? 0 : start > token ? token : start;
  }

  __device__ int64_t position(int64_t token) const {
    return from_zero ? token - start(token) : positions[token];
  }

  // Compares tokens that stand behind equally many others; only then are their positions from zero equal.
  __device__ bool same_token(int64_t a, int64_t b) const {
    return ids[a] == ids[b] && (from_zero || positions[a] == positions[b]);
  }

  // A hash of the token, its position and its place in the sequence.
  __device__ uint64_t step_hash(int64_t token) const {
    const int64_t place = token - start(token);
    return mix(key.hash(ids[token], from_zero ? place : positions[token], static_cast<uint32_t>(place)));
  }

  __device__ int64_t length(int64_t sequence) const {
    const int64_t length = cu_seqlens[sequence + 1] - cu_seqlens[sequence];
    return length < 0 ? 0 : length > num_tokens ? num_tokens : length;
  }

  __device__ bool well_formed_at(int64_t sequence) const {
    return cu_seqlens[sequence] <= cu_seqlens[sequence + 1] && (sequence > 0 || cu_seqlens[0] == 0) &&
           (sequence + 1 < num_sequences || cu_seqlens[num_sequences] == tokens());
  }
};

}  // namespace radix
