"""Evaluate a run's checkpoint on its validation and test splits, exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headwise.config.run import Config
from headwise.data import eval_batches, open_data
from headwise.errors import HeadwiseError
from headwise.files import write_json
from headwise.runs.weights import load_model
from headwise.training.distributed import World, find_device
from headwise.training.loss import TokenLoss, evaluate


def evaluate_run(config: Config) -> dict[str, dict[str, Any]]:
    """Loss, perplexity, bits per byte and accuracy of the best checkpoint; also written as `eval.json`.

    Args:
        config: of the run in `config.out`; its data may be overridden.

    Raises:
        HeadwiseError: there is no run or checkpoint, or the data does not fit it.
    """
    assert config.out is not None
    world = World(0, 1, find_device(config.device))
    model, _ = load_model(config.out, world.device)
    data = open_data(config.data, config.seed)
    if data.vocab_size > model.head.out_features:
        raise HeadwiseError(
            f"the data has {data.vocab_size} tokens and the model of {config.out} knows "
            f"{model.head.out_features}; evaluate it on data of its own vocabulary"
        )
    autocast = world.autocast(config.training.precision)
    lengths = [config.data.seq_len, *config.data.eval_seq_lens]
    results = {}
    for split in ("val", "test"):
        for length in lengths:
            at_length = data if length == config.data.seq_len else data.at_length(length)
            batch = config.data.batch_size_at(length)
            batches = eval_batches(at_length, split, batch, fraction=config.data.eval_fraction)
            known = data.bytes_per_token
            found = evaluate(
                TokenLoss(model), batches, world, autocast, bytes_per_token=known[split] if known else None
            )
            name = split if at_length is data else f"{split}@{length}"
            results[name] = found.row() | {"tokens": found.tokens}
    write_json(Path(config.out) / "eval.json", results)
    return results
