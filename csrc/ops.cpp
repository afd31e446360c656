// Schemas of torch.ops.radix.*. Kernels register themselves in csrc/cpu and csrc/cuda.
#include "check.h"

STABLE_TORCH_LIBRARY(radix, m) {
  m.def(
      "fold(Tensor input_ids, Tensor position_ids, Tensor cu_seqlens, int pad_multiple_of=1)"
      " -> (Tensor compact_input_ids, Tensor compact_position_ids, Tensor unfold_index, Tensor fold_index)");
  m.def(
      "fold_plan(Tensor input_ids, Tensor position_ids, Tensor cu_seqlens, int pad_multiple_of=1)"
      " -> (Tensor compact_input_ids, Tensor compact_position_ids, Tensor unfold_index, Tensor fold_index,"
      " Tensor unfold_indptr, Tensor unfold_members, Tensor run_sequences, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
      " Tensor kv_index, Tensor kv_indptr, Tensor kv_members, Tensor counts)");
  m.def(
      "fold_batch(Tensor input_ids, Tensor position_ids, Tensor cu_seqlens, int pad_multiple_of=1,"
      " bool from_zero=False, bool front=False)"
      " -> (Tensor compact_input_ids, Tensor compact_position_ids, Tensor unfold_index, Tensor fold_index,"
      " Tensor unfold_indptr, Tensor unfold_members, Tensor run_sequences, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
      " Tensor kv_index, Tensor kv_indptr, Tensor kv_members, Tensor counts, Tensor cu_seqlens)");
  m.def("unpad(Tensor attention_mask) -> (Tensor cu_seqlens, Tensor places)");
  m.def("gather(Tensor x, Tensor index) -> Tensor");
  m.def("gather.csr(Tensor x, Tensor index, Tensor indptr, Tensor members) -> Tensor");
  m.def("gather_kv(Tensor k, Tensor v, Tensor index) -> (Tensor, Tensor)");
  m.def("gather_kv.csr(Tensor k, Tensor v, Tensor index, Tensor indptr, Tensor members) -> (Tensor, Tensor)");
  m.def("scatter_add(Tensor src, Tensor index, SymInt num_rows) -> Tensor");
  m.def("scatter_add.csr(Tensor src, Tensor index, Tensor indptr, Tensor members, SymInt num_rows) -> Tensor");
  m.def("scatter_add_kv(Tensor src_k, Tensor src_v, Tensor index, SymInt num_rows) -> (Tensor, Tensor)");
  m.def(
      "scatter_add_kv.csr(Tensor src_k, Tensor src_v, Tensor index, Tensor indptr, Tensor members, SymInt num_rows)"
      " -> (Tensor, Tensor)");
  m.def(
      "varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
      " float scale, int sliding_window=0) -> Tensor");
  m.def(
      "varlen_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q,"
      " Tensor cu_seqlens_k, float scale, int sliding_window=0) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  m.def(
      "flash_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt num_queries,"
      " SymInt max_seqlen_q, SymInt max_seqlen_k, float scale, int sliding_window=0)"
      " -> (Tensor out, Tensor logsumexp)");
  m.def(
      "flash_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp,"
      " Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt num_queries, SymInt max_seqlen_q, SymInt max_seqlen_k,"
      " float scale, int sliding_window=0) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  m.def(
      "trie_order(Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor kv_index, SymInt num_rows)"
      " -> (Tensor enter, Tensor leave, Tensor depth, Tensor row_of, Tensor path)");
  m.def(
      "trie_attention(Tensor q, Tensor k, Tensor v, Tensor enter, Tensor leave, Tensor depth, Tensor row_of,"
      " Tensor path, Tensor kv_index, Tensor cu_seqlens_q, SymInt num_nodes, float scale, int sliding_window=0)"
      " -> (Tensor out, Tensor logsumexp)");
  m.def(
      "trie_attention_rows(Tensor q, Tensor k, Tensor v, Tensor rows, Tensor enter, Tensor leave, Tensor depth,"
      " Tensor row_of, Tensor path, Tensor kv_index, Tensor cu_seqlens_q, SymInt num_nodes, float scale,"
      " int sliding_window=0) -> Tensor");
  m.def(
      "trie_attention_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp,"
      " Tensor enter, Tensor leave, Tensor depth, Tensor row_of, Tensor path, Tensor kv_index, Tensor cu_seqlens_q,"
      " SymInt num_nodes, float scale, int sliding_window=0) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  m.def(
      "trie_attention_sm90(Tensor q, Tensor k, Tensor v, Tensor leave, Tensor depth, Tensor row_of, Tensor path,"
      " Tensor kv_index, SymInt num_nodes, float scale, int sliding_window=0) -> (Tensor out, Tensor logsumexp)");
  m.def(
      "trie_attention_backward_sm90(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor logsumexp,"
      " Tensor leave, Tensor depth, Tensor row_of, Tensor path, Tensor kv_index, SymInt num_nodes, float scale)"
      " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)");
  m.def("lexicographic_order(Tensor input_ids, Tensor starts, Tensor lengths) -> Tensor");
  m.def("common_prefix_lengths(Tensor input_ids, Tensor starts, Tensor lengths, Tensor order) -> Tensor");
  m.def(
      "cut_batches(Tensor lengths, Tensor shared, int max_rows, int max_tokens, int max_positions, int max_sequences,"
      " int batch_cost=0) -> Tensor");
}
