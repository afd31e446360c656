// Checks of an index on the CPU while it is read: each entry once, and none is used before it is found in range.
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

// Tells whether every index[i] is in [0, bound): otherwise bound - 1 - index[i] or index[i] itself is negative.
template <typename T>
RADIX_VECTOR_CLONES bool all_in_range(const T* index, int64_t length, int64_t bound) {
  using Unsigned = std::make_unsigned_t<T>;
  const auto last = static_cast<Unsigned>(std::min<int64_t>(bound - 1, std::numeric_limits<T>::max()));
  Unsigned signs = 0;
  for (int64_t i = 0; i < length; ++i) {
    const auto entry = static_cast<Unsigned>(index[i]);
    signs |= entry | static_cast<Unsigned>(last - entry);
  }
  return static_cast<T>(signs) >= 0;
}

// An index's entry that is out of range, as it was read; `at` is negative where there is none.
struct BadEntry {
  int64_t at = -1;
  int64_t value = 0;
};

// Raises for a bad entry; `what` names what the bound counts.
[[noreturn]] inline void refuse_entry(
    const char* op, const char* name, const BadEntry& bad, int64_t bound, const char* what) {
  RADIX_CHECK(bound > 0, op, name, "[", bad.at, "] is ", bad.value, ", but there are no ", what, " to index");
  fail(
      op,
      name,
      "[",
      bad.at,
      "] is ",
      bad.value,
      ", out of range for ",
      bound,
      " ",
      what,
      " (allowed: 0 to ",
      bound - 1,
      ")");
}

// Entries of an index that are read together, into a buffer in the first-level cache.
constexpr int64_t kEntriesAtOnce = 512;

// Calls use(first, entries, count) for stretches of index[begin:end], and ends at the first entry out of [0, bound),
// which it returns. Entries are read once: those that were checked are used, even if another thread writes meanwhile.
template <typename T, typename Use>
inline BadEntry for_entries(const T* index, int64_t begin, int64_t end, int64_t bound, const Use& use) {
  T entries[kEntriesAtOnce];
  for (int64_t first = begin; first < end; first += kEntriesAtOnce) {
    const int64_t count = std::min(kEntriesAtOnce, end - first);
    std::memcpy(entries, index + first, count * sizeof(T));
    if (!all_in_range(entries, count, bound)) [[unlikely]] {
      const T* bad = std::find_if(entries, entries + count, [bound](T i) { return i < 0 || i >= bound; });
      return BadEntry{first + (bad - entries), *bad};
    }
    use(first, entries, count);
  }
  return BadEntry{};
}

// Copies the first `length` entries of an index to `out`, for kernels that read them more than once. Raises unless all
// are in [0, bound), which Out holds. `index` must be contiguous.
template <typename Out>
inline void copy_checked(
    const char* op, const char* name, const Tensor& index, int64_t length, int64_t bound, const char* what, Out* out) {
  with_index_type(index, [&](auto type) {
    using Index = decltype(type);
    const Index* given = static_cast<const Index*>(index.const_data_ptr());
    const BadEntry bad = for_entries(given, 0, length, bound, [&](int64_t first, const Index* entries, int64_t count) {
      std::transform(entries, entries + count, out + first, [](Index entry) { return static_cast<Out>(entry); });
    });
    if (bad.at >= 0) {
      refuse_entry(op, name, bad, bound, what);
    }
  });
}

}  // namespace radix
