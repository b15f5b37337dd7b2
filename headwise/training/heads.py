"""At every evaluation, a fixed validation batch fills the head table and draws the attention maps."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headwise.config.run import Config
from headwise.data.base import Data, whole_sequences
from headwise.errors import HeadwiseError
from headwise.files import replacing
from headwise.measures import table as head_table
from headwise.model.decoder import Decoder
from headwise.runs.folder import RunFolder
from headwise.training.distributed import World
from headwise.watch import watch
from headwise.watch.maps import attention_maps


class HeadRecorder:
    """Measures every head of a model on the same tokens each time it is called.

    Attributes:
        seconds: time spent measuring so far.
    """

    def __init__(self, config: Config, model: Decoder, data: Data, world: World, folder: RunFolder) -> None:
        self.measure, self.model, self.world, self.folder = config.measure, model, world, folder
        batch = whole_sequences(data, "val", self.measure.sequences)
        self.tokens, self.targets = batch.inputs.to(world.device), batch.targets.to(world.device)
        self.prompts = _prompts(config, data, self.tokens)
        self.seconds = 0.0
        self._said: set[str] = set()

    def __call__(self, step: int) -> None:
        """Record the heads at `step`; the first process does, the others do nothing."""
        if not self.world.leads:
            return
        began = time.perf_counter()
        training = self.model.training
        self.model.eval()
        if self.measure.heads:
            self._fill_table(step)
        if self.measure.maps:
            self._draw_maps(step)
        self.model.train(training)
        self.seconds += time.perf_counter() - began

    @torch.no_grad()
    def _fill_table(self, step: int) -> None:
        with watch(
            self.model,
            scores=self.measure.scores,  # type: ignore[arg-type]
            per_token=self.measure.per_token,
            ignore_first=self.measure.ignore_first,
        ) as seen:
            self.model.hidden(self.tokens)
        try:
            columns: dict[str, Any] = dict(seen.columns())
        except HeadwiseError as error:
            self._say_once(str(error))
            return
        columns |= {"run": str(self.folder.path), "step": step}
        for line in head_table.unmeasured_lines(seen.unmeasured):
            self._say_once(line)
        head_table.write_part(self.folder.heads, f"step_{step:08d}", columns, unmeasured=seen.unmeasured)

    def _draw_maps(self, step: int) -> None:
        arrays: dict[str, np.ndarray] = {}
        for index, (tokens, labels) in enumerate(self.prompts):
            maps = attention_maps(self.model, tokens)
            if maps is None:
                self._say_once(
                    "no attention maps: a layer has no weights to show, or several for each head, or layers "
                    "differ in heads"
                )
                return
            arrays |= {f"weights_{index}": maps, f"tokens_{index}": np.array(labels)}
        with replacing(self.folder.maps / f"step_{step:08d}.npz") as draft:
            np.savez_compressed(draft, **arrays)  # type: ignore[arg-type]

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self._said.add(line)
            self.folder.say(line)


def _prompts(config: Config, data: Data, batch: Tensor) -> list[tuple[Tensor, list[str]]]:
    """Token rows `(1, T)` and a label for each token."""
    measure = config.measure
    is_text = data.bytes_per_token is not None and config.data.tokenizer is None
    rows = [row[: measure.map_tokens] for row in batch[: measure.maps]]
    if measure.prompts and is_text:
        encoded = [list(prompt.encode())[: measure.map_tokens] for prompt in measure.prompts]
        rows = [torch.tensor(row, device=batch.device) for row in encoded if row]
    return [(row[None], [_label(token, is_text) for token in row.tolist()]) for row in rows]


def _label(token: int, is_text: bool) -> str:
    if not is_text:
        return str(token)
    return chr(token) if 32 < token < 127 else {32: "␣", 10: "⏎", 9: "⇥"}.get(token, f"\\x{token:02x}")
