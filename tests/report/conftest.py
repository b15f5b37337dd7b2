"""Study folders as the laboratory writes them, with made-up but lifelike numbers."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from headwise import report
from headwise.storage import head_table
from headwise.storage.head_table import MEASURES
from headwise.storage.run_folder import RunFolder

VOCAB = 256
TEXT = "def scan(tokens):\n    return [t for t in tokens if t.kind == NAME]\n"


@dataclass
class Variant:
    """What a made-up variant does; `states` gives the state of seeds that did not finish."""

    kind: str
    label: str = ""
    final: float = 1.62
    expected_engine: str | None = "sdpa"
    engine: str | None = None
    params: int = 412_928
    speed: float = 21_000.0
    vram: float | None = None
    margin: bool = False
    memory: tuple[float, ...] = ()  # keys that each layer's mask leaves at the end; all of 64.5 before
    penalty: float | None = None
    heads: bool = True
    maps: bool = True
    states: dict[int, tuple[str, str]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass
class Shape:
    """Sizes of a made-up study."""

    steps: int = 200
    eval_every: int = 40
    log_every: int = 5
    layers: int = 3
    heads: int = 4
    prompt: int = 24
    measures: tuple[str, ...] = tuple(MEASURES)


SMALL = Shape(60, 10, 5, layers=2, heads=2, prompt=6, measures=("entropy", "margin", "memory"))
DEMO = {
    "flash": Variant("flash", "flash (SDPA)"),
    "mha": Variant("mha", "mha (matrix products)", 1.615, "eager", speed=14_500.0),
    "flex": Variant(
        "flex", "flex (FlexAttention)", 1.62, "flex",
        states=dict.fromkeys(range(9), ("skipped", "flex cannot train on cpu; run it on a GPU")),
    ),
    "tropical": Variant(
        "tropical", "tropical (margins)", 1.83, None, speed=6_200.0, margin=True,
        states={2: ("diverged", "loss was not finite at step 61")},
    ),
}  # fmt: skip


def write_study(
    path: Path,
    variants: dict[str, Variant] | None = None,
    seeds: tuple[int, ...] = (0, 1, 2),
    shape: Shape | None = None,
    **plan: Any,
) -> Path:
    """Write a study folder and return it."""
    variants, shape = DEMO if variants is None else variants, shape or Shape()
    study = {
        "name": "demo",
        "title": "Which engine, and does the tropical semiring learn?",
        "question": "At equal steps, do the kinds of attention reach the same loss on source code?",
        "hypothesis": "mha and flash are the same function; tropical learns more slowly.",
        "baseline": next(iter(variants)),
        "budget": {"kind": "steps", "value": shape.steps},
        "seeds": list(seeds),
        "device": "cpu",
        "command": f"headwise study configs/demo.yaml --out {path.name}",
        "timeout_s": 600,
        "variants": {
            name: {"label": v.label or name, "kind": v.kind, "expected_engine": v.expected_engine}
            for name, v in variants.items()
        },
        "created": "2026-11-22T20:00:00",
    } | plan
    path.mkdir(parents=True, exist_ok=True)
    (path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    for name, variant in variants.items():
        for seed in seeds:
            write_run(path / name / f"seed_{seed}", variant, seed, shape)
    return path


def write_run(path: Path, variant: Variant, seed: int, shape: Shape | None = None) -> Path:
    """Write one run folder and return it."""
    shape = shape or Shape()
    state, reason = variant.states.get(seed, ("finished", ""))
    folder = RunFolder(path)
    folder.start(yaml.safe_dump({"model": {"attention": {"kind": variant.kind}}, "seed": seed}))
    engine = variant.engine or variant.expected_engine or "eager"
    env = {
        "headwise": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "cuda": None, "device": "cpu",
        "device_name": "2-core CPU", "cpu_count": 2, "threads": 1, "git_commit": "f00ba4", "git_dirty": False,
        "platform": "Linux", "engine": engine,
        "data": {"name": "pystdlib", "checksum": "5f3a9c0b77d1e2", "vocab_size": VOCAB},
    }  # fmt: skip
    (path / "env.json").write_text(json.dumps(env))
    if state in ("skipped", "planned"):
        folder.write_status(state, reason=reason)
        return path
    last = shape.steps if state == "finished" else shape.steps * 3 // 10
    rng = np.random.default_rng([seed, len(variant.kind), sum(map(ord, variant.kind))])
    rows = list(metric_rows(variant, seed, last, shape, rng))
    folder.append_metrics(rows)
    for step in range(shape.eval_every, last + 1, shape.eval_every):
        if variant.heads:
            head_part(folder, variant, step, step / shape.steps, shape, rng)
    if variant.maps and not variant.margin:
        write_maps(folder, last, shape, rng)
    beat = {"heartbeat": time.time()} if state == "running" else {"heartbeat": 1.0}
    folder.write_status(state, reason=reason, step=last, max_steps=shape.steps, **beat)
    if state in ("finished", "diverged", "timed_out"):
        folder.write_summary(summary(variant, seed, state, reason, rows, shape, engine))
    return path


def metric_rows(variant: Variant, seed: int, last: int, shape: Shape, rng: np.random.Generator) -> Any:
    """Rows of metrics.csv: a loss that falls from ln(vocab) to the variant's own."""
    start, end = math.log(VOCAB), variant.final + 0.015 * math.sin(seed * 2.4 + len(variant.kind))
    batch, smooth = 16 * 128, start
    for step in range(shape.log_every, last + 1, shape.log_every):
        clean = end + (start - end) * math.exp(-6.0 * step / shape.steps)
        loss = clean + 0.06 * float(rng.standard_normal())
        smooth = clean + 0.012 * float(rng.standard_normal())
        speed = variant.speed * (1 + 0.02 * float(rng.standard_normal()))
        yield {
            "step": step, "split": "train", "loss": loss, "smooth_loss": smooth, "tokens": step * batch,
            "flops": step * batch * 2.6e6, "tokens_per_sec": speed, "step_time_ms": 1e3 * batch / speed,
            "grad_norm": 1.1, "lr": 1e-3, "data_wait": 0.004, "vram_mb": variant.vram,
            "penalty": variant.penalty,
        }  # fmt: skip
        if step % shape.eval_every == 0:
            val = clean + 0.03
            yield {
                "step": step, "split": "val", "loss": val, "bits_per_byte": val / math.log(2),
                "perplexity": math.exp(val), "accuracy": 1 - val / start, "tokens": step * batch,
                "flops": step * batch * 2.6e6,
            }  # fmt: skip


def summary(
    variant: Variant, seed: int, state: str, reason: str, rows: list[dict], shape: Shape, engine: str
) -> dict[str, Any]:
    """The summary that belongs to the rows."""
    train = [row for row in rows if row["split"] == "train"]
    val = [row for row in rows if row["split"] == "val"]
    loss = val[-1]["loss"] if val else None
    return {
        "state": state, "reason": reason, "step": train[-1]["step"], "tokens": train[-1]["tokens"],
        "flops": train[-1]["flops"], "wall_s": 31.2, "kind": variant.kind, "engine": engine,
        "expected_engine": variant.expected_engine, "seed": seed, "vocab_size": VOCAB,
        "chance_loss": math.log(VOCAB), "train_loss": train[-1]["smooth_loss"], "val_loss": loss,
        "val_bits_per_byte": loss and loss / math.log(2), "val_perplexity": loss and math.exp(loss),
        "val_accuracy": val[-1]["accuracy"] if val else None, "best_val_loss": loss,
        "params": {"embedding": 32_768, "attention": 131_072, "mlp": variant.params - 164_608, "norm": 768,
                   "head": 0},
        "params_total": variant.params, "flops_per_token": 2_600_000,
        "tokens_per_sec": float(np.mean([row["tokens_per_sec"] for row in train[-10:]])),
        "step_time_ms": float(np.mean([row["step_time_ms"] for row in train[-10:]])),
        "peak_vram_mb": variant.vram, "peak_rss_mb": 812.0 + 3 * seed, "nonfinite_share": 0.0,
        "spike_share": 0.0, "data_wait": 0.004, "data_checksum": "5f3a9c0b77d1e2", "n_layers": shape.layers,
        "n_heads": shape.heads, "head_dim": 32, "d_model": 128, "seq_len": 128, "batch_size": 16,
        "device": "cpu",
    } | variant.summary  # fmt: skip


def head_part(
    folder: RunFolder, variant: Variant, step: int, progress: float, shape: Shape, rng: np.random.Generator
) -> None:
    """One evaluation's rows of the head table: heads that specialise as training goes on."""
    layer, head = (a.ravel() for a in np.indices((shape.layers, shape.heads)))
    depth = (layer + 0.5) / shape.layers
    focus = np.abs(np.sin(1.7 * head + 2.3 * layer + 0.1 * rng.standard_normal(layer.size))) * progress
    measures = {
        "entropy": 3.6 - 2.6 * focus, "max_weight": 0.08 + 0.8 * focus, "k_eff": 34 - 30 * focus,
        "query_norm": 2 + 4 * focus * depth, "logit_mean": -0.4 - focus, "logit_std": 0.5 + 2 * focus,
        "sink_weight": 0.02 + 0.3 * focus * depth, "self_weight": 0.03 + 0.3 * focus * (1 - depth),
        "previous_weight": 0.03 + 0.5 * focus * (head == 1), "mean_distance": 22 - 18 * focus,
    }  # fmt: skip
    if variant.margin:
        measures = {"margin": 0.02 + 0.3 * focus}
    if variant.memory:
        measures["memory"] = 64.5 + progress * (np.array(variant.memory)[layer] - 64.5)
    measures = {name: values for name, values in measures.items() if name in shape.measures}
    columns = {"run": "demo", "step": step, "layer": layer, "head": head} | measures
    head_table.write_part(folder.heads, f"step_{step:08d}", columns)


def write_maps(folder: RunFolder, step: int, shape: Shape, rng: np.random.Generator) -> None:
    """Attention maps of two prompts: a diagonal, a previous-token band, a sink, and a blur."""
    arrays: dict[str, np.ndarray] = {}
    for prompt in range(2):
        n = shape.prompt
        i, j = np.indices((n, n))
        weights = np.empty((shape.layers, shape.heads, n, n))
        for layer, head in np.ndindex(shape.layers, shape.heads):
            forms = [-((i - j) ** 2.0), -((i - j - 1) ** 2.0), -0.7 * j, 0.2 * rng.standard_normal((n, n))]
            score = np.where(j <= i, forms[(layer + head) % 4] / (1 + 0.5 * layer), -np.inf)
            p = np.exp(score - score.max(-1, keepdims=True))
            weights[layer, head] = p / p.sum(-1, keepdims=True)
        arrays[f"weights_{prompt}"] = weights.astype(np.float16)
        tokens = (TEXT * 9)[prompt * 20 : prompt * 20 + n]
        arrays[f"tokens_{prompt}"] = np.frombuffer(tokens.encode(), np.uint8)
    folder.maps.mkdir(parents=True)
    np.savez_compressed(folder.maps / f"step_{step:08d}.npz", **arrays)


def edit_study_yaml(folder: Path, **changes: Any) -> None:
    """Change entries of a study's plan."""
    plan = yaml.safe_load((folder / "study.yaml").read_text()) | changes
    (folder / "study.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """What tests make study folders with."""
    return SimpleNamespace(
        Variant=Variant,
        Shape=Shape,
        SMALL=SMALL,
        study=write_study,
        run=write_run,
        study_yaml=edit_study_yaml,
    )


@pytest.fixture(scope="session")
def built(demo: Path) -> dict[str, Path]:
    """The report of the demo study, built once. Read-only."""
    return report.build(demo)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo study: two sound variants, one skipped, one with a diverged seed. Read-only."""
    return write_study(tmp_path_factory.mktemp("runs") / "demo")
