"""The original program's defaults for flags that a command omits, for each state of that program.

They were read from the history of `andrew-healey/context-compression` on 2026-11-28. The log does not record
the commit of a run, so the state follows from the words of the command: the script of one file, the module
with environment variables, with flags and a required `--attention_kind`, with the flags of its later months,
or with the mini model.
"""

from __future__ import annotations

from dataclasses import dataclass

from headwise.notebook.log.flags import Asked, Value
from headwise.notebook.log.shell import Call

READ = "2026-11-28"
REPOSITORY = "andrew-healey/context-compression"


@dataclass(frozen=True)
class Defaults:
    """Defaults of a state of the program.

    Attributes:
        name: of the state.
        source: where they were read.
        values: flag -> value; a setting without a flag has the name of its variable in the program.
    """

    name: str
    source: str
    values: dict[str, Value]


_ALWAYS: dict[str, Value] = {
    "attention_kind": "selective", "random_seed": 1337, "seq_len": 1024, "batch_size": 8,
    "total_batch_size": 524288, "max_lr": 6e-4, "warmup_steps": 715, "decay_lr": True,
    "protect_bos_token": True, "prevent_from_masking_myself": True, "relu_leak": 0.0,
    "relu_after_cumsum": False, "add_a_head": False, "add_head_to_start": True, "new_head_init": "normal",
    "memory_penalty_epsilon": 0.1, "selection_head_linear_combo": "none",
    "selection_head_linear_combo_scale": 1.0, "protection_kind": "none", "use_mini_model": False,
    "disable_selection": False, "residual_attention_masks": False, "mask_layernorm": False,
    "one_head_per_latent_mask": False, "debug_cum_sum": False, "resume_optimizer": False,
}  # fmt: skip

SCRIPT = Defaults(
    "script",
    "perplexity_loss_only.py at 07db287; before USE_SELECTIVE it trained selective attention",
    _ALWAYS
    | {
        "total_batch_size": 491520, "max_steps": 10000, "n_heads": 12, "use_compile": False,
        "vocab_size": 50304, "eval_every": 250, "resume_optimizer": True,
    },
)  # fmt: skip
NAMES = Defaults(
    "environment names",
    "not in the stored history: the script's, with the batch of the first train.py with flags",
    _ALWAYS
    | {
        "max_steps": 10000, "n_heads": 12, "use_compile": False, "vocab_size": 50304, "eval_every": 25,
        "resume_optimizer": True, "add_head_to_start": False,
    },
)  # fmt: skip
EARLY = Defaults(
    "early flags",
    "the first context_compression/train.py with flags, which requires --attention_kind; a new head is added "
    "at the start, because --add_head_to_end exists",
    _ALWAYS
    | {
        "max_steps": 10000, "n_heads": 12, "use_compile": False, "vocab_size": 50304, "eval_every": 25,
    },
)  # fmt: skip
LATE = Defaults(
    "late flags",
    "context_compression/train.py at 07657e7",
    _ALWAYS
    | {
        "max_steps": 2500, "n_heads": 13, "use_compile": True, "vocab_size": 50257, "eval_every": 50,
    },
)  # fmt: skip
MINI = Defaults(
    "mini model",
    "context_compression/train.py at 07657e7 with USE_MINI_MODEL, whose width is 64 times --n_heads",
    LATE.values
    | {
        "max_steps": 1000, "seq_len": 512, "batch_size": 10, "total_batch_size": 20480, "warmup_steps": 286,
        "use_mini_model": True,
    },
)  # fmt: skip
STATES = (SCRIPT, NAMES, EARLY, LATE, MINI)

OF_THE_LATER = (
    "protection_kind", "use_compile", "batch_size", "total_batch_size", "seq_len", "max_lr", "n_heads",
    "n_sliced_masks", "n_latent_masks", "disable_selection", "residual_attention_masks", "mask_layernorm",
    "decay_lr", "use_mini_model", "debug_cum_sum",
)  # fmt: skip
"""Flags that the program did not yet have while it required --attention_kind."""

GAME_ONE_BY_ONE = (
    "scratch_pretrain_with_extra_head_4", "scratch_pretrain_with_extra_head_5",
    "scratch_pretrain_with_extra_head_6", "debugging_protection",
)  # fmt: skip
"""Groups before the "stable protect-and-attack", in which the game was summed one query after another."""

NORMAL_COMBINATION = ("scratch_pretrain_with_extra_head_4", "scratch_pretrain_with_extra_head_6")
"""Groups before the combination's start at head zero took effect, by the order of the log."""

WRONG_SIGN = ("scratch_pretrain_with_extra_head_4",)
"""Groups before the sign of protection was corrected, by the order of the log."""


def defaults_of(call: Call, asked: Asked) -> Defaults:
    """The defaults of the state that the program was in when it ran a command."""
    if call.script:
        return SCRIPT
    named = {name for name, _ in call.environment}
    if not any(word.startswith("--") for word in call.words) and "LOG_DIR" in named:
        return NAMES
    later = any(name in asked.values for name in OF_THE_LATER) or any(
        flag.startswith("--mup") for flag, _ in asked.meaningless
    )
    if "attention_kind" in asked.values and not later:
        return EARLY
    group = str(asked.values.get("group", ""))
    if asked.values.get("use_mini_model") or call.launched == "python" or "mini_model" in group:
        return MINI
    return LATE


def why_mini(call: Call, asked: Asked) -> str | None:
    """Why a run without `use_mini_model` is treated as a run of the mini model; None if it has that flag."""
    if asked.values.get("use_mini_model"):
        return None
    if call.launched == "python":
        return "started by `python` alone, on the one machine that the log runs its mini model on"
    return "its group names the mini model"
