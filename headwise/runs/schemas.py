"""What the files of a run folder hold, as types that a reader holds them against.

A file may lack a key (an older headwise did not write it) and may have others (a newer one does). What is
there has the type that is given here, or the file is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, TypedDict

from msgspec import Meta

Count = Annotated[int, Meta(ge=0, le=2**62)]
Size = Annotated[int, Meta(ge=1, le=2**40)]
Process = Annotated[int, Meta(ge=0, lt=2**31)]
Total = int | float
"""A count that may be too large for 64 bits, such as FLOPs; the reader bounds its digits."""


class Status(TypedDict, total=False):
    """`status.json`."""

    state: str
    reason: str | None
    pid: Process | None
    host: str | None
    attempt: Count | None
    heartbeat: float
    step: Count | None
    max_steps: Count | None
    started: float | None
    finished: float | None
    tokens_per_sec: float | None
    step_time_ms: float | None
    flops_per_sec: float | None
    data_wait: float | None
    fit: Fit


class Tried(TypedDict):
    """A batch that memory did not suffice for."""

    batch_size: Size
    peak_mb: float | None


class Fit(TypedDict):
    """`fit` of `status.json`: how a batch was shrunk, or that none fits."""

    wanted: Size
    tried: list[Tried]
    measured_by: str
    limit_mb: float | None


class Importance(TypedDict):
    """What `measure.importance` measured: nats per token, per layer and head."""

    loss: float
    delta_loss: Annotated[list[list[float]], Meta(max_length=100_000)]
    tokens: Count


class Entanglement(TypedDict):
    """What `measure.entanglement` was and cost; `share` of the time of training."""

    window: Size
    n_windows: Size
    n_regions: Size
    every: Size
    evaluations: Count
    seconds: float
    share: float | None


class Summary(TypedDict, total=False):
    """`summary.json`."""

    state: str
    reason: str | None
    step: Count | None
    max_steps: Count | None
    tokens: Total | None
    flops: Total | None
    train_s: float | None
    train_loss: float | None
    nonfinite_share: float | None
    spike_share: float | None
    data_wait: float | None
    tokens_per_sec: float | None
    step_time_ms: float | None
    flops_per_sec: float | None
    wall_s: float | None
    val_loss: float | None
    val_bits_per_byte: float | None
    val_perplexity: float | None
    val_accuracy: float | None
    val_tokens: Count | None
    best_val_loss: float | None
    chance_loss: float | None
    vocab_size: Size | None
    kind: str | None
    engine: str | None
    expected_engine: str | None
    seed: Count | None
    device: str | None
    params: dict[str, Count] | None
    params_total: Count | None
    flops_per_token: Total | None
    flops_parts: dict[str, Total] | None
    peak_vram_mb: float | None
    peak_rss_mb: float | None
    data_checksum: str | None
    n_layers: Size | None
    n_heads: Size | None
    n_kv_heads: Size | None
    heads_by_layer: list[Size] | None
    head_dim: Size | None
    d_model: Size | None
    seq_len: Size | None
    batch_size: Size | None
    importance: Importance | None
    entanglement: Entanglement | None


class DataFacts(TypedDict, total=False):
    """`data` of `env.json`: the identity of the data."""

    name: str | None
    checksum: str | None
    vocab_size: Size | None


class CodeFacts(TypedDict, total=False):
    """`code` of `env.json`: the revision of a repository that a run of a study executed."""

    commit: str
    revision: str
    repository: str
    user_dirty: bool | None


class Environment(TypedDict, total=False):
    """`env.json`."""

    headwise: str | None
    python: str | None
    torch: str | None
    cuda: str | None
    device: str | None
    device_name: str | None
    cpu_count: Count | None
    threads: Count | None
    platform: str | None
    git_commit: str | None
    git_dirty: bool | None
    engine: str | None
    data: DataFacts
    code: CodeFacts


class _Attention(TypedDict, total=False):
    kind: str


class _Model(TypedDict, total=False):
    attention: _Attention


class _Data(TypedDict, total=False):
    seq_len: Size
    batch_size: Size


class RunConfig(TypedDict, total=False):
    """`config.yaml`, as far as lists and reports read it. `headwise.config.run.load` reads it whole."""

    model: _Model
    data: _Data
    seed: Count
    device: str
    expected_engine: str | None
    init_from: str | None


class Chosen(TypedDict, total=False):
    """Which variant a stage of a study took."""

    best: str | None
    by: str
    values: dict[str, float]
    text: str
    doubt: str | None


class PlannedVariant(TypedDict, total=False):
    """A variant in `study.yaml`."""

    label: str | None
    kind: str | None
    against: str | None
    waits: str
    chosen: Chosen
    expected_engine: str | None
    params_total: Count | None
    overrides: dict[str, Any] | None
    seeds: list[Count] | None


class PlannedCommit(TypedDict, total=False):
    """What a revision was when a study was planned."""

    sha: str
    subject: str


class PlannedTrial(TypedDict):
    """A trial of a search in `study.yaml`; without a folder it could not be run."""

    folder: str | None
    values: dict[str, Any]
    reason: str


class SearchedUnit(TypedDict):
    """The search of one variant: its trials, the place of the best among them, and what it was without."""

    planned: Count
    trials: Annotated[list[PlannedTrial], Meta(max_length=10_000)]
    default: str | None
    winner: Count | None


class SearchPlan(TypedDict):
    """`search` of `study.yaml`."""

    keys: dict[str, list[Any] | dict[str, Any]]
    sampler: str
    by: str
    best: str
    each: str
    seeds: list[Count]
    confirm_seeds: list[Count]
    units: dict[str, SearchedUnit]


class Budget(TypedDict, total=False):
    """`budget` of `study.yaml`."""

    kind: str
    value: float


class StudyPlan(TypedDict, total=False):
    """`study.yaml`, as a study leaves it in its folder."""

    name: str | None
    title: str | None
    question: str | None
    hypothesis: str | None
    baseline: str | None
    variants: dict[str, PlannedVariant | None] | None
    seeds: list[Count] | None
    search: SearchPlan | None
    budget: Budget | None
    smallest_difference: float | str
    criteria: list[str]
    commits: dict[str, PlannedCommit] | None
    timeout_s: float | None
    device: str | None
    size: str | None
    command: str | None


class Best(TypedDict):
    """`checkpoints/best.json`."""

    checkpoint: Annotated[str, Meta(pattern=r"^step_[0-9]+\Z")]
    val_loss: float


class Manifest(TypedDict):
    """`manifest.json` of a checkpoint."""

    format: Count
    sha256: dict[str, str]


class Evaluated(TypedDict):
    """The last evaluation before a checkpoint."""

    loss: float
    accuracy: float
    tokens: Count
    bytes_per_token: float | None


class TelemetryState(TypedDict):
    """Totals of a run at a checkpoint."""

    steps: Count
    nonfinite: Count
    nonfinite_in_a_row: Count
    spikes: Count
    smooth_sum: float
    smooth_weight: float
    trained_s: float
    waited_s: float
    norms: Annotated[list[float], Meta(max_length=10_000)]


class CheckpointState(TypedDict):
    """`state.json` of any checkpoint."""

    step: Count


class TrainingState(CheckpointState):
    """`state.json` of a checkpoint that training goes on from."""

    best: str | None
    best_loss: float
    evaluation: Evaluated | None
    evaluated_at: Annotated[int, Meta(ge=-1, le=2**62)]
    telemetry: TelemetryState


class PieceOfHead(TypedDict):
    """Where one part of a new head lies; `headwise.runs.operation.Piece`."""

    layer: Annotated[int, Meta(ge=0, lt=2**20)]
    part: str
    name: str
    axis: Annotated[int, Meta(ge=0, le=1)]
    start: Count
    stop: Count


class Losses(TypedDict, total=False):
    """Validation loss of the source, and operated."""

    source: float | None
    operated: float | None


class _Operation(TypedDict):
    pieces: list[PieceOfHead]
    val_loss: Losses


class Operation(_Operation, total=False):
    """`surgery.json`."""

    source: str | None
    source_kind: str | None
    kind: str | None
    place: str | None
    init: str | None
    n_heads: list[Size] | None
    preserves: bool | None
    why: str | None
    learns: bool | None
    operated_in: str | None


class TriedLength(TypedDict):
    """A length that a search tried."""

    seq_len: Size
    peak_mb: float | None
    fits: bool


class _Length(TypedDict):
    variant: str
    kind: str
    limit_mb: float
    until: Size


class Length(_Length, total=False):
    """The longest trainable sequence of one variant."""

    max_seq_len: Count
    capped: bool
    measured_by: str
    tried: list[TriedLength]
    problem: str


class Lengths(TypedDict):
    """`max_lengths.json` of a study."""

    rows: list[Length]
