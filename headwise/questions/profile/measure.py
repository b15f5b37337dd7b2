"""Profile a checkpoint: every measure of every head over many contexts, as a head table on disk.

    out/profile.json                 what is profiled; a folder never mixes two profiles
    out/heads/part_000000.parquet    the head table, a part per few contexts
    out/moments/part_000000.safetensors  what means and Pearson's correlations need of that part
    out/raw/part_000000.safetensors  q, k, v of chosen layers, where asked for
    out/per_head.csv                 at the end: means and correlations per head
    out/summary.json                 at the end

A part is whole or absent, and what it holds depends on its contexts alone: an interrupted profile
goes on with the parts that are missing, several processes share them, and the table is the same.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwise import reading
from headwise.errors import HeadwiseError
from headwise.files import sweep, write_json, write_text
from headwise.measures import table as head_table
from headwise.measures.collector import Collector
from headwise.measures.spec import FORMER_NAMES, in_order, measure_of, wanted_measures
from headwise.questions.profile import parts
from headwise.questions.profile.config import TABLE_DTYPES, ProfileConfig
from headwise.questions.profile.files import SummaryFile
from headwise.questions.profile.parts import Block, Folders
from headwise.questions.profile.per_head import Kept, summarise
from headwise.watch.capture import Capture
from headwise.watch.load import Loaded
from headwise.watch.observe import attached
from headwise.watch.samples import Samples
from headwise.watch.tensors import checksum_of


@dataclass(frozen=True)
class Share:
    """This process among those that profile together.

    Attributes:
        rank: 0 writes what is not a part.
        size: number of processes.
        wait: returns when every process has called it.
    """

    rank: int = 0
    size: int = 1
    wait: Callable[[], None] = lambda: None


class Profile:
    """One profile in one folder."""

    def __init__(self, out: str | Path, config: ProfileConfig) -> None:
        config.validate()
        self.config, self.folders = config, Folders(Path(out))

    @property
    def n_parts(self) -> int:
        """Parts that the table has in the end."""
        return -(-self.config.n_samples // self.config.samples_per_part)

    @property
    def measures(self) -> tuple[str, ...]:
        """The columns of the table that are measures, in its order."""
        return wanted_measures(self.config.measures)

    def missing(self) -> list[int]:
        """Parts that are not there yet."""
        return [part for part in range(self.n_parts) if not self.folders.has(part)]

    def samples_of(self, part: int) -> tuple[int, int]:
        """First sample of a part, and the first after it."""
        first = part * self.config.samples_per_part
        return first, min(first + self.config.samples_per_part, self.config.n_samples)

    def run(
        self,
        loaded: Loaded,
        samples: Samples,
        *,
        batch_size: int = 8,
        share: Share | None = None,
        advance: Callable[[int], None] = lambda tokens: None,
    ) -> dict[str, Any]:
        """Measure and write every part that is missing, then what is drawn from all of them.

        Args:
            batch_size: contexts per forward pass.
            share: which of the processes this is.
            advance: told the number of tokens just measured.

        Returns:
            The summary, as in summary.json.

        Raises:
            HeadwiseError: the folder holds another profile, the disk is full, the memory too small,
                or the model has nothing to measure. Finished parts stay.
        """
        share = share or Share()
        if batch_size < 1:
            raise HeadwiseError(f"--batch-size is {batch_size}; it must be at least 1")
        capture = self._capture(loaded)
        self._claim(loaded, samples, share)
        device = next(loaded.model.parameters()).device
        began, missing = time.monotonic(), self.missing()
        share.wait()  # or a part that another process finished meanwhile would shift the shares
        collector = Collector(self.measures, self.config.scores, True, self.config.ignore_first)
        kept = Kept(device)
        with (
            parts.in_background() as submit,
            attached(loaded.model, collector, capture),
            _memory_for(batch_size),
            torch.inference_mode(),
        ):
            for group in self._groups(missing, batch_size)[share.rank :: share.size]:
                block = self._measure(group, missing, loaded, samples, batch_size, collector, advance)
                raw = self._raw(capture)
                for part in group:
                    if part in missing:
                        submit(self._writing(part, group[0], block, raw, kept, dict(collector.reasons)))
            ranked = kept.spearman(self.n_parts)  # while the last parts are being written
        share.wait()
        if share.rank == 0:
            self._finish(device, time.monotonic() - began, len(missing), kept, ranked)
        share.wait()
        return _read_json(self.folders.out / "summary.json", SummaryFile)

    def _groups(self, missing: Collection[int], batch_size: int) -> list[range]:
        """Parts that run through the model together, as many as one batch holds, where any is missing.

        What a batch computes may depend on its size in the last bit, so a group is measured again as
        it was when some of its parts are there already.
        """
        size = max(1, batch_size // self.config.samples_per_part)
        groups = [range(n, min(n + size, self.n_parts)) for n in range(0, self.n_parts, size)]
        return [group for group in groups if any(part in missing for part in group)]

    def _measure(
        self,
        group: range,
        missing: Collection[int],
        loaded: Loaded,
        samples: Samples,
        batch_size: int,
        collector: Collector,
        advance: Callable[[int], None],
    ) -> Block:
        """Run the model over the contexts of some parts."""
        first, last = self.samples_of(group[0])[0], self.samples_of(group[-1])[1]
        device = next(loaded.model.parameters()).device
        blocks = []
        for at in range(first, last, batch_size):
            ids = samples.batch(at, min(at + batch_size, last)).to(device)
            loaded.forward(ids)
            blocks.append(parts.take(collector))
            new = sum((at + n) // self.config.samples_per_part in missing for n in range(len(ids)))
            advance(new * self.config.context_length)
        return parts.together(blocks)

    def _raw(self, capture: Capture | None) -> dict[str, Tensor]:
        if capture is None:
            return {}
        _check_layers(capture.layers, capture.n_layers)
        return capture.pop()

    def _writing(
        self,
        part: int,
        first_part: int,
        block: Block,
        raw: dict[str, Tensor],
        kept: Kept,
        unmeasured: dict[int | str, str],
    ) -> parts.Writing:
        """What writes one part of those that were measured together from `first_part` on."""
        config, before = self.config, self.samples_of(first_part)[0]
        first, last = self.samples_of(part)
        here, dtype = slice(first - before, last - before), TABLE_DTYPES[config.table_dtype]
        block = Block(block.names, block.rows, block.values[:, here])
        if not config.aggregate:
            kept.add(parts.name_of(part), block, dtype, config.ignore_first)
        return parts.writing(
            self.folders, part, first, block, {name: value[here] for name, value in raw.items()},
            aggregate=config.aggregate, ignore_first=config.ignore_first, dtype=dtype,
            metadata={"scores": config.scores}, unmeasured=unmeasured,
        )  # fmt: skip

    def _capture(self, loaded: Loaded) -> Capture | None:
        if not self.config.raw_layers:
            return None
        if loaded.n_layers is not None:
            _check_layers(self.config.raw_layers, loaded.n_layers)
        return Capture(frozenset(self.config.raw_layers), self.config.scores)

    def _claim(self, loaded: Loaded, samples: Samples, share: Share) -> None:
        """Write down what is profiled here, or see that it is what was written down before.

        Raises:
            HeadwiseError: the folder holds another profile; names what differs.
        """
        wanted = {
            "model": loaded.name, "weights": loaded.fingerprint(), "files": checksum_of(loaded.name),
            "data": samples.identity,
        }  # fmt: skip
        wanted |= dataclasses.asdict(self.config) | {"measures": self.measures}
        wanted = json.loads(json.dumps(wanted))
        path = self.folders.out / "profile.json"
        if share.rank == 0:
            sweep(self.folders.out)
        if share.rank == 0 and not path.exists():
            if self.folders.heads.exists():
                raise HeadwiseError(
                    f"{self.folders.out} holds a head table of something else; give another --out"
                )
            write_json(path, wanted)
        share.wait()
        held = _read_json(path, dict[str, Any])
        names = held.get("measures")
        if isinstance(names, list):
            held["measures"] = in_order(FORMER_NAMES.get(str(name), str(name)) for name in names)
        before, now = _flat(held), _flat(wanted)
        for key in now | before:
            if before.get(key) != now.get(key):
                raise HeadwiseError(
                    f"{self.folders.out} holds a profile with {key} {before.get(key)!r}, not "
                    f"{now.get(key)!r}; give another --out, or those options to go on with it"
                )

    def _finish(
        self, device: torch.device, seconds: float, measured: int, kept: Kept, ranked: np.ndarray | None
    ) -> None:
        per_head = summarise(self.folders, self.config, kept, device, ranked)
        write_text(self.folders.out / "per_head.csv", _csv(per_head))
        certain = [name for name in self.measures if name in per_head and measure_of(name).absent is None]
        broken = np.isnan(np.stack([per_head[name] for name in certain] or [0 * per_head["layer"]])).any(0)
        heads = set(zip(per_head["layer"].tolist(), per_head["head"].tolist(), strict=True))
        if "part" in per_head:  # what heads with parts have as a whole is never of weights
            is_part = per_head["part"] != ""
            broken &= is_part | ~np.isin(per_head["layer"], per_head["layer"][is_part])
        summary = {
            "state": "finished",
            "samples": self.config.n_samples,
            "tokens": self.config.n_samples * self.config.context_length,
            "heads": len(heads),
            "bytes": _size(self.folders.heads),
            "parts_measured": measured,
            "seconds": seconds,
            "layers_with_nan": sorted({int(n) for n in per_head["layer"][broken]}),
            "unmeasured": head_table.unmeasured(self.folders.heads),
        }
        write_json(self.folders.out / "summary.json", summary)


@contextmanager
def _memory_for(batch_size: int) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
        on_cpu = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        if not (isinstance(error, torch.OutOfMemoryError) or on_cpu):
            raise
        smaller = f"--batch-size {batch_size // 2}" if batch_size > 1 else "a shorter --context-length"
        raise HeadwiseError(
            f"out of memory with --batch-size {batch_size}; try {smaller}: finished parts are kept"
        ) from error


def _check_layers(chosen: Collection[int], n_layers: int) -> None:
    for layer in sorted(chosen):
        if not 0 <= layer < n_layers:
            raise HeadwiseError(f"--raw-layers {layer} is not there: layers go from 0 to {n_layers - 1}")


def _read_json(path: Path, schema: Any) -> dict[str, Any]:
    try:
        return reading.read_json(path, schema)
    except reading.Unreadable as error:
        raise error.so("give another --out") from error


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"data": {"name": …}}` as `{"data.name": …}`."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict)
        found |= _flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return found


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.parquet"))


def _csv(columns: dict[str, np.ndarray]) -> str:
    cells = [[_cell(value) for value in column.tolist()] for column in columns.values()]
    return "\n".join([",".join(columns), *map(",".join, zip(*cells, strict=True))]) + "\n"


def _cell(value: int | float | str) -> str:
    if isinstance(value, int | str):
        return str(value)
    return f"{value:.9g}" if math.isfinite(value) else ""
