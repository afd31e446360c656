// The tables of radix::trie_order as the kernels of trie attention on the CPU read them.
#pragma once

#include "../check.h"

#include <cstdint>
#include <vector>

namespace radix {

// Tables by the numbers of depth-first order. They are copies: no other thread can change them after the check.
struct TrieTables {
  std::vector<int32_t> row_of;  // the row of each number
  std::vector<int32_t> leave;   // the number behind all that is below
  std::vector<int32_t> depth;   // how many rows are above
  std::vector<int32_t> parent;  // the number of the row right above, or -1

  int64_t num_nodes() const {
    return static_cast<int64_t>(row_of.size());
  }
};

// The tables as the ops take them, with kv_index and cu_seqlens_q, which they were made of.
struct GivenTables {
  const Tensor &enter, &leave, &depth, &row_of, &path, &kv_index, &cu_seqlens_q;
  int64_t num_nodes;
};

// Raises unless the tables are those of one trie over the first num_nodes of num_rows rows, which are those of the
// tensor `like`, every path in kv_index too.
TrieTables checked_trie_tables(const char* op, const GivenTables& given, int64_t num_rows, const char* like);

}  // namespace radix
