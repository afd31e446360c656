// The fold of plain arrays as a C function, for radix_ops.compat: a small fold takes less time than a call through
// torch's dispatcher. It only tells that arguments are malformed; the op says how.
#include "../fold.h"
#include "fold_trie.h"

extern "C" {

// Folds num_tokens uint32 tokens and positions of the sequences that `ends`, 0 and then the end of each, marks off.
// `out` has room for three parts of max_rows (compact ids, compact positions, fold index) and then num_tokens (unfold
// index); max_rows is num_tokens rounded up to a multiple of `multiple`, which is at least 1. Returns the number of
// rows, or -1 if there are no tokens, the arguments are malformed or no memory is left.
__attribute__((visibility("default"))) int64_t radix_fold_uint32(
    const uint32_t* ids,
    const uint32_t* positions,
    int64_t num_tokens,
    const uint32_t* ends,
    int64_t num_sequences,
    int64_t multiple,
    uint32_t* out) {
  const int64_t max_rows = (num_tokens + multiple - 1) / multiple * multiple;
  const auto misaligned = [](const void* array) { return reinterpret_cast<uintptr_t>(array) % sizeof(uint32_t) != 0; };
  if (num_tokens > radix::kMaxRows || max_rows > radix::kMaxRows || num_tokens == 0 || num_sequences < 0 ||
      misaligned(ids) || misaligned(positions) || misaligned(ends)) {
    return -1;
  }
  try {
    const std::vector<int64_t> bounds(ends, ends + num_sequences + 1);
    if (bounds.front() != 0 || bounds.back() != num_tokens || !std::is_sorted(bounds.begin(), bounds.end())) {
      return -1;
    }
    // Numbers that are equal unsigned are equal signed.
    const auto as_signed = [](auto* array) { return reinterpret_cast<const int32_t*>(array); };
    radix::Trie<int32_t, int32_t> trie(as_signed(ids), as_signed(positions), std::min(num_sequences, num_tokens));
    int32_t* const rows = reinterpret_cast<int32_t*>(out);
    for (int64_t s = 0; s < num_sequences; ++s) {
      trie.insert(s, bounds[s], bounds[s + 1], rows + 3 * max_rows);
    }
    const int64_t num_rows = (trie.num_rows() + multiple - 1) / multiple * multiple;
    trie.write_rows(bounds.data(), num_rows, rows, rows + max_rows, rows + 2 * max_rows);
    return num_rows;
  } catch (const std::exception&) {
    return -1;
  }
}
}
