"""Add a head to a trained model: a new run, at step 0, with the operated weights."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwise.attention import Preserved
from headwise.config.run import Config, load, to_yaml
from headwise.data import eval_batches, open_data
from headwise.data.base import Data
from headwise.errors import HeadwiseError
from headwise.files import replacing
from headwise.model.config import ModelConfig
from headwise.model.convert import shape_of_nanogpt
from headwise.model.decoder import Decoder
from headwise.model.preservation import learns, preserved
from headwise.model.surgery import Operation, grow, grown, initial, refuse_fixed_heads
from headwise.runs import checkpoint
from headwise.runs import operation as new_head
from headwise.runs.environment import environment
from headwise.runs.folder import RunFolder
from headwise.runs.operation import Piece
from headwise.runs.weights import Source, initialise_from, own_parameters, refuse_no_optimizer
from headwise.training.distributed import World, find_device
from headwise.training.loss import TokenLoss, evaluate
from headwise.training.run import with_vocabulary
from headwise.training.telemetry import Telemetry

ROUNDING = 1e-4
"""Logits count as unchanged within this share of the largest."""

OWN = ("--out=null", "--init_from=null", "--expected_engine=null", "--training.keep_optimizer=false")
"""What a new run does not take over from the source's configuration."""

GROWN = ("n_heads", "n_kv_heads", "head_dim", "max_seq_len")
TOLD = (
    "d_model", "n_layers", "d_ff", "vocab_size", "norm", "mlp", "position", "tie_embeddings", "bias",
)  # fmt: skip
"""Keys of `model` that a new head changes or makes explicit, and those that a `.pt` file tells."""

COMPARED = 4
"""Validation sequences whose logits are compared."""


def model_of(source: Source, heads: int | None) -> ModelConfig:
    """The model that `source` holds; of a `.pt` file all that its tensors tell.

    Args:
        heads: of a file that does not say.

    Raises:
        HeadwiseError: it belongs to no run, or does not say how many heads it has.
    """
    if not source.nanogpt:
        if source.config is None:
            raise HeadwiseError(
                f"{source.name} belongs to no run: config.yaml is missing where its run would be"
            )
        if heads is not None:
            raise HeadwiseError(f"--source-heads is for .pt files; {source.name} has a config.yaml that says")
        config = load(source.config)
        table = config.model.max_seq_len or config.data.seq_len
        learned = config.model.position == "learned"
        return dataclasses.replace(config.model, max_seq_len=table) if learned else config.model
    n_heads = heads if source.n_heads is None else source.n_heads
    if n_heads is None:
        raise HeadwiseError(f"{source.name} does not say how many heads it has; give --source-heads")
    if n_heads < 1:
        raise HeadwiseError(f"--source-heads is {n_heads}; a model has at least 1")
    shape = shape_of_nanogpt(source.weights, source.name)
    if shape["d_model"] % n_heads:
        raise HeadwiseError(
            f"{source.name} has width {shape['d_model']}, which {n_heads} heads cannot share; "
            "give another --source-heads"
        )
    return ModelConfig(**shape, n_heads=n_heads)


def arguments(source: Source, before: ModelConfig) -> list[str]:
    """The new run's configuration as flags, for others to follow: the source's, with the head added."""
    after = grown(before)
    first = ["--config", str(source.config), *OWN] if source.config else []
    keys = GROWN if source.config else (*TOLD, *GROWN)
    values = {key: getattr(after, key) for key in keys}
    return first + [
        f"--model.{key}={value if isinstance(value, str) else json.dumps(value)}"
        for key, value in values.items() if value is not None
    ]  # fmt: skip


def with_new_head(config: Config, before: ModelConfig, source: str) -> Config:
    """`config` with one head more than `before`, whether it counts the new one already or not.

    Raises:
        HeadwiseError: it says another number or width of heads, or what it says makes no model.
    """
    after = grown(before)
    for key in ("n_heads", "n_kv_heads", "head_dim"):
        said, was, becomes = (getattr(model, key) for model in (config.model, before, after))
        if said not in (None, was, becomes):
            raise HeadwiseError(
                f"model.{key} is {said}, and with a head added to {source} it is {becomes or 'not given'}; "
                "leave it out"
            )
    sizes = {key: getattr(after, key) for key in ("n_heads", "n_kv_heads", "head_dim")}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, **sizes))
    config.validate()
    refuse_fixed_heads(config.model, source)
    return config


def operate(
    source: Source,
    before: ModelConfig,
    config: Config,
    *,
    place: str,
    init: str,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Write the run `config.out`: the source's weights with one head more in every layer, at step 0.

    Args:
        before: the source's model.
        config: of the new run, with the head added; `out` set.
        place, init: see `headwise.model.surgery`; refused beforehand.
        say: gets each line that a person should read; `log.txt` has them too.

    Returns:
        What `surgery.json` holds.

    Raises:
        HeadwiseError: something does not fit; nothing is written then.
    """
    assert config.out is not None
    if RunFolder(Path(config.out)).holds_run():
        raise HeadwiseError(f"{config.out} holds a run; surgery writes a new one: pass another --out")
    RunFolder(Path(config.out)).refuse_taken()
    if config.training.keep_optimizer:
        refuse_no_optimizer(source)
    world = World(0, 1, find_device(config.device))
    data = open_data(config.data, config.seed)
    config = with_vocabulary(config, data)
    operation = Operation(before, config.model, place, init)
    old, new, own_init = _models(source, operation, config)
    lines: list[str] = []

    def tell(line: str) -> None:
        lines.append(line)
        say(line)

    expected = preserved(operation)
    _announce(source, operation, expected, own_init, tell)
    old, new = old.to(world.device).eval(), new.to(world.device).eval()
    losses = {name: _loss(model, data, config, world) for name, model in (("source", old), ("operated", new))}
    change, size = _logits_apart(old, new, data, config, world)
    tell(_compared(losses, change, size, expected))
    record = {
        "source": source.name, "source_kind": before.attention.kind, "kind": config.model.attention.kind,
        "place": place, "init": init, "n_heads": [before.n_heads, config.model.n_heads],
        "preserves": expected.holds, "why": expected.why, "learns": learns(operation),
        "unchanged": change <= ROUNDING * size, "logit_change": change, "logit_size": size,
        "val_loss": losses, "keeps_optimizer": config.training.keep_optimizer, "own_init": own_init,
        "operated_in": None, "pieces": [piece._asdict() for piece in pieces(operation)],
    }  # fmt: skip
    optimizer = _optimizer(source, new, operation) if config.training.keep_optimizer else {}
    _write(config, new, optimizer, record, lines, environment(str(world.device)) | {
        "engine": new.deciding().engine or "unknown", "data": data.identity,
    })  # fmt: skip
    return record


def pieces(operation: Operation) -> list[Piece]:
    """Where the new head's weights lie in the new model."""
    found = []
    for layer in range(operation.after.n_layers):
        stem = f"blocks.{layer}.attention"
        found += [
            Piece(layer, part, f"{stem}.qkv.weight", 0, *rows) for part, rows in operation.rows().items()
        ]
        found.append(Piece(layer, "o", f"{stem}.out.weight", 1, *operation.columns()))
    return found


def _models(source: Source, operation: Operation, config: Config) -> tuple[Decoder, Decoder, list[str]]:
    """The model before and the one after, and what of the latter the source says nothing of."""
    old = Decoder(operation.before, config.data.seq_len)
    initialise_from(source, old)
    torch.manual_seed(config.seed)
    new = Decoder(config.model, config.data.seq_len)
    weights = {name: parameter.detach() for name, parameter in old.named_parameters()}
    operated = grow(weights, initial(new, operation), operation, source.name)
    checkpoint.load_weights(new, operated, source.name)
    own_init = [name for name, _ in new.named_parameters() if name not in weights]
    foreign = next((name for name in own_init if name not in own_parameters(new)), None)
    if foreign:
        raise HeadwiseError(f"{source.name} is from another configuration: it has no parameter {foreign}")
    return old, new, own_init


def _announce(
    source: Source,
    operation: Operation,
    expected: Preserved,
    own_init: list[str],
    tell: Callable[[str], None],
) -> None:
    before, after = operation.before, operation.after
    kinds = [model.attention.kind for model in (before, after)]
    tell(
        f"{source.name}: a head at the {operation.place} of each of {after.n_layers} layers, init "
        f"{operation.init}: {before.n_heads} heads of {after.width_of_head()} become {after.n_heads}, "
        f"kind {' becomes '.join(dict.fromkeys(kinds))}"
    )
    if operation.shares_keys:
        tell("the new head uses the one key/value head that all share")
    if own_init:
        leaves = dict.fromkeys(name.partition(".attention.")[2] for name in own_init)
        tell(f"kind {kinds[1]} adds attention.{{{', '.join(leaves)}}}, which start from their own init")
    verdict = "the function is preserved" if expected.holds else "warning: the function is not preserved"
    tell(f"{verdict}: {expected.why}")
    if not learns(operation):
        tell(
            f"warning: init {operation.init} never learns: no gradient reaches the new head; "
            "use ko_zero or o_zero for one that does"
        )


def _compared(losses: dict[str, float], change: float, size: float, expected: Preserved) -> str:
    unchanged = change <= ROUNDING * size
    line = (
        f"validation loss before any step: {losses['source']:.6f} of the source, {losses['operated']:.6f} "
        f"operated ({'unchanged' if unchanged else 'changed'}: the largest change of a logit is "
        f"{change:.2g}, the largest logit {size:.2g})"
    )
    if expected.holds and not unchanged:
        line += "; this should not be: please report it"
    return line


def _loss(model: Decoder, data: Data, config: Config, world: World) -> float:
    """Exact loss on the validation split, in the precision of training."""
    batches = eval_batches(
        data, "val", config.data.batch_size_at(config.data.seq_len), fraction=config.data.eval_fraction
    )
    return evaluate(TokenLoss(model), batches, world, world.autocast(config.training.precision)).loss


@torch.no_grad()
def _logits_apart(
    old: Decoder, new: Decoder, data: Data, config: Config, world: World
) -> tuple[float, float]:
    """The largest change of a logit in float32 on some validation sequences, and the largest logit."""
    batch = next(iter(eval_batches(data, "val", min(COMPARED, config.data.batch_size))))
    tokens = batch.inputs.to(world.device)
    ours = old(tokens)
    return (new(tokens) - ours).abs().max().item(), ours.abs().max().item()


def _optimizer(source: Source, new: Decoder, operation: Operation) -> dict[str, Tensor]:
    """The source's optimizer state for the new shapes: zeros for the new head, the rest as it was."""
    parameters = {name: parameter.detach().cpu() for name, parameter in new.named_parameters()}
    by_slot: dict[str, dict[str, Tensor]] = {}
    for key, value in source.optimizer.items():
        name, _, slot = key.rpartition(".")
        by_slot.setdefault(slot, {})[name] = value
    result: dict[str, Tensor] = {}
    for slot, values in by_slot.items():
        counts = {name: value for name, value in values.items() if value.dim() == 0}
        zeros = {name: torch.zeros_like(parameters[name]) for name in values if name not in counts}
        moments = {name: values[name] for name in zeros}
        whole = counts | grow(moments, zeros, operation, source.name)
        result |= {f"{name}.{slot}": value for name, value in whole.items()}
    return result


def _write(
    config: Config,
    new: Decoder,
    optimizer: dict[str, Tensor],
    record: dict[str, Any],
    lines: list[str],
    about: dict[str, Any],
) -> None:
    """The whole folder, or nothing of it."""
    assert config.out is not None
    weights = {name: parameter.detach().cpu() for name, parameter in new.named_parameters()}
    state = {
        "step": 0, "best": None, "best_loss": math.inf, "evaluation": None, "evaluated_at": -1,
        "telemetry": Telemetry(config.training.smoothing, 1, 1).state(),
    }  # fmt: skip
    start = {
        f"{layer}.{part}": (weights[name][:, a:b] if axis else weights[name][a:b]).numpy()
        for layer, part, name, axis, a, b in (Piece(**piece) for piece in record["pieces"])
    }
    with replacing(Path(config.out)) as draft:
        folder = RunFolder(draft)
        folder.start(to_yaml(config))
        folder.environment.write_text(json.dumps(about, indent=2) + "\n")
        checkpoint.save(folder.checkpoints, checkpoint.Checkpoint(weights, optimizer, state))
        new_head.write(draft, record, start)
        for line in lines:
            folder.say(line)
        folder.write_status("planned", reason="a head was added; not trained yet", step=0)
        RunFolder(Path(config.out)).refuse_taken()  # another process may have begun a run there meanwhile
