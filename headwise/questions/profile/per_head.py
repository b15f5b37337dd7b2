"""What a profile says of every head: means and correlations, drawn from its parts.

Means and Pearson's correlations come from the moments of the parts. Spearman's needs ranks over all
tokens at once: `Kept` holds on to the columns it takes as far as the device has room, the rest is
read back from the table. Both are the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.measures import moments
from headwise.measures.spec import correlated
from headwise.measures.table import read_columns
from headwise.questions.profile.config import ProfileConfig
from headwise.questions.profile.parts import Block, Folders, read_moments

_RANKED_AT_ONCE = 1 << 27
_KEPT_BYTES = 1 << 31


class Kept:
    """Columns of the parts measured by this process, on the device, for Spearman's correlation."""

    def __init__(self, device: torch.device) -> None:
        self._parts: dict[str, Tensor] = {}
        self._room = _KEPT_BYTES
        if device.type == "cuda":
            self._room = min(self._room, torch.cuda.get_device_properties(device).total_memory // 64)

    def add(self, part: str, block: Block, dtype: torch.dtype, ignore_first: int) -> None:
        """Keep what ranks need of a part, in the dtype of the table, if there is room for it."""
        names = correlated(block.names)
        if not names:
            return
        # One by one: an index in a list would be copied to the device, and waited for.
        wanted = [block.values[block.names.index(name), ..., ignore_first:] for name in names]
        later = torch.stack(wanted).to(dtype)
        if later.nbytes <= self._room:
            self._room -= later.nbytes
            self._parts[part] = later

    def get(self, part: str) -> Tensor | None:
        """`(M, B, R, T)` of a part with the measures of `correlated`, where it was kept."""
        return self._parts.get(part)

    def spearman(self, n_parts: int) -> np.ndarray | None:
        """What `spearman` gives, if all parts were kept."""
        if not self._parts or len(self._parts) < n_parts:
            return None
        n_heads = next(iter(self._parts.values())).shape[2]
        size = sum(part.numel() for part in self._parts.values())
        return spearman(sorted(self._parts), lambda part, some: self._parts[part][:, :, some], n_heads, size)


def summarise(
    folders: Folders,
    config: ProfileConfig,
    kept: Kept,
    device: torch.device,
    ranked: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Means and correlations per head, from the parts of a profile.

    Args:
        ranked: Spearman's correlations, where they are known.

    Returns:
        Columns `layer`, `head`, `part` where heads have some (empty for whole ones), `uniform_keys` and
        `uniform_distance` (mean number of keys that a query sees, and their mean distance), the measures,
        `pearson_<measure>` and, of a table with tokens, `spearman_<measure>`, each `(R,)`. Correlations leave
        out the first `ignore_first` tokens.
    """
    names, rows, of_heads, total = read_moments(folders)
    found = {"layer": rows[:, 0].astype(int), "head": rows[:, 1].astype(int)}
    found |= {"part": np.array(of_heads)} if any(of_heads) else {}
    found |= {"uniform_keys": rows[:, 2], "uniform_distance": rows[:, 3]}
    found |= {name: total.mean[m] for m, name in enumerate(names)}
    linear = moments.pearson(total, names)
    found |= {f"pearson_{name}": r for name, r in linear.items()}
    if not config.aggregate and linear:
        if ranked is None:
            ranked = _ranked(folders, config, kept, device, correlated(names), len(rows))
        found |= {f"spearman_{name}": r for name, r in zip(linear, ranked, strict=True)}
    return found


def _ranked(
    folders: Folders, config: ProfileConfig, kept: Kept, device: torch.device, names: list[str], n_heads: int
) -> np.ndarray:
    """Spearman's correlations from what was kept and, for the rest, from the table."""

    def values(part: str, some: slice) -> Tensor:
        here = kept.get(part)
        if here is not None:
            return here[:, :, some]
        path = folders.heads / f"{part}.parquet"
        table = read_columns(path, names)
        if not table.num_rows or table.num_rows % (n_heads * config.context_length):
            raise HeadwiseError(
                f"{path} has {table.num_rows} rows, and {n_heads} heads of {config.context_length} tokens "
                "make others; delete it and run again"
            )
        shape = (-1, n_heads, config.context_length)
        columns = [table[name].to_numpy().reshape(shape)[:, some, config.ignore_first :] for name in names]
        return torch.from_numpy(np.stack(columns)).to(device)

    found = sorted(path.stem for path in folders.heads.glob("*.parquet"))
    size = len(names) * n_heads * config.n_samples * (config.context_length - config.ignore_first)
    return spearman(found, values, n_heads, size)


def spearman(
    parts: Sequence[str], values: Callable[[str, slice], Tensor], n_heads: int, size: int
) -> np.ndarray:
    """Spearman's correlation of the first of M measures with each other one, `(M - 1, R)`.

    Args:
        parts: their names, in order.
        values: `(M, B, ·, T)` of some heads of a part.
        n_heads: R.
        size: number of values in all; over as many heads as bounded memory takes at a time.
    """
    step, found = max(1, _RANKED_AT_ONCE * n_heads // size), []
    for low in range(0, n_heads, step):
        some = slice(low, min(low + step, n_heads))
        together = torch.cat([values(part, some) for part in parts], dim=1)
        found.append(moments.spearman(together.float().movedim(1, 2).flatten(2)).cpu().numpy())
    return np.concatenate(found, axis=1)
