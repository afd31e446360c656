// Keyed hashes of tokens, for the tables of the folds. They say where to look and decide nothing.
#pragma once

#include "both.h"

#include <atomic>
#include <cstdint>
#include <random>

namespace radix {

// A bijection after which all bits depend on all.
inline RADIX_BOTH uint64_t mix(uint64_t h) {
  h = (h ^ (h >> 32)) * 0xd6e8feb86659fd93ull;
  h = (h ^ (h >> 32)) * 0xd6e8feb86659fd93ull;
  return h ^ (h >> 32);
}

// The two halves of the product of a and b, one over the other.
inline RADIX_BOTH uint64_t folded_product(uint64_t a, uint64_t b) {
  const auto product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

// Random numbers that pick one hash of many. Who does not know the key can't choose tokens that meet in a table. A key
// serves one fold, so that the time of one tells nothing that helps against the next.
struct HashKey {
  uint64_t token;
  uint64_t position;
  uint64_t place;

  // Draws from what the operating system gave this process, or the one it was forked from, not from torch's generators.
  static HashKey draw() {
    static const uint64_t secret = [] {
      std::random_device device;
      return uint64_t{device()} << 32 | device();
    }();
    static std::atomic<uint64_t> drawn{0};
    const uint64_t first = 3 * drawn.fetch_add(1, std::memory_order_relaxed);
    const auto number = [&](uint64_t i) { return mix(mix(first + i + secret) ^ secret); };
    return HashKey{number(0), number(1), number(2)};
  }

  RADIX_BOTH uint64_t hash(int64_t token_id, int64_t position_id, uint32_t at) const {
    const uint64_t of_token =
        folded_product(static_cast<uint64_t>(token_id) ^ token, static_cast<uint64_t>(position_id) ^ position);
    return folded_product(of_token ^ at, place);
  }
};

}  // namespace radix
