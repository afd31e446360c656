// radix::trie_attention_rows on the CPU: some rows alone attend to the rows above them.
//
// Queries that stand near each other in depth-first order make a block, whose keys are the rows on any of their paths:
// the path to the first query, and of each further one the rows behind the query before it. So what queries share is
// read once for all of them, and what none of them sees is not read.
#include "index_checks.h"
#include "parallel.h"
#include "trie_forward.h"

#include <algorithm>
#include <atomic>

namespace radix {
namespace {

struct Query {
  int32_t number;  // of its row in depth-first order
  int64_t place;   // in q and out
};

struct QueryBlock {
  int64_t begin, end;  // of its queries
  Block block;         // from the first query's number to behind the last one's
  std::vector<int32_t> key_numbers;
};

struct RowsForward : Problem {
  std::vector<Query> queries;  // in depth-first order
  std::vector<QueryBlock> blocks;
  char* out;  // [queries, heads, value size], contiguous
};

QueryBlock block_of_queries(const RowsForward& p, int64_t begin, int64_t end) {
  const int64_t first = p.queries[begin].number;
  QueryBlock found{begin, end, Block{first, p.queries[end - 1].number + 1, p.trie.depth[first], 0, 0}, {}};
  int64_t least = kMaxRows;
  int32_t before = -1;
  for (int64_t i = begin; i < end; ++i) {
    const int32_t number = p.queries[i].number;
    const auto known = static_cast<std::ptrdiff_t>(found.key_numbers.size());
    // A row on this path with a number up to the query before is on the path to that one, too.
    for (int32_t key = number; key > before; key = p.trie.parent[key]) {
      found.key_numbers.push_back(key);
    }
    std::reverse(found.key_numbers.begin() + known, found.key_numbers.end());
    before = number;
    least = std::min<int64_t>(least, p.trie.depth[number]);
    found.block.most = std::max<int64_t>(found.block.most, p.trie.depth[number]);
  }
  found.block.skipped = std::min(found.block.above, std::max<int64_t>(0, least - p.window + 1));
  return found;
}

// Calls move(lane, query, head of q) for each lane of a block.
template <typename Move>
RADIX_INLINE void for_query_lanes(const RowsForward& p, const QueryBlock& block, int64_t kv_head, const Move& move) {
  int64_t lane = 0;
  for (int64_t i = block.begin; i < block.end; ++i) {
    for (int64_t j = 0; j < p.group; ++j) {
      move(lane++, p.queries[i], kv_head * p.group + j);
    }
  }
}

template <typename Stored, typename T>
struct RowsKernel {
  template <int kBytes, int kTogether>
  static RADIX_INLINE void attend_block(
      const RowsForward& p, const QueryBlock& block, int64_t kv_head, ForwardWorkspace<T>& w) {
    using Int = typename Tile<T>::Int;
    w.tile.block = block.block;
    w.tile.key_numbers = block.key_numbers;
    std::fill_n(w.tile.number, p.num_lanes, Int(-1));
    std::fill_n(w.tile.depth, p.num_lanes, Int(0));
    std::fill_n(w.lanes, p.num_lanes * p.q.size, T(0));
    for_query_lanes(p, block, kv_head, [&](int64_t lane, const Query& query, int64_t head) {
      w.tile.number[lane] = static_cast<Int>(query.number);
      w.tile.depth[lane] = static_cast<Int>(p.trie.depth[query.number]);
      load<Stored>(p.q.at(query.place, head), p.q.size, p.q.size, w.lanes + lane * p.q.size);
    });
    attend_lanes<Stored, T, kBytes, kTogether>(p, kv_head, w);
    for_query_lanes(p, block, kv_head, [&](int64_t lane, const Query& query, int64_t head) {
      Stored* const to = reinterpret_cast<Stored*>(p.out) + (query.place * p.q.heads + head) * p.v.size;
      for (int64_t d = 0; d < p.v.size; ++d) {
        to[d] = static_cast<Stored>(w.outs[d * p.num_lanes + lane]);
      }
    });
  }

  template <int kBytes, int kTogether>
  static RADIX_INLINE void run(const RowsForward& p, std::atomic<int64_t>& next) {
    ForwardWorkspace<T> workspace(p);
    const int64_t count = static_cast<int64_t>(p.blocks.size()) * p.k.heads;
    for (int64_t i = next++; i < count; i = next++) {
      attend_block<kBytes, kTogether>(p, p.blocks[i / p.k.heads], i % p.k.heads, workspace);
    }
  }
};

// Finds the queries of rows that are no padding, in depth-first order, equal ones in theirs, and sets the output of all
// others to zero.
void find_queries(RowsForward& p, const std::vector<int32_t>& rows, int64_t out_row_bytes) {
  const int64_t num_nodes = p.trie.num_nodes();
  std::vector<int32_t> number_of(num_nodes);
  for (int64_t number = 0; number < num_nodes; ++number) {
    number_of[p.trie.row_of[number]] = static_cast<int32_t>(number);
  }
  for (size_t i = 0; i < rows.size(); ++i) {
    if (rows[i] < num_nodes) {
      p.queries.push_back(Query{number_of[rows[i]], static_cast<int64_t>(i)});
    } else if (out_row_bytes > 0) {
      std::memset(p.out + static_cast<int64_t>(i) * out_row_bytes, 0, out_row_bytes);
    }
  }
  std::stable_sort(
      p.queries.begin(), p.queries.end(), [](const Query& a, const Query& b) { return a.number < b.number; });
}

// Cuts the queries into blocks of about equal sizes, at most as large as those of trie_attention.
void cut_into_blocks(RowsForward& p) {
  const int64_t count = static_cast<int64_t>(p.queries.size());
  const int64_t num_blocks = (count + p.block_rows - 1) / p.block_rows;
  p.block_rows = (count + num_blocks - 1) / num_blocks;
  p.num_lanes = rounded_up(p.block_rows * p.group, kAlignment / sizeof(float));
  for (int64_t begin = 0; begin < count; begin += p.block_rows) {
    p.blocks.push_back(block_of_queries(p, begin, std::min(begin + p.block_rows, count)));
  }
}

Tensor trie_attention_rows_cpu(
    const Tensor& q,
    const Tensor& k,
    const Tensor& v,
    const Tensor& rows,
    const Tensor& enter,
    const Tensor& leave,
    const Tensor& depth,
    const Tensor& row_of,
    const Tensor& path,
    const Tensor& kv_index,
    const Tensor& cu_seqlens_q,
    int64_t num_nodes,
    double scale,
    int64_t sliding_window) {
  const char* op = "trie_attention_rows";
  const GivenTables tables{enter, leave, depth, row_of, path, kv_index, cu_seqlens_q, num_nodes};
  check_index_like(op, "rows", rows, cpu());
  RowsForward p{checked_problem(op, q, k, v, tables, scale, sliding_window, 1, kMultiple, Queries::kOfSomeRows)};
  const int64_t count = q.size(0);
  RADIX_CHECK(
      rows.size(0) == count, op, "rows must hold one row for each of the ", count, " queries, got ", rows.size(0));
  std::vector<int32_t> wanted(count);
  copy_checked(op, "rows", as_contiguous(rows), count, p.num_rows, "rows", wanted.data());
  const int64_t out_sizes[] = {count, q.size(1), v.size(2)};
  Tensor out = empty_at(cpu(), out_sizes, 3, dtype_code_of(q));
  p.out = static_cast<char*>(out.mutable_data_ptr());
  find_queries(p, wanted, q.size(1) * v.size(2) * static_cast<int64_t>(out.element_size()));
  if (p.queries.empty()) {
    return out;
  }
  cut_into_blocks(p);
  int64_t num_keys = 0;
  for (const QueryBlock& block : p.blocks) {
    num_keys += static_cast<int64_t>(block.key_numbers.size()) - block.block.skipped;
  }
  const int64_t num_tasks = static_cast<int64_t>(p.blocks.size()) * p.k.heads;
  const double work = double(num_keys) * p.num_lanes * (p.key_size + p.value_size) * p.k.heads;
  with_number_types(op, q, [&](auto stored, auto wide) {
    std::atomic<int64_t> next = 0;
    run_in_threads(num_tasks, work, [&] { run_for_processor<RowsKernel<decltype(stored), decltype(wide)>>(p, next); });
  });
  return out;
}

}  // namespace
}  // namespace radix

STABLE_TORCH_LIBRARY_IMPL(radix, CPU, m) {
  m.impl("trie_attention_rows", TORCH_BOX(&radix::trie_attention_rows_cpu));
}
