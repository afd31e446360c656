"""The ops of torch.ops.radix: each one's arguments, results, gradient and guarantees.

N packed tokens of B sequences make M trie nodes; with padding they are num_rows compact rows.

    fold(input_ids [N], position_ids [N], cu_seqlens [B + 1], pad_multiple_of=1)
        -> compact_input_ids, compact_position_ids [num_rows], unfold_index [N] (token -> row), fold_index [num_rows]
        (row -> the token where it first occurs).
    fold_plan(the same)
        -> those four; the inverse of unfold_index: unfold_indptr [num_rows + 1], unfold_members [N]; the R runs, which
        are the rows that each sequence adds: run_sequences [R], cu_seqlens_q [R + 1] over the rows, cu_seqlens_k
        [R + 1] over the tokens of those sequences; kv_index [K], the rows of those tokens, with its inverse kv_indptr
        [num_rows + 1], kv_members [K]; counts, int64 [4] on the CPU: M, longest run, longest and shortest sequence.
    fold_batch(the same, from_zero=False, front=False)
        -> fold_plan, and cu_seqlens in int32, a copy. With from_zero each sequence counts from 0, position_ids (of the
        right length, for example input_ids) are not read and the rows' positions are int64. With front the tokens are
        those in front: N is where cu_seqlens ends, what stands behind is not looked at.
    unpad(attention_mask [B, T], bool, int32 or int64)
        -> cu_seqlens, int32 [B + 1], places, int64 [B * T]: packed token i of a padded batch, whose rows are stretches
        of 1s with 0s around them, is at places[i] of the flat batch; behind the last token places are 0. If rows are
        no such stretches, cu_seqlens starts with minus their number, which no fold takes.
    gather(x [R, ...], index [N])
        -> x[index] [N, ...], of any dtype.
    scatter_add(src [N, ...], index [N], num_rows)
        -> out [num_rows, ...] with out[index[i]] += src[i]; float64, float32, float16, bfloat16 and integers.
    gather_kv(k [R, ...], v [R, ...], index [N]), scatter_add_kv(src_k [N, ...], src_v [N, ...], index [N], num_rows)
        -> gather or scatter_add of two tensors of one dtype by one index, in one pass on CUDA.
    gather.csr(x, index, indptr, members), scatter_add.csr(src, index, indptr, members, num_rows), and those of pairs
        -> the same, with the inverse of index at hand, so that neither scatter_add nor the backward of gather sorts:
        members[indptr[j]:indptr[j + 1]] are the i with index[i] == j.

The ops that `radix_ops.attention` calls (sliding_window 0: none; logsumexp is for the backward, and has no gradient):

    varlen_attention(q [num_rows, H, D], k [K, H_kv, D], v [K, H_kv, D_v], cu_seqlens_q, cu_seqlens_k, scale,
                     sliding_window=0)
        -> [num_rows, H, D_v], causal attention of runs over their sequences, aligned at the end. In every floating
        dtype; on CUDA it waits for the host and is slow.
    flash_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, num_queries, max_seqlen_q, max_seqlen_k, scale,
                    sliding_window=0)
        -> out, logsumexp [H, num_rows]: the same on CUDA in bfloat16 and float16, by torch's flash attention or that of
        `radix_ops.activate_flash_attention`. num_queries is the end of cu_seqlens_q, the largest lengths may be larger
        than they are. Nothing looks at the values of cu_seqlens, which must be a fold's: torch's kernels trust them,
        and others read and write outside the tensors. To look would take several launches in every layer.
    trie_order(cu_seqlens_q, cu_seqlens_k, kv_index, num_rows)
        -> enter, leave, depth, row_of, path, int32 [num_rows]: row k is on the path to row q exactly when enter[k] <=
        enter[q] < leave[k]; depth counts the rows above a row; row_of is the inverse of enter; the path to a row begins
        at kv_index[path]. For padding rows -1, -1, 0, themselves and any.
    trie_attention(q, k [num_rows, H_kv, D], v, enter, leave, depth, row_of, path, kv_index, cu_seqlens_q, num_nodes,
                   scale, sliding_window=0)
        -> out [num_rows, H, D_v], logsumexp [H, num_rows]: attention to the rows on the path, with no key or value
        unfolded. In every floating dtype; on the CPU, where sums are in fp32 (fp64 for float64) and the bits the same
        for any number of threads, by a kernel for AVX-512, AVX2 or neither (ATEN_CPU_CAPABILITY holds it to less, as it
        does torch), forward and backward; on CUDA in bfloat16 and float16 by Triton kernels, on compute capability
        9.0 at head_dim 128 without a window by the two ops below, otherwise it waits there for the host and is slow.
        The index tensors must be a fold's and trie_order's, which is checked on the CPU alone: on CUDA others give
        wrong results, and lead to no memory outside the arguments.
    trie_attention_sm90(q, k, v, leave, depth, row_of, path, kv_index, num_nodes, scale, sliding_window=0)
        -> out, logsumexp in base 2: the forward of trie_attention by the kernel for compute capability 9.0, of which it
        is a part; it has no gradient of its own. In bfloat16 and float16, at a head_dim of 64 or 128, of tensors whose
        rows and heads lie at multiples of 16 bytes, by contiguous int32 tables.
    trie_attention_backward_sm90(grad_out, q, k, v, out, logsumexp, leave, depth, row_of, path, kv_index, num_nodes,
                                 scale)
        -> grad_q, grad_k, grad_v: the backward that goes with it, at head_dim 128 without a window; grad_out, out and
        logsumexp must be contiguous.
    trie_attention_rows(q [W, H, D], k, v, rows [W], the same from enter on)
        -> out [W, H, D_v]: the same for the queries of some rows alone, in any order; rows may come twice, with equal
        queries, of which the first takes the whole gradient. On CUDA few queries walk their paths each on its own.

The ops that `radix_ops.plan` calls, on the CPU (sequence i is input_ids[starts[i]:starts[i] + lengths[i]], ids from 0):

    lexicographic_order(input_ids [N], starts [B], lengths [B])
        -> int64 [B], the sequences sorted by their tokens, a prefix before what goes on from it, equal ones in their
        order.
    common_prefix_lengths(input_ids, starts, lengths, order [K])
        -> int64 [K]: how many tokens sequence order[i] shares with order[i - 1] before they part; 0 for i = 0. In
        lexicographic order, all tokens minus these are the rows of the trie.
    cut_batches(lengths [B], shared [B], max_rows, max_tokens, max_positions, max_sequences, batch_cost=0)
        -> int64, the ends of batches of sequences in a row, whose lengths and shared tokens these are: those that lose
        the fewest shared tokens plus batch_cost for each batch. Rows, tokens, sequences and sequences times longest of
        a batch stay within the limits; a sequence beyond them is a batch of its own.

The ops of torch.ops.radix_losses, which `radix_ops.losses` calls and registers when it is imported, are its own parts:
head_plan, head and head_backward are there so that torch.compile takes them as they are. Call `radix_ops.losses`, whose
functions check their arguments; these ops trust theirs.

Two packed tokens share a row exactly when the (token, position) paths to them from the start of their sequences are
equal. Rows come in order of first occurrence; padding rows behind them hold token 0, position 0 and `fold_index` 0.
ids keep their dtype, int32 or int64; index outputs are int32; index arguments are int32 or int64. The fold is
RadixMLP's (arXiv 2601.15013, section 3).

`gather` and `scatter_add` are each other's gradient, so both can be differentiated any number of times. `scatter_add`
sums each row's entries one after another, in ascending order (the .csr overload: in the order of members), in fp32
(fp64 for float64; integers wrap): the result is the same bits on every run and for any number of threads. On CUDA a row
of more than 128 entries is summed in up to 128 parts, and the parts in order: the same bits on every run there too.
The attention ops can be differentiated once. A torch without the private parts that the ops' Autograd kernels
need gives the same gradients in backward mode; forward mode and torch.func's transforms are errors there.

Malformed arguments raise RuntimeError, which names the argument, before memory outside the arguments is read; so do
tensors whose storage was resized below what they claim. Tensors have at most 64 dimensions. On the CPU no entry of an
index or another table is read again once it is checked: where another thread rewrites one meanwhile, there is an error
or some answer, and no crash.

A fold looks tokens up by hashes under a key of its own, which comes from the operating system, not from torch: no
answer rests on it, and nobody can choose tokens that collide. Where they do all the same, a second key is tried, and
then sorting, which no input makes quadratic.

On CUDA, all ops run on the current stream. The folds copy 36 bytes to the host, once (again for a second key and for
sorting), and wait for them: they can't be captured in a CUDA graph; the others can, and never wait. cu_seqlens is
checked by fold; a value of index, indptr or members that is out of range, members that are not the inverse of index in
scatter_add, tables of trie_order that are no fold's, or a number in an int64 table of trie_attention's Triton kernels
that int32 does not hold, are device asserts, as in torch.index_select. (gather.csr takes from the inverse only which
rows to keep in the cache.) The Triton kernels take fewer than 2^31 pairs of a row and a query head of one key/value
head, less two blocks; more are refused.
"""

from . import autograd, dispatch, fakes  # noqa: F401  (each registers what it holds)
