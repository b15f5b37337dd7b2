"""The notebook that `notebook new` writes; it runs unchanged on a CPU in about a minute."""

from __future__ import annotations

CONFIGURATION = """\
# The configuration that all runs of the notebook share.
model: {d_model: 32, n_layers: 1, n_heads: 2}
data: {name: copy, vocab_size: 16, seq_len: 16, batch_size: 16}
training: {max_steps: 200, eval_every: 50, checkpoint_every: 0, warmup_steps: 10, lr: 0.003}
measure: {sequences: 4}
device: cpu
"""


def template(title: str, configuration: str) -> str:
    """The text of a notebook with this title, whose runs read the file `configuration`."""

    def lines(flags: str) -> str:
        return "\n".join(f"headwise train --config {configuration}{flags} --seed {n}" for n in (0, 1, 2))

    return f"""# {title}

Write your hypothesis and the commands that test it, run `headwise notebook run` on this file, and read the
result below each block.

## The noise floor

Three seeds of the unchanged baseline show how much the loss varies by chance.

```headwise:planned base
{lines("")}
```

## A larger learning rate

Hypothesis: a learning rate of 0.01 reaches a lower loss in the same number of steps.

```headwise:planned faster
{lines(" --training.lr 0.01")}
```

Compare: faster vs base, val_loss, lower, at least 0.01
"""
