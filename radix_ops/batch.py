"""FoldedBatch: a batch of sequences as the rows of its prefix trie, and the maps between tokens and rows."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
from torch import Tensor

from ._integers import Integers, Mask, TokenIds, as_integers, as_packed_integers, as_tensor
from ._padded import shorten, unpad
from ._transfer import copy_together, pin_together, to_device

Side: TypeAlias = Literal["right", "left"]


@dataclasses.dataclass(eq=False)
class FoldedBatch:
    """All that a model needs to know of a batch. Make one with `fold`, `pack`, `from_sequences` or `from_padded`.

    N tokens of B sequences stand packed, one sequence after another; the trie's M nodes, and padding behind them, are
    the num_rows compact rows. A model computes on rows; attention unfolds the keys and values it needs. Tensors are
    on one device; index tensors are int32. It is a pytree and can be an argument of compiled and exported functions,
    and `torch.load` reads a saved one with `weights_only`, where radix_ops is imported.

    The fields belong together. Where one was altered by hand and does not fit the others, `to_padded`, `last_rows` and
    attention raise on the CPU rather than cut. On CUDA the first two are device asserts, and attention trusts them.

    Attributes:
        input_ids: [num_rows].
        position_ids: [num_rows].
        unfold_index: [N] packed token -> its row.
        fold_index: [num_rows] row -> the packed token where it first occurs; 0 for padding rows.
        unfold_indptr: [num_rows + 1] with unfold_members: row -> all its packed tokens.
        unfold_members: [N].
        run_sequences: [R] the sequences that add rows, ascending.
        cu_seqlens_q: [R + 1] run r is the rows cu_seqlens_q[r]:cu_seqlens_q[r + 1].
        cu_seqlens_k: [R + 1] the ends of those sequences in kv_index.
        kv_index: [K] the rows of all tokens of those sequences.
        kv_indptr: [num_rows + 1] with kv_members: the inverse of kv_index.
        kv_members: [K].
        cu_seqlens: [B + 1].
        num_nodes: M, the rows without padding.
        max_seqlen_q: the longest run.
        max_seqlen_k: the longest sequence.
        min_seqlen: the shortest sequence; 0 if there is none.
    """

    input_ids: Tensor
    position_ids: Tensor
    unfold_index: Tensor
    fold_index: Tensor
    unfold_indptr: Tensor
    unfold_members: Tensor
    run_sequences: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    kv_index: Tensor
    kv_indptr: Tensor
    kv_members: Tensor
    cu_seqlens: Tensor
    num_nodes: int
    max_seqlen_q: int
    max_seqlen_k: int
    min_seqlen: int

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[TokenIds] | Integers,
        *,
        device: torch.device | str | None = None,
        pad_multiple_of: int = 1,
    ) -> FoldedBatch:
        """Fold token ids whose positions count from 0: lists, NumPy arrays or tensors [T] of any integer dtype.

        Ids on the CPU are folded there, and the batch then travels to `device` without blocking the host; tensors on
        a CUDA device are folded there. Ids become int64. Raises TypeError for anything but integers (bools and floats
        among them too), ValueError for what int64 does not hold, and as `fold` does.
        """
        if not isinstance(sequences, (Sequence, np.ndarray, Tensor)) or isinstance(sequences, (str, bytes)):
            raise TypeError(f"sequences must be a list of lists of token ids, got {type(sequences).__name__}")
        if not isinstance(sequences, Sequence) and sequences.ndim == 0:
            raise ValueError("sequences must be a list of lists of token ids, got shape []")
        input_ids, lengths = as_packed_integers("sequences", sequences)
        cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int64, device="cpu")
        batch = fold(input_ids, to_device(cu_seqlens, input_ids.device), pad_multiple_of=pad_multiple_of)
        return batch if device is None else batch.to(device, non_blocking=True)

    @classmethod
    def from_padded(
        cls,
        input_ids: Integers,
        attention_mask: Mask,
        position_ids: Integers | None = None,
        *,
        device: torch.device | str | None = None,
        pad_multiple_of: int = 1,
    ) -> FoldedBatch:
        """Fold the real tokens of a padded batch, input_ids [B, T], where attention_mask [B, T] is 1 (else 0).

        Padding may stand on either side of a row or on both; a row of padding alone is an empty sequence. Positions
        count from 0 at each row's first real token unless `position_ids` [B, T] gives them. Ids and positions are
        tensors or NumPy arrays as `fold` takes them, the mask is one of bools, integers or floats. The fold runs where
        the tensors are; the batch then travels to `device`, if one is given, without blocking the host. On CUDA the
        host waits once, as in any fold, and B * T may be 2^31 - 1 at most. Raises TypeError for anything but tensors
        and arrays and for other dtypes, ValueError for shapes or devices that differ, a mask with other values than 0
        and 1, and a mask with a hole.
        """
        batch, _ = fold_padded(input_ids, attention_mask, position_ids, pad_multiple_of)
        return batch if device is None else batch.to(device, non_blocking=True)

    @property
    def num_tokens(self) -> int:
        """N, the packed tokens."""
        return self.unfold_index.shape[0]

    @property
    def num_rows(self) -> int:
        """M and the padding rows behind it: the length of every tensor of rows."""
        return self.fold_index.shape[0]

    @property
    def num_sequences(self) -> int:
        """B, empty sequences and duplicates included."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def lengths(self) -> Tensor:
        """[B] tokens of each sequence."""
        return self.cu_seqlens.diff()

    @property
    def compact_ratio(self) -> float:
        """M / N; 1.0 means that nothing is shared (or that there are no tokens)."""
        return self.num_nodes / self.num_tokens if self.num_tokens else 1.0

    @property
    def last_rows(self) -> Tensor:
        """[B] the row of each sequence's last token. Raises ValueError if a sequence is empty."""
        if torch.compiler.is_compiling():
            torch._check(self.min_seqlen > 0, lambda: "last_rows: a sequence of the batch is empty")
        elif self.num_sequences and self.min_seqlen == 0:
            raise ValueError("last_rows: a sequence of the batch is empty, so it has no last row")
        _require((self._lengths_of_all_tokens() > 0).all(), "min_seqlen must be 0 where a sequence is empty")
        return self.unfold_index[self.cu_seqlens[1:] - 1]

    def fold(self, x: Tensor) -> Tensor:
        """x [N, ...] of packed tokens -> [num_rows, ...]; a row takes its first token's value, padding that of token 0.

        Right for values that are equal wherever tokens share a row. Differentiable.
        """
        self._check_length("fold", x, self.num_tokens, "num_tokens")
        return torch.ops.radix.gather(x, self.fold_index)

    def unfold(self, x: Tensor) -> Tensor:
        """x [num_rows, ...] of rows -> [N, ...] of packed tokens. Differentiable: tokens that share a row add up."""
        self._check_length("unfold", x, self.num_rows, "num_rows")
        return torch.ops.radix.gather.csr(x, self.unfold_index, self.unfold_indptr, self.unfold_members)

    def to_padded(self, x: Tensor, side: Side = "right", fill: float = 0) -> Tensor:
        """x [num_rows, ...] of rows -> [B, max_seqlen_k, ...] with `fill` on the given side, "right" or "left"."""
        if side not in get_args(Side):
            raise ValueError(f'side must be "right" or "left", got {side!r}')
        tokens = self.unfold(x)
        lengths = self._lengths_of_all_tokens()[:, None]
        _require((lengths <= self.max_seqlen_k).all(), "max_seqlen_k must be at least the longest sequence")
        columns = torch.arange(self.max_seqlen_k, device=tokens.device)
        mask = columns < lengths if side == "right" else columns >= self.max_seqlen_k - lengths
        padded = tokens.new_full((self.num_sequences, self.max_seqlen_k, *x.shape[1:]), fill)
        return padded.masked_scatter(mask.view(*mask.shape, *[1] * (x.dim() - 1)), tokens)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> FoldedBatch:
        """Return the batch with its tensors on `device`.

        From the CPU to CUDA with `non_blocking` all tensors travel in one copy through pinned memory. Towards the CPU
        `non_blocking` is not followed: the host would read what is not there yet.
        """
        device = torch.device(device)
        non_blocking = non_blocking and device.type == "cuda" and torch.cuda.is_available()
        if non_blocking and self.input_ids.device.type == "cpu":
            return self._moved(lambda tensors: copy_together(tensors, device))
        return self._moved(lambda tensors: [x.to(device, non_blocking=non_blocking) for x in tensors])

    def pin_memory(self) -> FoldedBatch:
        """Return the batch, which must be on the CPU, with its tensors side by side in pinned memory.

        `to(device, non_blocking=True)` then copies nothing on the host. A DataLoader with `pin_memory` calls it.
        Raises ValueError for a batch on another device, RuntimeError as torch does where there is no accelerator.
        """
        if self.input_ids.device.type != "cpu":
            raise ValueError(
                f"pin_memory: only a batch on the CPU can be pinned, this one is on {self.input_ids.device}"
            )
        return self._moved(pin_together)

    def _moved(self, move: Callable[[list[Tensor]], list[Tensor]]) -> FoldedBatch:
        """Return a batch of the tensors that `move` makes of this one's; what is one tensor stays one."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        tensors = {id(value): value for value in fields.values() if isinstance(value, Tensor)}
        moved = dict(zip(tensors, move(list(tensors.values())), strict=True))
        return FoldedBatch(**{name: moved.get(id(value), value) for name, value in fields.items()})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Fill a batch that was copied or pickled. Raises ValueError where a field is missing or of another kind."""
        for field in dataclasses.fields(self):
            kinds, named = ((Tensor,), "a tensor") if field.type == "Tensor" else ((int, torch.SymInt), "an integer")
            if not isinstance(state.get(field.name), kinds):
                raise ValueError(f"a saved FoldedBatch must hold {field.name}, {named}")
        vars(self).update(state)

    def _check_length(self, method: str, x: Tensor, wanted: int, name: str) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{method}: x must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() < 1 or x.shape[0] != wanted:
            raise ValueError(f"{method}: x must have {name}={wanted} rows in dim 0, got shape {list(x.shape)}")

    def _lengths_of_all_tokens(self) -> Tensor:
        """`lengths`, which must be those of the packed tokens."""
        lengths = self.lengths
        fits = (lengths >= 0).all() & (lengths.sum() == self.num_tokens) & (self.cu_seqlens[:1] == 0).all()
        _require(fits, "cu_seqlens must start at 0, not decrease and end at the number of packed tokens")
        return lengths

    def _check_num_nodes(self) -> None:
        """Raise RuntimeError unless the runs end at num_nodes: attention takes the rows behind them for padding."""
        _require((self.cu_seqlens_q[-1:] == self.num_nodes).all(), "num_nodes must be where cu_seqlens_q ends")

    def __repr__(self) -> str:
        """Sizes, the share of tokens that is computed, and the device; read without a look at any tensor's values."""
        if not all(
            isinstance(x, Tensor) for x in (self.input_ids, self.unfold_index, self.fold_index, self.cu_seqlens)
        ):
            return super().__repr__()  # a pytree of something else
        # Sizes that a tracer doesn't know can be shown, but not compared.
        is_known = isinstance(self.num_nodes, int) and isinstance(self.num_tokens, int)
        ratio = f"{self.compact_ratio:.3g}" if is_known else f"{self.num_nodes}/{self.num_tokens}"
        return (
            f"FoldedBatch(num_sequences={self.num_sequences}, num_tokens={self.num_tokens}, num_rows={self.num_rows}, "
            f"num_nodes={self.num_nodes}, compact_ratio={ratio}, device={self.input_ids.device})"
        )


torch.export.register_dataclass(FoldedBatch, serialized_type_name="radix_ops.FoldedBatch")
# Loading one runs no code of the file's, so torch.load may do it with weights_only, its default.
torch.serialization.add_safe_globals([FoldedBatch])


def fold(
    input_ids: Integers,
    cu_seqlens: Integers,
    position_ids: Integers | None = None,
    pad_multiple_of: int = 1,
) -> FoldedBatch:
    """Merge B packed sequences into their prefix trie.

    Args:
        input_ids: [N] integers, the sequences' tokens end to end.
        cu_seqlens: [B + 1] integers, 0 and then the end of each sequence.
        position_ids: [N] integers; each sequence counts from 0 if left out. Tokens merge only at equal positions.
        pad_multiple_of: the number of rows is rounded up to a multiple of it.

    All three are tensors on one device, or NumPy arrays. Ids and positions in int32 and int64 keep their dtype, those
    of other integers become int64; to check uint64 on CUDA, the host waits once more. Exact for every input. Raises
    TypeError for types and dtypes (bool is no integer), ValueError for shapes, devices and values.
    """
    return _fold(input_ids, cu_seqlens, position_ids, pad_multiple_of)


class HoleError(ValueError):
    """A row of a padded batch's mask is no unbroken stretch of 1s."""


def fold_padded(
    input_ids: Integers, attention_mask: Mask, position_ids: Integers | None, pad_multiple_of: int = 1
) -> tuple[FoldedBatch, Tensor]:
    """Return `FoldedBatch.from_padded`, and where its packed tokens stand in the flat padded batch, int64 [N].

    Raises HoleError for a mask with a hole or other values than 0 and 1, all else as `FoldedBatch.from_padded` does.
    """
    tokens = unpad(input_ids, attention_mask, position_ids)
    try:
        batch = _fold(tokens.input_ids, tokens.cu_seqlens, tokens.position_ids, pad_multiple_of, front=True)
    except ValueError:
        reason = tokens.why_broken()
        if reason is not None:
            raise HoleError(reason) from None
        raise
    return batch, tokens.places[: batch.num_tokens]


def pack(
    input_ids: Integers,
    cu_seqlens: Integers,
    position_ids: Integers | None = None,
    pad_multiple_of: int = 1,
) -> FoldedBatch:
    """Make the same batch with nothing folded: row i is packed token i. A model's baseline, through the same code.

    Arguments and errors are those of `fold`.
    """
    ids, cu_seqlens, positions = _check(input_ids, cu_seqlens, position_ids, pad_multiple_of)
    ends = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(ends)]
    num_tokens = ids.shape[0]
    if not ends or ends[0] != 0 or ends[-1] != num_tokens or min(lengths, default=0) < 0:
        raise ValueError(f"cu_seqlens must start at 0, not decrease and end at {num_tokens}, got {shorten(cu_seqlens)}")
    padding = -num_tokens % pad_multiple_of

    def padded(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(x, (0, padding))

    device = ids.device
    tokens = torch.arange(num_tokens, dtype=torch.int32, device=device)
    if positions is None:
        sequences = torch.searchsorted(cu_seqlens, tokens.to(cu_seqlens.dtype), right=True) - 1
        positions = tokens.long() - cu_seqlens[sequences]
    indptr = torch.arange(num_tokens + padding + 1, dtype=torch.int32, device=device).clamp_(max=num_tokens)
    runs = [s for s, length in enumerate(lengths) if length]
    run_sequences = to_device(torch.tensor(runs, dtype=torch.int32, device="cpu"), device)
    run_ends = to_device(torch.tensor([0] + [ends[s + 1] for s in runs], dtype=torch.int32, device="cpu"), device)
    return FoldedBatch(
        input_ids=padded(ids),
        position_ids=padded(positions),
        unfold_index=tokens,
        fold_index=padded(tokens),
        unfold_indptr=indptr,
        unfold_members=tokens,
        run_sequences=run_sequences,
        cu_seqlens_q=run_ends,
        cu_seqlens_k=run_ends,
        kv_index=tokens,
        kv_indptr=indptr,
        kv_members=tokens,
        cu_seqlens=cu_seqlens.to(torch.int32),
        num_nodes=num_tokens,
        max_seqlen_q=max(lengths, default=0),
        max_seqlen_k=max(lengths, default=0),
        min_seqlen=min(lengths, default=0),
    )


def _fold(
    input_ids: Integers,
    cu_seqlens: Integers,
    position_ids: Integers | None,
    pad_multiple_of: int,
    front: bool = False,
) -> FoldedBatch:
    """Fold by radix::fold_batch; with `front`, tokens behind the end of cu_seqlens are left out."""
    ids, ends, positions = _check(input_ids, cu_seqlens, position_ids, pad_multiple_of)
    from_zero = positions is None
    given = ids if positions is None else positions
    try:
        found: list[Any] = torch.ops.radix.fold_batch(ids, given, ends, pad_multiple_of, from_zero, front)
    except RuntimeError as error:
        if not str(error).startswith("radix::fold_batch: "):
            raise
        raise ValueError(str(error).removeprefix("radix::fold_batch: ")) from None
    *tables, counts, ends = found
    return FoldedBatch(*[*tables, ends, *counts.tolist()])


def _require(is_right: Tensor, message: str) -> None:
    """Raise RuntimeError on the CPU; on CUDA, where the host would wait, and in compiled code assert on the device."""
    torch._assert_async(is_right, f"{message}: this batch was altered by hand")


def _check(
    input_ids: Integers, cu_seqlens: Integers, position_ids: Integers | None, pad_multiple_of: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return input_ids, cu_seqlens and position_ids, if given, after the checks that need no look at values."""
    given: dict[str, Any] = {"input_ids": input_ids, "cu_seqlens": cu_seqlens}
    given |= {} if position_ids is None else {"position_ids": position_ids}
    for name, values in given.items():
        given[name] = tensor = as_integers(name, as_tensor(name, values))
        if tensor.dim() != 1:
            raise ValueError(f"{name} must have 1 dimension, got shape {list(tensor.shape)}")
        if tensor.device != given["input_ids"].device:
            raise ValueError(f"{name} is on {tensor.device}, but input_ids is on {given['input_ids'].device}")
    ids, ends, positions = given["input_ids"], given["cu_seqlens"], given.get("position_ids")
    if isinstance(pad_multiple_of, bool) or not isinstance(pad_multiple_of, (int, torch.SymInt)):
        raise TypeError(f"pad_multiple_of must be an int, got {type(pad_multiple_of).__name__}")
    if not 1 <= pad_multiple_of < 2**31:
        raise ValueError(f"pad_multiple_of must be from 1 to {2**31 - 1}, got {pad_multiple_of}")
    if positions is not None and positions.shape != ids.shape:
        raise ValueError(
            f"position_ids must be as long as input_ids, got {positions.shape[0]} positions for {ids.shape[0]} tokens"
        )
    return ids, ends, positions
