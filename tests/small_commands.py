"""The small commands that `tests.same_numbers` runs in each checkout: every verb that computes numbers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

TINY = {
    "model.d_model": "32", "model.n_layers": "2", "model.n_heads": "4", "model.init_std": "0.2",
    "data.name": "text", "data.seq_len": "32", "data.batch_size": "4", "data.eval_fraction": "0.1",
    "training.max_steps": "15", "training.lr": "0.01", "training.warmup_steps": "3",
    "training.log_every": "1", "training.eval_every": "5", "training.checkpoint_every": "10",
    "measure.sequences": "2", "device": "cpu",
}  # fmt: skip
S = "model.attention.selective."
RUNS = {
    "mha": {
        "model.n_kv_heads": "2",
        "model.mlp": "swiglu",
        "model.dropout": "0.1",
        "measure.per_token": "true",
    },
    "flash": {"training.total_batch_tokens": "256", "data.num_workers": "1"},
    "one_mask": {"measure.sums": "true"},
    "two_masks": {f"{S}source": "dedicated", f"{S}n_masks": "2", "model.n_kv_heads": "2"},
    "latents": {f"{S}source": "latent", f"{S}n_masks": "2"},
    "combination": {f"{S}source": "linear_combo", f"{S}protect_bos": "false"},
    "penalty": {f"{S}memory_penalty.epsilon": "0.1"},
    "protection": {f"{S}protection.kind": "head_two", f"{S}protect_self": "false"},
}
"""Runs of the comparison: each name is the attention's kind, or a form of `selective`."""
STUDY = """
title: Two kinds
question: Do they differ?
baseline: flash
base:
  model: {d_model: 32, n_layers: 2, n_heads: 4}
  data: {name: ngram, vocab_size: 32, seq_len: 32, batch_size: 4, eval_sequences: 16}
  training: {lr: 0.01, warmup_steps: 2, eval_every: 5, checkpoint_every: 0}
  measure: {sequences: 2}
variants:
  flash: {overrides: {model.attention.kind: flash}}
  selective: {overrides: {model.attention.kind: selective}}
seeds: [0, 1]
budget: {kind: steps, value: 10}
workers: 1
"""


def flags(options: dict[str, str]) -> list[str]:
    return [f"--{key}={value}" for key, value in options.items()]


def train(name: str, options: dict[str, str]) -> list[str]:
    kind = name if name in ("mha", "flash") else "selective"
    keys = TINY | {"data.path": "{shared}/text.txt", "model.attention.kind": kind} | options
    return ["train", *flags(keys), "--out", "{out}/" + name]


TEXT = ["--data", "{shared}/shard.npz", "--context-length", "16", "--device", "cpu", "--cache", "{out}/cache"]
"""How `profile` and `intervene` read their contexts."""
COMMANDS: dict[str, list[str]] = {
    **{name: train(name, options) for name, options in RUNS.items()},
    "study": ["study", "{shared}/study.yaml", "--out", "{out}", "--device", "cpu"],
    "per-head-metrics": [
        "per-head-metrics", "--device=cpu", "--seed=0", "--target-flops=3e7", "--batch-size=4",
        "--sequence-len=32", "--n-layer=2", "--n-head=4", "--n-kv-head=2", "--n-embd=32", "--run-id=heads",
        "--workers=1", "--out={out}",
    ],
    "profile": [
        "profile", "{shared}/model", *TEXT, "--n-samples", "6", "--export", "csv", "--no-atlas",
        "--raw-layers", "1", "--out", "{out}/profile",
    ],
    "profile of a run": [
        "profile", "{out}/mha", "--n-samples", "4", "--context-length", "32", "--device", "cpu",
        "--scores", "post_rope", "--aggregate", "--no-atlas", "--out", "{out}/profile-run",
    ],
    "geometry": [
        "geometry", "{shared}/model", "--fold-norm", "--profile", "{out}/profile",
        "--json", "{out}/geometry/heads.json", "--out", "{out}/geometry",
    ],
    "geometry of a run": ["geometry", "{out}/two_masks", "--matrix", "core", "--out", "{out}/geometry-run"],
    "geometry correlate": [
        "geometry", "correlate", "{out}/geometry/heads.json", "--out", "{out}/correlate",
    ],
    "intervene": [
        "intervene", "{shared}/model", "--target-layer", "1", "--target-head", "2", "--control-head", "0",
        *TEXT, "--n-samples", "4", "--dtype", "float32", "--out", "{out}/intervene",
    ],
    "intervene, all heads": [
        "intervene", "{shared}/model", "--all-heads", *TEXT, "--n-samples", "4", "--dtype", "float32",
        "--out", "{out}/intervene-all",
    ],
    "intervene, removal": [
        "intervene", "{out}/one_mask", "--remove", "0.0", "1.3", "--how", "mean", "--n-samples", "4",
        "--context-length", "32", "--device", "cpu", "--out", "{out}/intervene-remove",
    ],
    "budget": [
        "budget", "{out}/one_mask", "{out}/two_masks", "--baseline", "{out}/flash", "--budgets", "1.0", "0.5",
        "0.25", "--sequences", "8", "--readmit", "--greedy", "--calibration", "4", "--device", "cpu",
        "--out", "{out}/budget",
    ],
    "masks": ["masks", "{out}/protection", "--prompt", "to be or not to be", "--device", "cpu",
              "--out", "{out}/masks"],
    "surgery": [
        "surgery", "{out}/flash", "--add-head", "start", "--init", "ko_zero", "--keep-optimizer",
        "--model.attention.kind=selective", "--training.max_steps=20", "--out", "{out}/surgery",
    ],
    "generate": [
        "generate", "{out}/one_mask", "--prompt", "to be", "--tokens", "30", "--budget", "0.25",
        "--device", "cpu",
    ],
    "generate, drawn": [
        "generate", "{out}/flash", "--prompt", "to be", "--tokens", "30", "--temperature", "1", "--seed", "3",
        "--device", "cpu",
    ],
    "report": ["report", "{out}/study", "--baseline", "selective", "--out", "{out}/report-again"],
    "export": ["export", "{out}/mha", "--out", "{out}/export"],
    "data prepare": [
        "data", "prepare", "{shared}/documents.jsonl", "--tokenizer", "bytes", "--out", "{out}/shards",
        "--length", "16", "--keep", "all",
    ],
}  # fmt: skip


def shared_files(folder: Path) -> None:
    """What both checkouts read: a text, documents, token shards, a study, and a random Llama."""
    import torch
    import transformers

    words = re.findall(r"\w+", "to be or not to be that is the question whether it is nobler in the mind")
    drawn = np.random.default_rng(0).choice(words, size=4000)
    (folder / "text.txt").write_text("\n".join(" ".join(drawn[i : i + 9]) for i in range(0, 4000, 9)))
    records = [{"text": " ".join(drawn[i : i + 20])} for i in range(0, 800, 20)]
    (folder / "documents.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "study.yaml").write_text(STUDY)
    np.savez(
        folder / "shard.npz", input_ids=np.random.default_rng(1).integers(0, 64, (6, 16), dtype=np.int32)
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, max_position_embeddings=64, initializer_range=0.4,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")


RUNNER = """
import json, os, runpy, sys
import numpy, torch
for command, printed in json.load(sys.stdin):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        with open(printed, "w") as out, open(printed + ".err", "w") as err:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
        sys.argv = ["headwise", *command]
        runpy.run_module("headwise", run_name="__main__", alter_sys=True)
        sys.exit()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Runs commands one after the other, each as `python -m headwise` in a process that has imported torch."""


def run_all(checkout: Path, shared: Path, out: Path) -> dict[str, str]:
    """Every command in turn, and the reason of each that failed."""
    printed = out / "printed"
    printed.mkdir(parents=True)
    cache = str(out / "cache")
    environment = {**os.environ, "PYTHONPATH": str(checkout), "HOME": cache, "HEADWISE_CACHE": cache}
    environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0"}
    todo = [
        ([word.format(shared=shared, out=out) for word in command], str(printed / f"{name}.txt"))
        for name, command in COMMANDS.items()
    ]
    done = subprocess.run(
        [sys.executable, "-c", RUNNER], input=json.dumps(todo), stdout=subprocess.PIPE,
        cwd=checkout, env=environment, text=True, check=True,
    )  # fmt: skip
    failed = {}
    for name, code in zip(COMMANDS, done.stdout.split(), strict=True):
        if code != "0":
            said = (printed / f"{name}.txt.err").read_text().strip().splitlines()
            failed[name] = f"exit code {code}: {said[-1] if said else 'nothing on standard error'}"
    return failed
