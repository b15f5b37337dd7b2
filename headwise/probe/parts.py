"""One part of a profile: from measures on the device to files, written while the device goes on."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.probe import moments
from headwise.probe.moments import Moments
from headwise.probe.observe import Collector
from headwise.storage import head_table
from headwise.storage.atomic import replacing

if TYPE_CHECKING:
    import pyarrow

_PENDING = 4
"""Parts that may wait to be written before the device waits too: what memory holds."""


Row = tuple[int, int, float, float]


@dataclass(frozen=True)
class Folders:
    """Where the parts of a profile lie."""

    out: Path

    @property
    def heads(self) -> Path:
        """The head table."""
        return self.out / "heads"

    @property
    def moments(self) -> Path:
        """What means and Pearson's correlations need of each part."""
        return self.out / "moments"

    @property
    def raw(self) -> Path:
        """q, k, v of chosen layers."""
        return self.out / "raw"

    def has(self, part: int) -> bool:
        """Whether a part is complete: its table is written last."""
        return (self.heads / f"{name_of(part)}.parquet").exists()


@dataclass(frozen=True)
class Block:
    """Measures of several contexts.

    Attributes:
        names: of the measures, M.
        rows: of each of the R heads layer, head, and `Rows.uniform`.
        values: `(M, B, R, T)` float32, on the device.
    """

    names: list[str]
    rows: list[Row]
    values: Tensor


def name_of(part: int) -> str:
    """File name of a part, without its ending."""
    return f"part_{part:06d}"


def take(collector: Collector) -> Block:
    """The measures of the forward pass that just ended, out of a collector of tokens.

    A measure that a layer does not offer is NaN there.

    Raises:
        HeadwiseError: there are none; says why.
    """
    if not collector.passes:
        collector.columns()  # raises with the reason
    layers = sorted(collector.passes.pop().items())
    present = {name for _, rows in layers for name in rows.values}
    names = [name for name in collector.measures if name in present]
    rows, stacked = [], []
    for layer, measured in layers:
        like = next(iter(measured.values.values()))
        absent = torch.full_like(like, torch.nan)
        stacked.append(torch.stack([measured.values.get(name, absent) for name in names]))
        rows += [(layer, head, *measured.uniform) for head in range(like.shape[1])]
    return Block(names, rows, torch.cat(stacked, dim=2))


def together(blocks: Sequence[Block]) -> Block:
    """Blocks of the same heads as one, along B."""
    values = torch.cat([b.values for b in blocks], dim=1) if len(blocks) > 1 else blocks[0].values
    return Block(blocks[0].names, blocks[0].rows, values)


def writing(
    folders: Folders,
    part: int,
    first_sample: int,
    block: Block,
    raw: dict[str, Tensor],
    *,
    aggregate: bool,
    ignore_first: int,
    dtype: torch.dtype,
    metadata: dict[str, str],
) -> Callable[[], None]:
    """What writes one part. The copies from the device are begun here and waited for there."""
    found = moments.gather(block.values, block.names, ignore_first)
    values = block.values
    if aggregate:
        values = _over_tokens(block, ignore_first)
    host = _to_host(values.to(dtype))
    found = {name: _to_host(value) for name, value in found.items()}
    raw = {name: _to_host(value) for name, value in raw.items()}
    done = _event(values.device)
    names, rows, length = block.names, block.rows, block.values.shape[-1]
    del values, block  # the device's memory is free again while the work waits

    def write() -> None:
        if done is not None:
            done.synchronize()
        name = name_of(part)
        if raw:
            _write_raw(folders.raw / f"{name}.safetensors", raw, metadata)
        with replacing(folders.moments / f"{name}.npz") as draft, draft.open("wb") as file:
            arrays = {key: value.numpy() for key, value in found.items()}
            arrays |= {"names": np.array(names), "rows": np.array(rows)}
            np.savez(file, allow_pickle=False, **arrays)
        columns = _keys(rows, first_sample, host.shape, per_token=host.shape[-1] == length)
        columns |= {measure: host[m].reshape(-1).numpy() for m, measure in enumerate(names)}
        head_table.write_part(folders.heads, name, columns)

    return write


def read_moments(folders: Folders) -> tuple[list[str], np.ndarray, Moments]:
    """Names of the measures, `Block.rows` as `(R, 4)`, and the moments of all parts.

    Raises:
        HeadwiseError: a part is damaged or its moments are lost.
    """
    names: list[str] = []
    rows = np.empty((0, 4))
    found = []
    for table in sorted(folders.heads.glob("*.parquet")):
        path = folders.moments / f"{table.stem}.npz"
        try:
            with np.load(path, allow_pickle=False) as file:
                names, rows = [str(name) for name in file["names"]], file["rows"]
                found.append(Moments(**{name: file[name] for name in Moments.__dataclass_fields__}))
        except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
            raise HeadwiseError(
                f"{path} is damaged or lost ({error}); delete {table} and run again"
            ) from error
    return names, rows, moments.merge(found)


def read_table(path: Path, columns: Sequence[str]) -> pyarrow.Table:
    """Some columns of one part of the head table.

    Raises:
        HeadwiseError: it is damaged.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path, columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise HeadwiseError(f"{path} is damaged ({reason}); delete it and run again") from error


@contextmanager
def in_background() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Yield a function that has work done on other threads; all of it is done when the block ends.

    An error of that work is raised by the next call, or at the end. After Ctrl-C what has begun is
    finished and the rest dropped.
    """
    pending: deque[Future[None]] = deque()
    pool = ThreadPoolExecutor(max_workers=max(1, min(_PENDING, (os.cpu_count() or 1) // 2)))

    def submit(work: Callable[[], None]) -> None:
        while pending and (len(pending) >= _PENDING or pending[0].done()):
            pending.popleft().result()
        pending.append(pool.submit(work))

    try:
        yield submit
        while pending:
            pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _over_tokens(block: Block, ignore_first: int) -> Tensor:
    """Means over tokens, `(M, B, R, 1)`, by the rules of a table without tokens."""
    exact = block.values.double()
    mean = exact.mean(-1)
    for m, name in enumerate(block.names):
        if name == "entropy":
            mean[m] = exact[m, ..., ignore_first:].mean(-1)
        elif name == "margin":
            has = ~torch.isposinf(exact[m])
            mean[m] = torch.where(has, exact[m], 0).sum(-1) / has.sum(-1)
    return mean.float()[..., None]


def _keys(
    rows: Sequence[Row], first_sample: int, shape: Sequence[int], *, per_token: bool
) -> dict[str, np.ndarray | str | int]:
    """Key columns of values `(M, B, R, T)`, flattened in that order."""
    _, batch, n_rows, tokens = shape
    layers, heads = (np.array([row[n] for row in rows], np.int32) for n in (0, 1))
    keys: dict[str, np.ndarray | str | int] = {
        "sample": np.repeat(np.arange(first_sample, first_sample + batch), n_rows * tokens),
        "layer": np.tile(np.repeat(layers, tokens), batch),
        "head": np.tile(np.repeat(heads, tokens), batch),
    }
    if per_token:
        keys["token"] = np.tile(np.arange(tokens, dtype=np.int32), batch * n_rows)
    return keys


def _write_raw(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    with replacing(path) as draft:
        save_file(tensors, draft, metadata=metadata)


def _to_host(value: Tensor) -> Tensor:
    """A copy in page-locked memory, begun but not waited for; the tensor itself on the CPU."""
    if value.device.type != "cuda":
        return value.cpu()
    return torch.empty(value.shape, dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)


def _event(device: torch.device) -> torch.cuda.Event | None:
    """Happens when the device has done what was asked of it so far."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
