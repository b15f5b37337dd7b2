"""Budget curves of one run: measured, or read from what its folder remembers of a measurement."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, TypedDict

import numpy as np
from msgspec import Meta

from headwise import __version__, reading
from headwise.config.run import Config, load
from headwise.data import Batch, open_data
from headwise.data.base import Data
from headwise.errors import HeadwiseError
from headwise.files import write_json
from headwise.functional.budget import keys_of_share
from headwise.model.budget import within_budget
from headwise.questions.budget.greedy import greedy_shares
from headwise.runs.checkpoint import weights_digest
from headwise.runs.folder import RunFolder
from headwise.runs.read import Run
from headwise.runs.weights import find_checkpoint, load_model
from headwise.training.distributed import World, find_device
from headwise.training.loss import TokenLoss, evaluate

MEMORY = "budget.json"
"""What a run's folder remembers of its last measurement."""

SCORES = {"cpu": 1 << 27, "cuda": 1 << 30}
"""Scores `(B, H, T, T)` of one forward pass at most: half a gigabyte in float32, or four on a GPU."""

KEPT, WINDOW, READMITTED, GREEDY = "kept", "window", "chosen afresh", "per layer"
"""How keys are chosen."""

Losses = dict[float, float]
"""Share of the context -> loss, nats per token."""

Layers = dict[float, list[float]]
"""Mean share -> share of each layer."""


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        shares: of the context, in (0, 1].
        sequences: validation sequences to measure on, evenly spread over the split.
        readmit: add the selective attention log's curve: every query chooses among all keys anew.
        greedy: add the curve with a budget for each layer.
        calibration: validation sequences that choose the budgets of layers.
        device: where it computes.
    """

    shares: tuple[float, ...]
    sequences: int = 128
    readmit: bool = False
    greedy: bool = False
    calibration: int = 16
    device: str = "auto"

    def validate(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            HeadwiseError: a budget outside (0, 1], or no sequences.
        """
        if not self.shares:
            raise HeadwiseError("--budgets is empty; give shares of the context, as 1.0 0.5 0.25")
        for share in self.shares:
            if not 0 < share <= 1:
                raise HeadwiseError(
                    f"a budget of {share:g} is no share of the context; it must be above 0 and at most 1"
                )
        for name in ("sequences", "calibration"):
            if getattr(self, name) < 1:
                raise HeadwiseError(f"--{name} is {getattr(self, name)}; it must be at least 1")


@dataclass
class Measured:
    """What was found about one run.

    Attributes:
        kind: of attention.
        losses: method -> share -> loss.
        layers: method -> share -> share of each layer, where they differ.
        keys: share -> keys a layer holds.
        remarks: what is to be said, as predicates of the run.
    """

    kind: str
    losses: dict[str, Losses] = field(default_factory=dict)
    layers: dict[str, Layers] = field(default_factory=dict)
    keys: dict[float, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As JSON, whose keys are text: mappings from shares are lists of pairs."""
        return {
            "kind": self.kind,
            "losses": {method: [*at.items()] for method, at in self.losses.items()},
            "layers": {method: [*at.items()] for method, at in self.layers.items()},
            "keys": [*self.keys.items()],
            "remarks": self.remarks,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Measured:
        """What `to_json` wrote."""
        losses, layers = (
            {method: dict(at) for method, at in data[name].items()} for name in ("losses", "layers")
        )
        return cls(data["kind"], losses, layers, dict(data["keys"]), data["remarks"])


Share = Annotated[float, Meta(gt=0, le=1)]


class MeasuredMemory(TypedDict):
    """`Measured.to_json`."""

    kind: str
    losses: dict[str, list[tuple[Share, float]]]
    layers: dict[str, list[tuple[Share, list[Share]]]]
    keys: list[tuple[Share, Annotated[int, Meta(ge=0, le=2**40)]]]
    remarks: list[str]


class Setting(TypedDict):
    """The sequences that a run was measured on."""

    seq_len: int
    data: str
    checksum: str
    sequences: int
    calibration: int | None


class Memory(TypedDict):
    """What a run's folder keeps of a measurement."""

    asked: dict[str, Any]
    setting: Setting
    measured: MeasuredMemory


class Measurable:
    """A run under some options. Its weights and its data are read when there is something to measure."""

    def __init__(self, run: Run, options: Options) -> None:
        self.path, self.options = run.path, options
        self.config: Config = load(RunFolder(run.path).config)
        self.seed = self.config.seed if run.seed is None else run.seed
        self.weights = weights_digest(find_checkpoint(RunFolder(run.path)))

    @cached_property
    def data(self) -> Data:
        """What the run was trained on."""
        return open_data(self.config.data, self.config.seed)

    @cached_property
    def setting(self) -> dict[str, Any]:
        """The sequences it is measured on; runs are comparable where these are the same."""
        if (memory := self._memory) is not None:
            return dict(memory["setting"])
        measured_on, calibration = self._sequences
        return {
            "seq_len": self.config.data.seq_len, "data": str(self.data.identity.get("name")),
            "checksum": str(self.data.identity.get("checksum"))[:16],
            "sequences": len(measured_on), "calibration": len(calibration) or None,
        }  # fmt: skip

    def measured(self) -> tuple[Measured, bool]:
        """The curves, and whether the run's folder remembered them."""
        if self._memory is not None:
            return Measured.from_json(self._memory["measured"]), True
        found = self._measure()
        memory = {"asked": self._asked, "setting": self.setting, "measured": found.to_json()}
        with suppress(OSError):  # the folder may be somebody else's
            write_json(self.path / MEMORY, memory)
        return found, False

    @property
    def _asked(self) -> dict[str, Any]:
        """All that a measurement depends on."""
        asked = dataclasses.asdict(self.options) | {"shares": sorted(set(self.options.shares), reverse=True)}
        del asked["device"]
        return asked | {"weights": self.weights, "version": __version__}

    @cached_property
    def _memory(self) -> dict[str, Any] | None:
        try:
            memory = reading.read_json(self.path / MEMORY, Memory)
        except reading.Unreadable:  # it is measured again then, and the file replaced
            return None
        known = {share for share, _ in memory["measured"]["keys"]}
        curves = [*memory["measured"]["losses"].values(), *memory["measured"]["layers"].values()]
        whole = bool(curves) and all(curve and {share for share, _ in curve} <= known for curve in curves)
        return memory if whole and self.weights and memory["asked"] == self._asked else None

    def _measure(self) -> Measured:
        world = World(0, 1, find_device(self.options.device))
        model, config = load_model(self.path, world.device)
        length = config.data.seq_len
        room = SCORES["cuda" if world.device.type == "cuda" else "cpu"]
        size = max(1, min(config.data.batch_size, room // (config.model.n_heads * length**2)))
        batches, chosen_on = (_batches(self.data, indices, size) for indices in self._sequences)
        attention = model.deciding()
        found = Measured(config.model.attention.kind)
        has_f = attention.selects
        shares = sorted({*self.options.shares, *([] if has_f else [1.0])}, reverse=True)
        if reason := next(filter(None, (each.whole_context_only() for each in model.attentions())), None):
            shares = [1.0]
            found.remarks.append(f"is measured with its full context alone: {reason}")

        def loss(batches: Sequence[Batch], share: float | Sequence[float], readmit: bool = False) -> float:
            autocast = world.autocast(config.training.precision)
            with within_budget(model, share, readmit=readmit):
                return evaluate(TokenLoss(model), batches, world, autocast).loss

        found.keys = {share: keys_of_share(share, length, attention.keeps_first) for share in shares}
        found.losses[KEPT if has_f else WINDOW] = {share: loss(batches, share) for share in shares}
        if has_f and self.options.readmit:
            found.losses[READMITTED] = {share: loss(batches, share, readmit=True) for share in shares}
        if has_f and self.options.greedy:
            least = (1 + attention.keeps_first) / length
            layers = greedy_shares(config.model.n_layers, shares, least, lambda each: loss(chosen_on, each))
            found.losses[GREEDY] = {share: loss(batches, each) for share, each in layers.items()}
            found.layers[GREEDY] = layers
            if not self._others:
                found.remarks.append(
                    "chose budgets of layers on sequences that are measured too: there are no others"
                )
        if reason := attention.undecodable():
            found.remarks.append(f"has a curve that no cache can follow: {reason}")
        return found

    @cached_property
    def _sequences(self) -> tuple[np.ndarray, np.ndarray]:
        """Validation sequences to measure on, and others to choose budgets of layers by."""
        everything = self._everything
        measured_on = _spread(everything, self.options.sequences)
        if not self.options.greedy:
            return measured_on, measured_on[:0]
        others = np.setdiff1d(everything, measured_on)
        return measured_on, _spread(others if len(others) else everything, self.options.calibration)

    @property
    def _everything(self) -> np.ndarray:
        total = self.data.n_sequences("val")
        assert total is not None
        return np.arange(total, dtype=np.int64)

    @property
    def _others(self) -> bool:
        """Whether there are sequences besides those that are measured."""
        return len(self._everything) > len(self._sequences[0])


def _spread(indices: np.ndarray, count: int) -> np.ndarray:
    count = min(count, len(indices))
    return indices[np.arange(count) * len(indices) // count]


def _batches(data: Data, indices: np.ndarray, size: int) -> list[Batch]:
    return [data.batch("val", indices[at : at + size]) for at in range(0, len(indices), size)]
