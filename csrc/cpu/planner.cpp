// radix::lexicographic_order, radix::common_prefix_lengths and radix::cut_batches: what a plan of batches is made of.
// They look at whole data sets, so sequences are given by their starts and lengths and may stand in a mapped file.
#include "../integers.h"

#include <deque>
#include <utility>

namespace radix {
namespace {

struct Sequences {
  Tensor ids;
  std::vector<int64_t> starts;
  std::vector<int64_t> lengths;
  int64_t count;
};

Sequences sequences_of(const char* op, const Tensor& input_ids, const Tensor& starts, const Tensor& lengths) {
  check_index_like(op, "input_ids", input_ids, cpu());
  check_index_like(op, "starts", starts, cpu());
  check_index_like(op, "lengths", lengths, cpu());
  RADIX_CHECK(
      starts.size(0) == lengths.size(0),
      op,
      "starts and lengths must be equally long, got ",
      starts.size(0),
      " and ",
      lengths.size(0));
  Sequences sequences{as_contiguous(input_ids), values_of(starts), values_of(lengths), starts.size(0)};
  const int64_t num_tokens = input_ids.size(0);
  for (int64_t i = 0; i < sequences.count; ++i) {
    const int64_t start = sequences.starts[i];
    const int64_t length = sequences.lengths[i];
    RADIX_CHECK(
        start >= 0 && length >= 0 && length <= num_tokens && start <= num_tokens - length,
        op,
        "sequence ",
        i,
        " starts at ",
        start,
        " and has ",
        length,
        " tokens, which does not lie within the ",
        num_tokens,
        " tokens of input_ids");
  }
  return sequences;
}

// Returns how many of the tokens from `begin` up to `end` two sequences have in common before they part.
template <typename Id>
int64_t agreement(const Id* a, const Id* b, int64_t begin, int64_t end) {
  int64_t i = begin;
  while (i < end && a[i] == b[i]) {
    ++i;
  }
  return i - begin;
}

// The next tokens as one number that compares as they do: two of 32 bits or one of 64. A 0 stands for the end, which
// comes before all tokens; tokens are not negative, so token + 1 fits.
template <typename Id>
struct Key {
  static constexpr int64_t kTokens = sizeof(Id) == 4 ? 2 : 1;

  static uint64_t of(const Id* tokens, int64_t remaining) {
    if constexpr (kTokens == 1) {
      return remaining > 0 ? static_cast<uint64_t>(tokens[0]) + 1 : 0;
    } else {
      const uint64_t first = remaining > 0 ? static_cast<uint64_t>(tokens[0]) + 1 : 0;
      const uint64_t second = remaining > 1 ? static_cast<uint64_t>(tokens[1]) + 1 : 0;
      return first << 32 | second;
    }
  }

  static bool holds_the_end(uint64_t key) {
    return kTokens == 1 ? key == 0 : (key & 0xffffffff) == 0;
  }
};

using Entry = std::pair<uint64_t, int64_t>;  // key, sequence: equal sequences stay in their order

// Returns how many tokens all sequences of a range share; `depth` of them are known. Stretches that grow are compared,
// so that little is read in vain where one sequence parts from the others early.
template <typename Id>
int64_t shared_depth(const Sequences& sequences, const Entry* begin, const Entry* end, int64_t depth) {
  const Id* ids = sequences.ids.const_data_ptr<Id>();
  const Id* first = ids + sequences.starts[begin->second];
  int64_t shortest = sequences.lengths[begin->second];
  for (const Entry* entry = begin + 1; entry < end; ++entry) {
    shortest = std::min(shortest, sequences.lengths[entry->second]);
  }
  for (int64_t stretch = 8; depth < shortest; stretch *= 2) {
    const int64_t goal = std::min(shortest, depth + stretch);
    int64_t until = goal;
    for (const Entry* entry = begin + 1; entry < end && until > depth; ++entry) {
      until = depth + agreement(first, ids + sequences.starts[entry->second], depth, until);
    }
    depth = until;
    if (until < goal) {
      break;
    }
  }
  return depth;
}

template <typename Id>
void sort_sequences(const char* op, const Sequences& sequences, int64_t* order) {
  const Id* ids = sequences.ids.const_data_ptr<Id>();
  for (int64_t i = 0; i < sequences.count; ++i) {
    const Id* first = ids + sequences.starts[i];
    const int64_t length = sequences.lengths[i];
    const Id* negative = std::find_if(first, first + length, [](Id id) { return id < 0; });
    RADIX_CHECK(
        negative == first + length,
        op,
        "token ids must not be negative, got ",
        *negative,
        " in sequence ",
        i,
        " at position ",
        negative - first);
  }

  // Sorts by the most significant tokens first. Ranges wait on a stack: a recursion would be as deep as prefixes nest.
  struct Range {
    int64_t begin;
    int64_t end;
    int64_t depth;  // tokens that all sequences of the range share
  };
  std::vector<Entry> entries(sequences.count);
  for (int64_t i = 0; i < sequences.count; ++i) {
    entries[i].second = i;
  }
  std::vector<Range> stack{{0, sequences.count, 0}};
  while (!stack.empty()) {
    auto [begin, end, depth] = stack.back();
    stack.pop_back();
    if (end - begin < 2) {
      continue;
    }
    depth = shared_depth<Id>(sequences, entries.data() + begin, entries.data() + end, depth);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sequence = entries[i].second;
      entries[i].first = Key<Id>::of(ids + sequences.starts[sequence] + depth, sequences.lengths[sequence] - depth);
    }
    std::sort(entries.begin() + begin, entries.begin() + end);
    for (int64_t i = begin; i < end;) {
      const uint64_t key = entries[i].first;
      int64_t next = i + 1;
      while (next < end && entries[next].first == key) {
        ++next;
      }
      if (next - i > 1 && !Key<Id>::holds_the_end(key)) {
        stack.push_back({i, next, depth + Key<Id>::kTokens});
      }
      i = next;
    }
  }
  for (int64_t i = 0; i < sequences.count; ++i) {
    order[i] = entries[i].second;
  }
}

Tensor lexicographic_order_cpu(const Tensor& input_ids, const Tensor& starts, const Tensor& lengths) {
  const char* op = "lexicographic_order";
  const Sequences sequences = sequences_of(op, input_ids, starts, lengths);
  Tensor order = empty_at(cpu(), sequences.count, aoti_torch_dtype_int64());
  auto* const sort = is_int32(sequences.ids) ? &sort_sequences<int32_t> : &sort_sequences<int64_t>;
  sort(op, sequences, order.mutable_data_ptr<int64_t>());
  return order;
}

template <typename Id>
void measure(const Sequences& sequences, const std::vector<int64_t>& order, int64_t* shared) {
  const Id* ids = sequences.ids.const_data_ptr<Id>();
  for (size_t i = 1; i < order.size(); ++i) {
    const int64_t before = order[i - 1];
    const int64_t after = order[i];
    const int64_t end = std::min(sequences.lengths[before], sequences.lengths[after]);
    shared[i] = agreement(ids + sequences.starts[before], ids + sequences.starts[after], 0, end);
  }
}

Tensor common_prefix_lengths_cpu(
    const Tensor& input_ids, const Tensor& starts, const Tensor& lengths, const Tensor& order) {
  const char* op = "common_prefix_lengths";
  const Sequences sequences = sequences_of(op, input_ids, starts, lengths);
  check_index_like(op, "order", order, cpu());
  const std::vector<int64_t> indices = values_of(order);
  const int64_t count = order.size(0);
  for (int64_t i = 0; i < count; ++i) {
    RADIX_CHECK(
        indices[i] >= 0 && indices[i] < sequences.count,
        op,
        "order must hold indices of the ",
        sequences.count,
        " sequences, got ",
        indices[i],
        " at index ",
        i);
  }
  Tensor shared = empty_at(cpu(), count, aoti_torch_dtype_int64());
  int64_t* out = shared.mutable_data_ptr<int64_t>();
  if (count > 0) {
    out[0] = 0;
  }
  (is_int32(sequences.ids) ? &measure<int32_t> : &measure<int64_t>)(sequences, indices, out);
  return shared;
}

// Holds the sum of as many int64 as there may be.
using Sum = __int128;

// Finds the cheapest cuts of a row of sequences. A batch that starts at sequence i computes again what i shares with
// the one before it, and costs batch_cost. The least cost of the first n sequences follows from those of fewer, over a
// window of possible last cuts that only moves on.
Tensor cut_batches_cpu(
    const Tensor& lengths,
    const Tensor& shared,
    int64_t max_rows,
    int64_t max_tokens,
    int64_t max_positions,
    int64_t max_sequences,
    int64_t batch_cost) {
  const char* op = "cut_batches";
  check_index_like(op, "lengths", lengths, cpu());
  check_index_like(op, "shared", shared, cpu());
  RADIX_CHECK(
      lengths.size(0) == shared.size(0),
      op,
      "lengths and shared must be equally long, got ",
      lengths.size(0),
      " and ",
      shared.size(0));
  const std::pair<const char*, int64_t> limits[] = {
      {"max_rows", max_rows},
      {"max_tokens", max_tokens},
      {"max_positions", max_positions},
      {"max_sequences", max_sequences}};
  for (const auto& [name, limit] : limits) {
    RADIX_CHECK(limit >= 1, op, name, " must be at least 1, got ", limit);
  }
  RADIX_CHECK(batch_cost >= 0, op, "batch_cost must not be negative, got ", batch_cost);
  const std::vector<int64_t> length = values_of(lengths), share = values_of(shared);
  const int64_t count = lengths.size(0);
  for (int64_t i = 0; i < count; ++i) {
    const bool fits = length[i] >= 0 && share[i] >= 0 && share[i] <= length[i] && (i == 0 || share[i] <= length[i - 1]);
    RADIX_CHECK(
        fits,
        op,
        "shared must be from 0 to the lengths of a sequence and the one before it, got ",
        share[i],
        " at ",
        i);
  }

  std::vector<Sum> cost(count + 1, 0);
  std::vector<int64_t> last_cut(count + 1, 0);
  std::deque<int64_t> longest;  // sequences of the window that are longer than all behind them
  std::deque<int64_t> cuts;     // possible last cuts in the window that are no dearer than all behind them
  int64_t first = 0;
  Sum rows = 0;
  Sum tokens = 0;
  const auto cost_of_cut = [&](int64_t i) { return cost[i] + (i > 0 ? share[i] : 0); };
  for (int64_t end = 1; end <= count; ++end) {
    const int64_t added = end - 1;
    rows += length[added] - (added > first ? share[added] : 0);
    tokens += length[added];
    while (!longest.empty() && length[longest.back()] <= length[added]) {
      longest.pop_back();
    }
    longest.push_back(added);
    while (!cuts.empty() && cost_of_cut(cuts.back()) > cost_of_cut(added)) {
      cuts.pop_back();
    }
    cuts.push_back(added);
    const auto is_full = [&] {
      const int64_t most = length[longest.front()];
      const int64_t sequences = end - first;
      return rows > max_rows || tokens > max_tokens || sequences > max_sequences ||
             (most > 0 && sequences > max_positions / most);
    };
    while (first < added && is_full()) {
      // The next sequence starts the window and has nothing in front to share with.
      rows -= length[first] - share[first + 1];
      tokens -= length[first];
      if (longest.front() == first) {
        longest.pop_front();
      }
      if (cuts.front() == first) {
        cuts.pop_front();
      }
      ++first;
    }
    last_cut[end] = cuts.front();
    cost[end] = cost_of_cut(cuts.front()) + batch_cost;
  }
  std::vector<int64_t> ends;
  for (int64_t end = count; end > 0; end = last_cut[end]) {
    ends.push_back(end);
  }
  Tensor result = empty_at(cpu(), static_cast<int64_t>(ends.size()), aoti_torch_dtype_int64());
  std::reverse_copy(ends.begin(), ends.end(), result.mutable_data_ptr<int64_t>());
  return result;
}

}  // namespace
}  // namespace radix

STABLE_TORCH_LIBRARY_IMPL(radix, CPU, m) {
  m.impl("lexicographic_order", TORCH_BOX(&radix::lexicographic_order_cpu));
  m.impl("common_prefix_lengths", TORCH_BOX(&radix::common_prefix_lengths_cpu));
  m.impl("cut_batches", TORCH_BOX(&radix::cut_batches_cpu));
}
