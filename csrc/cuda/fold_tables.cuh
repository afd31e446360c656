// The kernel that writes the tables of a fold, once the host knows how long they are.
//
// The inverses of unfold_index and kv_index list, for each row, the tokens and the K/V rows that are it, ascending. A
// sort would take a dozen launches. But whether a later sequence comes along a row is one comparison, at the row's
// depth in that sequence: so where sequences are few, the thread of a row's first token looks into all later ones,
// first to count and then, from where the rows before it end, to write.
#pragma once

#include "fold_kernels.cuh"

namespace radix {

// The rows that one sequence adds, from the summaries of the sequences up to it.
struct Added {
  int64_t start;
  int64_t length;
  int64_t count;  // its last tokens
  int64_t first_row;
  int64_t first_kv_row;

  __device__ Added(const Steps& steps, int64_t sequence)
      : start(steps.batch.cu_seqlens[sequence]),
        length(steps.batch.length(sequence)),
        count(length - steps.shared[sequence]),
        first_row(sequence > 0 ? steps.summaries[sequence - 1].rows : 0),
        first_kv_row(sequence > 0 ? steps.summaries[sequence - 1].kv_rows : 0) {
  }

  __device__ int64_t row_of(int64_t token) const {
    return first_row + (token - (start + length - count));
  }
};

// How many tokens, and how many K/V rows, some rows are.
struct Members {
  uint32_t tokens;
  uint32_t kv_rows;
};

struct AddMembers {
  __device__ Members operator()(const Members& a, const Members& b) const {
    return Members{a.tokens + b.tokens, a.kv_rows + b.kv_rows};
  }
};

struct Tables {
  int64_t num_nodes;
  int64_t num_rows;
  int64_t num_kv_rows;
  void* ids;
  void* positions;
  int32_t* unfold_index;
  int32_t* fold_index;
  // Null where no plan is wanted, and tables without an entry.
  int32_t* cu_seqlens_q;
  int32_t* cu_seqlens_k;
  int32_t* run_sequences;
  int32_t* kv_index;
  int32_t* cu_seqlens;  // null where it isn't wanted
  // Null where no inverse is wanted from here.
  int32_t* unfold_indptr;
  int32_t* unfold_members;
  int32_t* kv_indptr;
  int32_t* kv_members;
  Members* before;  // [num_tokens] the members of rows before a token's own, among those of its block
  Members* totals;  // [blocks]
};

struct Writing {
  Steps steps;
  Tables out;
};

__device__ inline void store(void* data, bool wide, int64_t i, int64_t value) {
  if (wide) {
    static_cast<int64_t*>(data)[i] = value;
  } else {
    static_cast<int32_t*>(data)[i] = static_cast<int32_t>(value);
  }
}

// Runs body(sequence, its token, whether it adds rows) for each later sequence on whose path `token`, the first of its
// row, stands.
template <typename Body>
__device__ inline void for_each_later(const Steps& steps, int64_t token, const Body& body) {
  const Batch& batch = steps.batch;
  // Nothing writes to these here, so the loads of several rounds can be under way at once.
  const int32_t* __restrict__ shared = steps.shared;
  const int32_t* __restrict__ representatives = steps.representatives;
  const int64_t depth = token - batch.start(token);
#pragma unroll 4
  for (int64_t sequence = batch.sequences[token] + 1; sequence < batch.num_sequences; ++sequence) {
    if (shared[sequence] > depth) {
      const int64_t other = batch.cu_seqlens[sequence] + depth;
      if (representatives[other] == token) {
        body(sequence, other, shared[sequence] < batch.length(sequence));
      }
    }
  }
}

// Writes what a token says, and all of its row where it is its row's first. `before` are the members of the rows
// before.
template <bool kInverts>
__device__ inline void write_token(const Steps& steps, const Tables& out, int64_t token, Members before) {
  const Batch& batch = steps.batch;
  const int32_t first = steps.representatives[token];
  const int64_t row = Added(steps, batch.sequences[first]).row_of(first);
  out.unfold_index[token] = static_cast<int32_t>(row);
  const Added own(steps, batch.sequences[token]);
  const int64_t kv_row = own.first_kv_row + (token - own.start);
  if (out.kv_index != nullptr && own.count > 0) {
    out.kv_index[kv_row] = static_cast<int32_t>(row);
  }
  if (first != token) {
    return;
  }
  store(out.ids, batch.ids.wide, row, batch.ids[token]);
  store(out.positions, batch.positions.wide, row, batch.position(token));
  out.fold_index[row] = static_cast<int32_t>(token);
  if constexpr (kInverts) {
    out.unfold_indptr[row] = static_cast<int32_t>(before.tokens);
    out.kv_indptr[row] = static_cast<int32_t>(before.kv_rows);
    out.unfold_members[before.tokens++] = static_cast<int32_t>(token);
    out.kv_members[before.kv_rows++] = static_cast<int32_t>(kv_row);
    for_each_later(steps, token, [&](int64_t sequence, int64_t other, bool adds) {
      out.unfold_members[before.tokens++] = static_cast<int32_t>(other);
      if (adds) {
        const Added its(steps, sequence);
        out.kv_members[before.kv_rows++] = static_cast<int32_t>(its.first_kv_row + (other - its.start));
      }
    });
  }
}

template <bool kInverts>
__device__ inline void write_padding(const Tables& out, const Batch& batch) {
  for_each(out.num_rows - out.num_nodes, [&](int64_t i) {
    store(out.ids, batch.ids.wide, out.num_nodes + i, 0);
    store(out.positions, batch.positions.wide, out.num_nodes + i, 0);
    out.fold_index[out.num_nodes + i] = 0;
  });
  if constexpr (kInverts) {
    for_each(out.num_rows - out.num_nodes + 1, [&](int64_t i) {
      out.unfold_indptr[out.num_nodes + i] = static_cast<int32_t>(batch.num_tokens);
      out.kv_indptr[out.num_nodes + i] = static_cast<int32_t>(out.num_kv_rows);
    });
  }
}

__device__ inline void write_runs(const Steps& steps, const Tables& out) {
  const Batch& batch = steps.batch;
  for_each(batch.num_sequences, [&](int64_t sequence) {
    if (Added(steps, sequence).count > 0) {
      const Summary& summary = steps.summaries[sequence];
      out.run_sequences[summary.runs - 1] = static_cast<int32_t>(sequence);
      out.cu_seqlens_q[summary.runs] = summary.rows;
      out.cu_seqlens_k[summary.runs] = summary.kv_rows;
    }
  });
  for_each(1, [&](int64_t) { out.cu_seqlens_q[0] = out.cu_seqlens_k[0] = 0; });
  if (out.cu_seqlens != nullptr) {
    for_each(
        batch.num_sequences + 1, [&](int64_t i) { out.cu_seqlens[i] = static_cast<int32_t>(batch.cu_seqlens[i]); });
  }
}

// With kInverts the blocks wait for each other: all of them run at once.
template <bool kInverts>
__global__ void __launch_bounds__(kThreads, 3) write_tables(Writing writing) {
  using Scan = cub::BlockScan<Members, kThreads>;
  using Reduce = cub::BlockReduce<Members, kThreads>;
  __shared__ union {
    typename Scan::TempStorage scan;
    typename Reduce::TempStorage reduce;
  } storage;
  __shared__ Members earlier;
  const Steps& steps = writing.steps;
  const Tables& out = writing.out;
  const Share tokens(steps.batch.num_tokens, gridDim.x);
  if constexpr (kInverts) {
    Members total{0, 0};
    for (int64_t base = tokens.begin; base < tokens.end; base += kThreads) {
      const int64_t token = base + threadIdx.x;
      Members members{0, 0};
      if (token < tokens.end && steps.representatives[token] == token) {
        members = Members{1, 1};
        for_each_later(steps, token, [&](int64_t, int64_t, bool adds) {
          ++members.tokens;
          members.kv_rows += adds;
        });
      }
      Members before;
      Members sum;
      Scan(storage.scan).ExclusiveScan(members, before, Members{0, 0}, AddMembers{}, sum);
      __syncthreads();
      if (token < tokens.end) {
        out.before[token] = AddMembers{}(total, before);
      }
      total = AddMembers{}(total, sum);
    }
    if (threadIdx.x == 0) {
      out.totals[blockIdx.x] = total;
    }
    cooperative_groups::this_grid().sync();
    Members sum{0, 0};
    for (unsigned block = threadIdx.x; block < blockIdx.x; block += kThreads) {
      sum = AddMembers{}(sum, out.totals[block]);
    }
    sum = Reduce(storage.reduce).Reduce(sum, AddMembers{});
    if (threadIdx.x == 0) {
      earlier = sum;
    }
    __syncthreads();
  }
  for (int64_t token = tokens.begin + threadIdx.x; token < tokens.end; token += kThreads) {
    Members before{0, 0};
    if constexpr (kInverts) {
      before = AddMembers{}(earlier, out.before[token]);
    }
    write_token<kInverts>(steps, out, token, before);
  }
  write_padding<kInverts>(out, steps.batch);
  if (out.cu_seqlens_q != nullptr) {
    write_runs(steps, out);
  }
}

}  // namespace radix
