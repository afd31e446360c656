// How the backward of trie attention on the CPU joins blocks to chunks: by the trie and the work alone, so that sums
// are the same for any number of threads.
#pragma once

#include "parallel.h"
#include "trie_problem.h"

#include <cmath>
#include <vector>

namespace radix {

// Tasks that chunks times heads should make, so that threads end together.
constexpr int64_t kTasks = 64;

// Blocks in a row, and where their sums stand: first those of the rows on the path to the first row, without those that
// are skipped, then those of their own rows.
struct Chunk {
  int64_t first_block, end_block;
  int64_t first, end;  // numbers
  int64_t above;       // how many rows are on the path to the first
  int64_t skipped;     // how many of those no block reads
  int64_t offset;      // of the first sum

  int64_t num_above() const {
    return above - skipped;
  }

  int64_t num_sums() const {
    return num_above() + end - first;
  }
};

// Returns at most `count` chunks of about equal work.
inline std::vector<Chunk> cut(const Problem& p, int64_t count) {
  std::vector<Block> blocks;
  int64_t work = 0;
  for (int64_t i = 0; i < p.num_blocks(); ++i) {
    blocks.push_back(block_of(p, i));
    work += blocks.back().num_keys();
  }
  std::vector<Chunk> chunks;
  int64_t done = 0, offset = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(blocks.size()); ++i) {
    const Block& block = blocks[i];
    if (chunks.empty() || done * count >= work * static_cast<int64_t>(chunks.size())) {
      chunks.push_back(Chunk{i, i, block.first, block.first, block.above, block.above, 0});
    }
    Chunk& chunk = chunks.back();
    chunk.end_block = i + 1;
    chunk.end = block.end;
    chunk.skipped = std::min(chunk.skipped, block.skipped);
    done += block.num_keys();
  }
  for (Chunk& chunk : chunks) {
    chunk.offset = offset;
    offset += chunk.num_sums();
  }
  return chunks;
}

// Returns enough chunks for kTasks tasks, but few enough to hold at most twice as many sums as there are rows.
inline std::vector<Chunk> chunks_of(const Problem& p, double multiplications) {
  const double worthwhile = std::min<double>(multiplications / kWorkOfOneThread, kTasks);
  int64_t count = std::max<int64_t>(1, static_cast<int64_t>(std::ceil(worthwhile / p.k.heads)));
  while (true) {
    std::vector<Chunk> chunks = cut(p, count);
    if (chunks.size() <= 1 || chunks.back().offset + chunks.back().num_sums() <= 2 * p.trie.num_nodes()) {
      return chunks;
    }
    count = std::min<int64_t>(count, chunks.size()) * 3 / 4;
  }
}

}  // namespace radix
