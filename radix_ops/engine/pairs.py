"""The pairs of embeddings that are nearest to each other, found by comparing all of them block by block."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

_ROWS_AT_ONCE = 2048  # of which each block is compared with each other one


def nearest_pairs(embeddings: np.ndarray, k: int, device: torch.device | str = "cpu") -> tuple[np.ndarray, np.ndarray]:
    """Return the cosines, float32 [P], and the rows, int64 [P, 2], of the k nearest pairs of float embeddings [N, D].

    Nearest come first, and the lower row of a pair; P is k, or the number of all pairs where those are fewer. A row of
    zeros has the cosine 0 to any other. N may be large and `embeddings` a memory map: time is that of N^2 D / 2
    products, and memory holds two blocks of rows, their products and k pairs.
    """

    def unit(first: int) -> torch.Tensor:
        block = np.array(embeddings[first : first + _ROWS_AT_ONCE], np.float32)
        return F.normalize(torch.from_numpy(block).to(device), dim=1)

    best = torch.empty(0, device=device)
    pairs = torch.empty(0, 2, dtype=torch.int64, device=device)
    for first in range(0, len(embeddings), _ROWS_AT_ONCE):
        rows = unit(first)
        for second in range(first, len(embeddings), _ROWS_AT_ONCE):
            columns = rows if second == first else unit(second)
            cosines = rows @ columns.T
            if second == first:
                cosines.masked_fill_(torch.ones_like(cosines, dtype=torch.bool).tril(), -torch.inf)
            found, places = cosines.flatten().topk(min(k, cosines.numel()))
            places = places[found > (best[-1] if len(best) == k else -torch.inf)]
            found = found[: len(places)]
            where = torch.stack([first + places // len(columns), second + places % len(columns)], 1)
            best, chosen = torch.cat([best, found]).sort(descending=True, stable=True)
            best, pairs = best[:k], torch.cat([pairs, where])[chosen[:k]]
    return best.cpu().numpy(), pairs.cpu().numpy()
