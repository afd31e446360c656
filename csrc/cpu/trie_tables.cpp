// Copies the tables of a trie, and checks the copies.
#include "trie_tables.h"

#include "index_checks.h"

#include <utility>

namespace radix {
namespace {

// Copies the first `length` entries, which must be in [0, bound). `what` names what the bound counts.
std::vector<int32_t> copied_index(
    const char* op, const char* name, const Tensor& tensor, int64_t length, int64_t bound, const char* what) {
  std::vector<int32_t> entries(length);
  copy_checked(op, name, as_contiguous(tensor), length, bound, what, entries.data());
  return entries;
}

}  // namespace

TrieTables checked_trie_tables(const char* op, const GivenTables& given, int64_t num_rows, const char* like) {
  const int64_t num_nodes = given.num_nodes;
  const std::pair<const char*, const Tensor*> by_row[] = {
      {"enter", &given.enter},
      {"leave", &given.leave},
      {"depth", &given.depth},
      {"row_of", &given.row_of},
      {"path", &given.path}};
  for (const auto& [name, x] : by_row) {
    check_index_like(op, name, *x, cpu());
    RADIX_CHECK(
        x->size(0) == num_rows, op, name, " must have as many rows as ", like, ", ", num_rows, ", got ", x->size(0));
  }
  check_index_like(op, "kv_index", given.kv_index, cpu());
  check_index_like(op, "cu_seqlens_q", given.cu_seqlens_q, cpu());
  RADIX_CHECK(
      num_nodes >= 0 && num_nodes <= num_rows,
      op,
      "num_nodes must be from 0 to the ",
      num_rows,
      " rows of ",
      like,
      ", got ",
      num_nodes);
  const int64_t num_keys = given.kv_index.size(0);
  const auto leaves = copied_index(op, "leave", given.leave, num_nodes, kMaxRows, "rows");
  const auto depths = copied_index(op, "depth", given.depth, num_nodes, num_nodes, "rows");
  const auto paths = copied_index(op, "path", given.path, num_nodes, num_keys, "entries of kv_index");
  const auto numbers = copied_index(op, "enter", given.enter, num_nodes, num_nodes, "rows");
  const auto keys = copied_index(op, "kv_index", given.kv_index, num_keys, num_nodes, "rows");
  TrieTables tables;
  tables.row_of = copied_index(op, "row_of", given.row_of, num_nodes, num_nodes, "rows");
  tables.leave.resize(num_nodes);
  tables.depth.resize(num_nodes);
  tables.parent.resize(num_nodes);

  // The rows on the path to the next one.
  std::vector<int32_t> above;
  for (int64_t i = 0; i < num_nodes; ++i) {
    const int64_t row = tables.row_of[i], end = leaves[row], rows_above = depths[row], begin = paths[row];
    RADIX_CHECK(
        numbers[row] == i, op, "row_of must be the inverse of enter, but enter[row_of[", i, "]] is ", numbers[row]);
    RADIX_CHECK(end > i, op, "leave[", row, "] must be more than enter[", row, "], ", i, ", got ", end);
    while (!above.empty() && leaves[above.back()] <= i) {
      above.pop_back();
    }
    const int64_t most = above.empty() ? num_nodes : leaves[above.back()];
    RADIX_CHECK(
        end <= most, op, "leave[", row, "] must be at most ", most, ", where the subtree around it ends, got ", end);
    RADIX_CHECK(
        rows_above == static_cast<int64_t>(above.size()),
        op,
        "depth[",
        row,
        "] must be the ",
        above.size(),
        " rows that enter and leave put above it, got ",
        rows_above);
    RADIX_CHECK(begin + rows_above < num_keys, op, "path and depth of row ", row, " lead past the end of kv_index");
    // Rows of one run read one path, and the row above was checked against all but its end.
    const bool same_path = !above.empty() && paths[above.back()] == begin;
    RADIX_CHECK(
        keys[begin + rows_above] == row && (same_path || std::equal(above.begin(), above.end(), keys.begin() + begin)),
        op,
        "kv_index must hold the path to row ",
        row,
        " from path[",
        row,
        "], ",
        begin,
        ", on");
    tables.leave[i] = static_cast<int32_t>(end);
    tables.depth[i] = static_cast<int32_t>(rows_above);
    tables.parent[i] = above.empty() ? -1 : numbers[above.back()];
    above.push_back(static_cast<int32_t>(row));
  }
  return tables;
}

}  // namespace radix
