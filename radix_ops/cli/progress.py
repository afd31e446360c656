"""Progress of what takes long, on standard error."""

from __future__ import annotations

from ..engine.errors import UserError


def progress_bar(total: int, desc: str, unit: str, delay: float = 0):
    """Return a tqdm bar on standard error; it shows after `delay` seconds."""
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise UserError("radix-ops needs tqdm: pip install tqdm") from error
    return tqdm(total=total, desc=desc, unit=unit, unit_scale=True, delay=delay)
