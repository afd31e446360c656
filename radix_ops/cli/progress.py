"""Progress of what takes long, on standard error."""

from __future__ import annotations

from ..engine.errors import needs


def progress_bar(total: int, desc: str, unit: str, delay: float = 0):
    """Return a tqdm bar on standard error; it shows after `delay` seconds."""
    needs("tqdm", "hf")
    from tqdm import tqdm

    return tqdm(total=total, desc=desc, unit=unit, unit_scale=True, delay=delay)
