// How the warps that load bring rows into shared memory.
#pragma once

#include "trie_items_sm90.cuh"

namespace radix::sm90 {

// How a warp loads its 32 rows of a tile: not at all, as one box, or row by row.
enum class Way { kNone, kBox, kRows };

// Begins to copy the row that each lane points to, zeros for a null pointer, to 32 rows of a matrix of D columns.
// `any` is an address that may be read.
template <int D, int kPieceBytes, typename T>
__device__ void copy_rows(int lane, uint32_t to, const T* row, const void* any) {
  constexpr int kChunks = D / 8;
  constexpr int kRows = 32 / kChunks;  // at once
  const int chunk = lane % kChunks;
  const uint32_t piece = to + chunk / 8 * kPieceBytes;
#pragma unroll 4
  for (int i = 0; i < 32; i += kRows) {
    const int at = i + lane / kChunks;
    const T* from = reinterpret_cast<const T*>(__shfl_sync(~0u, reinterpret_cast<uint64_t>(row), at));
    const bool is_row = from != nullptr;
    const uint32_t slot = piece + at * kRowBytes + ((chunk % 8) ^ (at % 8)) * 16;
    copy_16(slot, is_row ? from + chunk * 8 : any, is_row);
  }
}

}  // namespace radix::sm90
