"""Translates a run of the log into keys of this project's configuration, with inferred values and
differences."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from headwise.errors import HeadwiseError
from headwise.notebook.log.defaults import (
    GAME_ONE_BY_ONE,
    MINI,
    NORMAL_COMBINATION,
    WRONG_SIGN,
    Defaults,
    why_mini,
)
from headwise.notebook.log.flags import Asked, Value
from headwise.notebook.log.shell import Call

READINGS = ("meant", "ran")
KIND = "model.attention.kind"
SELECTIVE = "model.attention.selective"
HEAD_WIDTH = 64
WIDTH = 768

BASE: dict[str, Any] = {
    "model.d_model": WIDTH, "model.n_layers": 12, "model.n_heads": 13, "model.head_dim": HEAD_WIDTH,
    "model.vocab_size": 50257, "model.norm": "layernorm", "model.mlp": "gelu_tanh",
    "model.position": "learned", "model.tie_embeddings": True, "model.bias": True, "model.init_std": 0.02,
    KIND: "selective", f"{SELECTIVE}.accumulate": "torch",
    "data.name": "shards", "data.path": "data/edu_fineweb10B", "data.seq_len": 1024, "data.batch_size": 8,
    "training.max_steps": 2500, "training.total_batch_tokens": 524288, "training.lr": 6e-4,
    "training.min_lr_share": 0.1, "training.schedule": "cosine", "training.warmup_steps": 715,
    "training.weight_decay": 0.1, "training.beta1": 0.9, "training.beta2": 0.95, "training.grad_clip": 1.0,
    "training.compile": True, "training.eval_every": 50, "training.checkpoint_every": 2500,
}  # fmt: skip
"""The defaults of the original program in its later state; they are written to the file beside the
notebook."""

ACCUMULATE = {
    "none": "torch", "custom_cumsum": "torch", "none_custom_cumsum": "sequential",
    "none_custom_cumsum_parallel": "fused", "none_custom_cumsum_bliasson": "fused",
    "none_custom_cumsum_bliasson_fp64": "float64", "none_torch_cumsum_fp64": "float64",
    "zero_fp64": "float64", "head_two_fp64": "float64",
}  # fmt: skip
"""The running sums of those kinds of protection whose names specify them."""


GAME = {
    "leaky_relu_alpha": "alpha", "leaky_relu_bias": "offset", "protection_head_scaling_factor": "scale",
    "protection_head_bias": "bias",
}  # fmt: skip
"""Flags of the game of protection -> keys below `protection`."""


@dataclass(frozen=True)
class Start:
    """The initial weights of a run.

    Attributes:
        source: as in the log; None for a new model to which a head is added before training.
        place, init: of the added head; None if no head is added.
        keep_optimizer: also continue with the state of the optimizer.
    """

    source: str | None
    place: str | None = None
    init: str | None = None
    keep_optimizer: bool = False


@dataclass
class Run:
    """A translated run.

    Attributes:
        values: every key that a run of the log sets.
        seed: the seed of the run.
        start: None for a new model without surgery.
        inferred: values that the command omits, by the original program's names.
        notes: comments for a reader of the block.
        meaningless: flags without a meaning here, each with the reason.
    """

    line: int
    log_dir: str
    group: str
    values: dict[str, Any]
    seed: int
    start: Start | None
    defaults: Defaults
    inferred: dict[str, Value]
    notes: list[str] = field(default_factory=list)
    meaningless: list[tuple[str, str]] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    names_kind: bool = False


class _Taken:
    """The values of a command, completed by defaults; values from the defaults are recorded as inferred."""

    def __init__(self, asked: Asked, defaults: Defaults) -> None:
        self._asked, self._defaults = asked.values, defaults.values
        self.inferred: dict[str, Value] = {}

    def __call__(self, name: str) -> Any:
        if name in self._asked:
            return self._asked[name]
        value = self._defaults[name]
        if name not in ("vocab_size", "eval_every", "decay_lr", "debug_cum_sum"):
            self.inferred[name] = value
        return value

    def given(self, name: str) -> Any:
        """The value of a flag that has no default."""
        return self._asked.get(name)


def translate(call: Call, asked: Asked, defaults: Defaults, reading: str) -> Run:
    """A run as keys of the configuration.

    Args:
        reading: `meant` for what the names of the flags promise; `ran` for what the original program
            computed.

    Raises:
        HeadwiseError: the command is incomplete or has an invalid value.
    """
    take = _Taken(asked, defaults)
    values = dict(BASE)
    notes: list[str] = []
    if defaults is MINI and (why := why_mini(call, asked)):
        take.inferred["use_mini_model"] = True
        notes.append(f"treated as a run of the mini model: {why}")
    start = _start(take, notes)
    _sizes(values, take, start, mini=defaults is MINI)
    _training(values, take, start, notes)
    group = str(asked.values.get("group", ""))
    _attention(values, take, group, reading, notes)
    for name in asked.repeated:
        notes.append(f"--{name} is given more than once; the last value counts, as in the original program")
    return Run(
        call.line, str(take.given("log_dir") or ""), group, values, _seed(take("random_seed")), start,
        defaults, take.inferred, notes, asked.meaningless, asked.repeated, "attention_kind" in asked.values,
    )  # fmt: skip


def _seed(seed: int) -> int:
    if seed < 0:
        raise HeadwiseError(f"--random_seed is {seed}; a seed is at least 0")
    return seed


def _start(take: _Taken, notes: list[str]) -> Start | None:
    source = take.given("resume_checkpoint")
    place = init = None
    if take("add_a_head"):
        place = "start" if take("add_head_to_start") else "end"
        init = take("new_head_init")
    elif take.given("new_head_init") is not None:
        notes.append("--new_head_init has no effect without --add_a_head")
    if source is None:
        if init == "normal":
            notes.append(
                "a head that is added before training, with normal init, is a head more from the start"
            )
        return None if init in (None, "normal") else Start(None, place, init)
    keep = bool(take("resume_optimizer")) and init is None
    if keep:
        notes.append(
            "that program went on with step count and schedule; here training starts at step 0 with these "
            "weights and the optimizer's state"
        )
    return Start(str(source), place, init, keep)


def _sizes(values: dict[str, Any], take: _Taken, start: Start | None, *, mini: bool) -> None:
    heads = take("n_heads")
    width = take.given("head_dim") or HEAD_WIDTH
    values["model.n_heads"] = heads + (1 if take("add_a_head") else 0)
    values["model.head_dim"] = width
    values["model.d_model"] = take.given("n_embd") or (heads * width if mini else WIDTH)
    values["model.vocab_size"] = take("vocab_size")
    values["data.seq_len"], values["data.batch_size"] = take("seq_len"), take("batch_size")
    values["training.total_batch_tokens"] = take("total_batch_size")


def _training(values: dict[str, Any], take: _Taken, start: Start | None, notes: list[str]) -> None:
    steps = take("max_steps")
    if start and start.keep_optimizer and "max_steps" in take.inferred:
        done = _step_of(str(start.source))
        if 0 < done < steps:
            notes.append(f"{steps:,} steps in all, of which the initial weights already have {done:,}")
            steps -= done
    values["training.max_steps"] = steps
    values["training.lr"] = take("max_lr")
    values["training.warmup_steps"] = take("warmup_steps")
    values["training.compile"] = take("use_compile")
    values["training.eval_every"] = take("eval_every")
    if not take("decay_lr"):
        values |= {"training.schedule": "constant", "training.warmup_steps": 0}
    if take("debug_cum_sum"):
        values["measure.sums"] = True
    if start and start.keep_optimizer:
        values["training.keep_optimizer"] = True


def _step_of(source: str) -> int:
    """7500 for `…/model_07500.pt`; 0 for other names."""
    digits = source.rpartition("/")[2].removeprefix("model_").removesuffix(".pt")
    return int(digits) if digits.isascii() and digits.isdecimal() and len(digits) < 10 else 0


def _attention(values: dict[str, Any], take: _Taken, group: str, reading: str, notes: list[str]) -> None:
    kind = take("attention_kind")
    if kind == "self":
        values[KIND] = "flash"
        del values[f"{SELECTIVE}.accumulate"]
        return

    def put(key: str, value: Any) -> None:
        values[f"{SELECTIVE}.{key}"] = value

    def ran(what: str, instead: dict[str, Any]) -> None:
        """Apply a difference between the intended and the actual computation, or note it."""
        if reading == "ran":
            notes.append(f"translated as it ran: {what}")
            for key, value in instead.items():
                put(key, value)
        else:
            words = " ".join(f"--{SELECTIVE}.{key}={_text(value)}" for key, value in instead.items())
            notes.append(f"translated as it was meant, but it ran as: {what}{f' ({words})' if words else ''}")

    if take("disable_selection"):
        put("enabled", False)
    for flag, key in (("protect_bos_token", "protect_bos"), ("prevent_from_masking_myself", "protect_self")):
        if not take(flag):
            put(key, False)
    for flag, key in (("residual_attention_masks", "residual_logits"), ("mask_layernorm", "mask_layernorm"),
                      ("relu_after_cumsum", "relu_after_cumsum")):  # fmt: skip
        if take(flag):
            put(key, True)
    _combination(take, put, ran, group, notes)
    _protection(take, put, ran, group, notes)
    if kind == "selective_with_memory_penalty":
        put("memory_penalty.epsilon", take("memory_penalty_epsilon"))
        ran("the mean over queries, not divided by the number of layers",
            {"memory_penalty.reduce": "mean", "memory_penalty.normalize_layers": False})  # fmt: skip
    leak = take("relu_leak")
    if leak:
        put("relu_leak", leak)
        if take("protect_bos_token"):
            ran("the leak met logits of -inf, so that F was 0 everywhere", {"enabled": False})
        else:
            ran("the leak met logits of -inf; with BOS unprotected no switch here computes that", {})


def _combination(take: _Taken, put: Any, ran: Any, group: str, notes: list[str]) -> None:
    combination = take("selection_head_linear_combo")
    heads = take("n_heads") + (1 if take("add_a_head") else 0)
    for flag, word in (("n_sliced_masks", "n_sliced_masks"), ("n_latent_masks", "n_latent_masks")):
        if combination == word and take.given(flag) is None:
            raise HeadwiseError(f"--selection_head_linear_combo {word} needs --{flag}, which is missing")
        if combination != word and take.given(flag) is not None:
            notes.append(f"--{flag} has no effect without --selection_head_linear_combo {word}")
    if combination in ("true", "with_head_zero", "with_head_zero_and_bias"):
        put("source", "linear_combo")
        if combination != "true":
            put("combination_init", combination.removeprefix("with_"))
            if group in NORMAL_COMBINATION:
                ran(
                    "the start at head zero was overwritten by the normal init",
                    {"combination_init": "normal"},
                )
        if (scale := take("selection_head_linear_combo_scale")) != 1:
            put("combination_lr", scale)
    elif combination == "none_with_no_head":
        put("source", "dedicated")
    elif combination in ("one_mask_per_head", "two_masks"):
        put("source", "dedicated")
        put("n_masks", 2 if combination == "two_masks" else heads)
        put("mask_heads", "one_each")
    elif combination == "n_sliced_masks":
        put("source", "dedicated")
        put("n_masks", take.given("n_sliced_masks"))
    elif combination == "n_latent_masks":
        put("source", "latent")
        put("n_masks", take.given("n_latent_masks"))
        if take.given("one_head_per_latent_mask"):
            put("mask_heads", "one_each")
        if take.given("init_latent_masks_to_identity"):
            put("latent_init", "ones")
        if take.given("init_latent_masks_to_inverse"):
            put("latent_init", "inverse")
        if (factor := take.given("latent_mask_runtime_multiplier")) is not None:
            put("latent_scale", factor)
        ran("latent masks had a bias, which also added to F before a key existed; nearest setting here",
            {"latent_bias": True})  # fmt: skip


def _protection(take: _Taken, put: Any, ran: Any, group: str, notes: list[str]) -> None:
    kind = take("protection_kind")
    game = kind.removesuffix("_fp64")
    plays = not game.startswith(("none", "custom"))
    sums = ACCUMULATE.get(kind) or ("sequential" if group in GAME_ONE_BY_ONE else "fused")
    put("accumulate", sums)
    if kind not in ACCUMULATE:
        notes.append(f"running sum: {sums}, because of its place in the log before or after the stable scan")
    if kind.endswith("_fp64"):
        ran("its float64 sums rounded their input to float32 first", {})
    if not plays:
        return
    put("protection.kind", game)
    for flag, key in GAME.items():
        if (value := take.given(flag)) is not None:
            put(f"protection.{key}", value)
    if group in WRONG_SIGN:
        ran("before its correction the protection had the wrong sign, which no switch here computes", {})
    if game == "leaky_relu":
        ran("the protection became +inf above the diagonal: no selection", {"enabled": False})


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def one_head_less(values: dict[str, Any]) -> dict[str, Any]:
    """The model to which a head is added: plain attention, with one head less."""
    without = {key: value for key, value in values.items() if not key.startswith(f"{SELECTIVE}.")}
    return without | {KIND: "flash", "model.n_heads": values["model.n_heads"] - 1}


def least_log(number: float) -> int:
    """The order of magnitude of a count, at least 2: the number of steps of a small copy of a run."""
    return max(2, round(math.log10(max(1, number))))
