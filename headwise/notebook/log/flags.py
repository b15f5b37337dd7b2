"""The typed values of a run's flags and environment variables, and those that have no meaning here."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from headwise.errors import HeadwiseError, one_of
from headwise.notebook.log.shell import Call

Value = str | int | float | bool

KINDS = ("self", "selective", "selective_with_memory_penalty")
COMBINATIONS = (
    "none", "false", "true", "with_head_zero", "with_head_zero_and_bias", "none_with_no_head",
    "one_mask_per_head", "two_masks", "n_sliced_masks", "n_latent_masks",
)  # fmt: skip
PROTECTIONS = (
    "none", "zero", "zero_fp64", "head_two", "head_two_fp64", "linear_combo", "linear_combo_head_two",
    "leaky_relu", "big_constant", "none_custom_cumsum", "none_custom_cumsum_parallel",
    "none_custom_cumsum_bliasson", "none_custom_cumsum_bliasson_fp64", "none_torch_cumsum_fp64",
    "custom_cumsum",
)  # fmt: skip
INITS = ("normal", "zero", "ko_zero", "o_zero", "k_zero", "o_rescaled")

INTEGERS = (
    "n_heads", "n_embd", "head_dim", "max_steps", "warmup_steps", "random_seed", "seq_len", "batch_size",
    "total_batch_size", "n_sliced_masks", "n_latent_masks",
)  # fmt: skip
NUMBERS = (
    "memory_penalty_epsilon", "selection_head_linear_combo_scale", "leaky_relu_alpha", "leaky_relu_bias",
    "protection_head_scaling_factor", "protection_head_bias", "max_lr", "relu_leak",
    "latent_mask_runtime_multiplier",
)  # fmt: skip
WORDS = {
    "attention_kind": KINDS, "selection_head_linear_combo": COMBINATIONS, "protection_kind": PROTECTIONS,
    "new_head_init": INITS,
}  # fmt: skip
TEXTS = ("log_dir", "resume_checkpoint", "group")
SWITCHES: dict[str, tuple[str, bool]] = {
    name: (name, True)
    for name in (
        "add_a_head", "add_head_to_start", "resume_optimizer", "use_mini_model", "protect_bos_token",
        "prevent_from_masking_myself", "relu_after_cumsum", "mask_layernorm", "residual_attention_masks",
        "disable_selection", "one_head_per_latent_mask", "init_latent_masks_to_identity",
        "init_latent_masks_to_inverse",
    )
} | {
    "add_head_to_end": ("add_head_to_start", False),
    "no_protect_bos_token": ("protect_bos_token", False),
    "allow_masking_myself": ("prevent_from_masking_myself", False),
    "no_use_compile": ("use_compile", False),
    "no_decay_lr": ("decay_lr", False),
}  # fmt: skip
"""Flags without a value: the name that each sets, and the value."""

OPTIONAL = {"selection_head_linear_combo": "true"}
"""Flags whose value may be omitted, and the value that is meant then."""

ENVIRONMENT = {
    name.upper(): name
    for name in (
        "attention_kind", "log_dir", "resume_checkpoint", "resume_optimizer", "add_a_head",
        "add_head_to_start", "max_steps", "use_mini_model",
    )
} | {"DEBUG_CUM_SUM": "debug_cum_sum"}  # fmt: skip
"""Environment variables that have the meaning of a flag."""

_MACHINE = "the launch of a run on its machines is not part of a configuration"
_TRACKER = "a run is recorded in its folder; --training.trackers=[wandb] adds the service"
_HUB = "weights stay in the run folder; nothing is uploaded automatically"
_MUP = "muP is not supported yet: the width is translated, the parametrisation is not"

MEANINGLESS: dict[str, tuple[bool, str]] = {
    "mup": (False, _MUP),
    "mup_enable_coord_check_logging": (
        False,
        "the coordinate check belongs to muP, which is not supported yet",
    ),
    "mup_zero_init": (False, _MUP),
    "readout_zero_init": (False, _MUP),
    "query_zero_init": (False, _MUP),
    "compute_base_shapes": (False, _MUP),
    "base_shapes_savefile": (True, _MUP),
    "kill_self_after_run": (False, "it shuts down a rented machine"),
    "no_use_wandb": (False, _TRACKER),
    "no-wandb": (False, _TRACKER),
    "upload_to_hf": (False, _HUB),
    "no_upload_to_hf": (False, _HUB),
    "hellaswag": (False, "HellaSwag is not measured here"),
    "no-hellaswag": (False, "HellaSwag is not measured here"),
    "key": (True, "runs are grouped by their blocks"),
    "latent_mask_scale": (True, "there is no key for the scale of a latent map's initial weights"),
    "latent_mask_precision": (True, "there is no key for the precision of latent masks alone"),
    "l1_loss": (False, "it was used to debug the original program"),
    "debugpy": (False, "it was used to debug the original program"),
}
"""Flags without a meaning here: whether a value follows, and the reason."""

MEANINGLESS_NAMES = {
    "CUDA_VISIBLE_DEVICES": _MACHINE,
    "SKIP_WANDB": _TRACKER,
    "SKIP_HELLASWAG": "HellaSwag is not measured here",
    "KILL_SELF_AFTER_RUN": "it shuts down a rented machine",
}
UNKNOWN = "the import does not know it"


@dataclass
class Asked:
    """The values that a command sets.

    Attributes:
        values: flag -> value. The last value of a repeated flag counts, as it did in the original program.
        repeated: flags given more than once with different values.
        meaningless: flags and variables without a meaning here, each with the reason.
    """

    values: dict[str, Value] = field(default_factory=dict)
    repeated: list[str] = field(default_factory=list)
    meaningless: list[tuple[str, str]] = field(default_factory=list)

    def set(self, name: str, value: Value, *, again: bool = True) -> None:
        """Set a value; with `again`, a different earlier value counts as a repetition."""
        if again and self.values.get(name, value) != value and name not in self.repeated:
            self.repeated.append(name)
        self.values[name] = value


def read_flags(call: Call) -> Asked:
    """The flags and environment variables of a run.

    Raises:
        HeadwiseError: an invalid value, such as a word instead of a number, or an unknown kind.
    """
    asked = Asked()
    for name, text in call.environment:
        _set_name(asked, name, text)
    for name, _ in call.launch:
        asked.meaningless.append((f"--{name}", _MACHINE))
    asked.set("launched", call.launched)
    seen = Asked()
    for name, given in _pairs(call.words):
        _set_flag(seen, name, given)
    asked.values |= seen.values
    asked.repeated += seen.repeated
    asked.meaningless += seen.meaningless
    return asked


def _pairs(words: list[str]) -> Iterator[tuple[str, str | None]]:
    """Flags with their values; a word that belongs to no flag is yielded alone, without `--`."""
    at = 0
    while at < len(words):
        word, following = words[at], words[at + 1] if at + 1 < len(words) else None
        at += 1
        if not word.startswith("--") or len(word) < 3:
            yield word, None
            continue
        name, equals, value = word[2:].partition("=")
        alone = name in SWITCHES or not MEANINGLESS.get(name, (True, ""))[0]
        if equals:
            yield f"--{name}", value
        elif alone or following is None or following.startswith("--"):
            yield f"--{name}", None
        else:
            at += 1
            yield f"--{name}", following


def _set_flag(asked: Asked, flag: str, given: str | None) -> None:
    name = flag.removeprefix("--")
    if flag == name:
        if flag.strip():
            asked.meaningless.append((flag, "a word that belongs to no flag"))
    elif name in MEANINGLESS:
        asked.meaningless.append((flag, MEANINGLESS[name][1]))
    elif name in SWITCHES:
        if given is not None:
            raise HeadwiseError(f"{flag} takes no value, but has the value {_short(given)}")
        asked.set(*SWITCHES[name])
    elif name in (*INTEGERS, *NUMBERS, *WORDS, *TEXTS):
        if given is None and name not in OPTIONAL:
            raise HeadwiseError(f"{flag} has no value")
        asked.set(name, _typed(name, OPTIONAL[name] if given is None else given))
    else:
        asked.meaningless.append((flag, UNKNOWN))


def _set_name(asked: Asked, name: str, text: str) -> None:
    if name in ENVIRONMENT:
        flag = ENVIRONMENT[name]
        switch = flag in SWITCHES or flag == "debug_cum_sum"
        asked.set(flag, _truth(name, text) if switch else _typed(flag, text))
    elif name == "USE_SELECTIVE":
        asked.set("attention_kind", "selective" if _truth(name, text) else "self")
    elif name == "ZERO_OUT_NEW_HEAD":
        if _truth(name, text):
            asked.set("new_head_init", "zero")
    else:
        asked.meaningless.append((name, MEANINGLESS_NAMES.get(name, UNKNOWN)))


def _truth(name: str, text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise HeadwiseError(f"{name} is {_short(text)}, but the original program takes true or false")
    return text.lower() == "true"


def _typed(name: str, text: str) -> Value:
    """A value of the type that its flag has.

    Raises:
        HeadwiseError: the text has another type.
    """
    if name in INTEGERS:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", text):
            raise HeadwiseError(f"--{name} is {_short(text)}, but must be a whole number")
        return int(text)
    if name in NUMBERS:
        try:
            number = float(text) if text.isascii() and len(text) <= 40 else math.nan
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise HeadwiseError(f"--{name} is {_short(text)}, but must be a number")
        return number
    if name in WORDS:
        try:
            return one_of(f"--{name}", text.lower(), WORDS[name])
        except HeadwiseError:
            raise HeadwiseError(
                f"--{name} is {_short(text)}, but the import knows only {', '.join(WORDS[name])}"
            ) from None
    return text


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= 60 else f"{shown[:60]}… ({len(text)} characters)"
