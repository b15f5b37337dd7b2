"""`training` and `measure`: how a run learns, and what is recorded of it. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from headwise.errors import HeadwiseError, in_range, one_of

MOST_STEPS = 10**12
MOST_FLOPS = 1e30
"""A thousand times what the largest run of anybody took, and more than a number means to any counter here."""

SCHEDULES = ("cosine", "wsd", "constant")
PRECISIONS = ("auto", "fp32", "bf16")
TRACKERS = ("tensorboard", "wandb", "trackio")


@dataclass
class TrainingConfig:
    """Optimisation, evaluation and checkpoints of one run.

    Attributes:
        max_steps: optimizer steps; the smallest of the three limits that are given ends the run.
        max_tokens: training tokens.
        max_flops: training FLOPs, counted as in `headwise.model.count`.
        timeout_s: seconds of training after which the run stops as timed_out.
        total_batch_tokens: tokens of one optimizer step, accumulated over passes of
            `data.batch_size` sequences; one pass where not given.
        lr: peak learning rate.
        min_lr_share: the schedule ends at this share of `lr`.
        schedule: cosine, wsd (warm-up, stable, linear decay) or constant, after the warm-up.
        warmup_steps: steps of linear warm-up.
        decay_share: share of the steps that wsd decays over.
        weight_decay: of matrices; norms and biases have none.
        beta1: weight of the past in AdamW's mean of the gradient.
        beta2: weight of the past in AdamW's mean of its square.
        eps: AdamW's denominator.
        grad_clip: largest norm of the gradient; 0 leaves it alone.
        precision: bf16 (autocast), fp32, or auto: bf16 on a GPU that has it.
        compile: torch.compile the model.
        smoothing: weight of the past in the smoothed training loss.
        log_every: steps between rows of training metrics.
        eval_every: steps between evaluations; only the last where 0.
        checkpoint_every: steps between checkpoints; only the last where 0.
        keep_checkpoints: how many of the latest checkpoints stay.
        keep_best: also keep the checkpoint with the lowest validation loss.
        keep_optimizer: with --init-from, carry the optimizer state of parameters that still exist.
        max_nonfinite: consecutive steps with a non-finite loss or gradient after which the run has
            diverged; such a step is never applied.
        debug_steps: steps in which every module's output is checked for NaN and infinity.
        profile_steps: steps to profile, after two of warm-up, into `profile/`.
        trackers: any of tensorboard, wandb, trackio.
    """

    max_steps: int | None = None
    max_tokens: int | None = None
    max_flops: float | None = None
    timeout_s: float | None = None
    total_batch_tokens: int | None = None
    lr: float = 1e-3
    min_lr_share: float = 0.1
    schedule: str = "cosine"
    warmup_steps: int = 20
    decay_share: float = 0.2
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip: float = 1.0
    precision: str = "auto"
    compile: bool = False
    smoothing: float = 0.95
    log_every: int = 10
    eval_every: int = 100
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    keep_best: bool = True
    keep_optimizer: bool = False
    max_nonfinite: int = 10
    debug_steps: int = 0
    profile_steps: int = 0
    trackers: list[str] = field(default_factory=list)

    def validate(self) -> None:
        """Refuse numbers that make no run.

        Raises:
            HeadwiseError: one line with the value received and what to do.
        """
        one_of("training.schedule", self.schedule, SCHEDULES)
        one_of("training.precision", self.precision, PRECISIONS)
        for tracker in self.trackers:
            one_of("training.trackers", tracker, TRACKERS)
        if self.max_steps is None and self.max_tokens is None and self.max_flops is None:
            raise HeadwiseError(
                "the run has no end: set training.max_steps, training.max_tokens or training.max_flops"
            )
        for name, most in (
            ("max_steps", MOST_STEPS), ("max_tokens", 1e18), ("max_flops", MOST_FLOPS), ("timeout_s", 1e9),
            ("total_batch_tokens", 2**40), ("lr", 1e3),
        ):  # fmt: skip
            in_range(f"training.{name}", getattr(self, name), 0, most, above=True)
        for name in ("log_every", "keep_checkpoints", "max_nonfinite"):
            in_range(f"training.{name}", getattr(self, name), 1, MOST_STEPS)
        for name in ("warmup_steps", "eval_every", "checkpoint_every", "debug_steps", "profile_steps"):
            in_range(f"training.{name}", getattr(self, name), 0, MOST_STEPS)
        for name, most in (("grad_clip", 1e12), ("weight_decay", 1e3), ("eps", 1.0)):
            in_range(f"training.{name}", getattr(self, name), 0, most)
        for name in ("smoothing", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise HeadwiseError(f"training.{name} is {getattr(self, name)}; it must be in [0, 1)")
        for name in ("min_lr_share", "decay_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise HeadwiseError(f"training.{name} is {getattr(self, name)}; it must be in [0, 1]")


@dataclass
class EntanglementConfig:
    """The entanglement entropy of every head's weights on windows of tokens, which is off by default.

    A window is a run of consecutive validation tokens that the model reads alone. The windows are drawn once,
    from the seed, and are the same at every evaluation.

    Attributes:
        enabled: measure it.
        window: tokens W of a window; the weights of a head are a W x W matrix, whose eigenvalues cost O(W³).
        n_windows: windows that are averaged.
        n_regions: regions that the queries of a window are split into, for the regional form.
        every: evaluations from one measurement to the next; the last evaluation is always measured.
    """

    enabled: bool = False
    window: int = 64
    n_windows: int = 8
    n_regions: int = 4
    every: int = 1

    def validate(self) -> None:
        """Refuse what cannot be measured, whether it is enabled or not.

        Raises:
            HeadwiseError: one line with the value received and what to do.
        """
        for name, least, most in (("window", 2, 4096), ("n_windows", 1, 4096), ("every", 1, MOST_STEPS)):
            in_range(f"measure.entanglement.{name}", getattr(self, name), least, most)
        in_range(
            "measure.entanglement.n_regions",
            self.n_regions,
            1,
            self.window,
            what="a region has at least one query",
        )


@dataclass
class MeasureConfig:
    """What is measured of every head at each evaluation.

    Attributes:
        heads: fill the head table.
        sequences: validation sequences of the fixed batch that is measured.
        scores: pre_rope or post_rope, the logits that are measured.
        per_token: keep every token's row rather than the mean over tokens.
        ignore_first: tokens whose entropy is left out, for they see almost no context.
        maps: attention maps of this many fixed prompts, as figures; 0 keeps none.
        map_tokens: tokens of each prompt.
        prompts: texts for the maps; the first validation sequences where empty.
        importance: at the last evaluation, measure the loss without each head on the fixed batch: one pass
            a head.
        entanglement: entanglement entropy over training.
        sums: for a kind with running sums, log how far they and their gradients are off float64.
    """

    heads: bool = True
    sequences: int = 4
    scores: str = "post_rope"
    per_token: bool = False
    ignore_first: int = 2
    maps: int = 1
    map_tokens: int = 48
    prompts: list[str] = field(default_factory=list)
    importance: bool = False
    entanglement: EntanglementConfig = field(default_factory=EntanglementConfig)
    sums: bool = False

    def validate(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            HeadwiseError: one line with the value received and what to do.
        """
        one_of("measure.scores", self.scores, ("pre_rope", "post_rope"))
        for name, least, most in (
            ("sequences", 1, 2**20), ("map_tokens", 1, 2**16), ("ignore_first", 0, 2**24), ("maps", 0, 2**12),
        ):  # fmt: skip
            in_range(f"measure.{name}", getattr(self, name), least, most)
        self.entanglement.validate()
