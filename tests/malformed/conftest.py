"""A small world of valid files of every kind, made by the verbs themselves."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest

from headwise.cli.main import main

TINY = [
    "--model.d_model=8", "--model.n_layers=1", "--model.n_heads=2", "--data.seq_len=16",
    "--data.batch_size=2",
    "--training.log_every=1", "--measure.map_tokens=8", "--measure.sequences=2", "--device=cpu",
]  # fmt: skip
COPY = ["--data.name=copy", "--data.eval_sequences=4", *TINY]


def done(*argv: object) -> None:
    """Run a verb that must succeed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main([str(word) for word in argv])
    assert code == 0, said.getvalue()


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `run`, `study`, `profile`, `shards`, `half`, and single files."""
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("HEADWISE_CACHE", str(root / "cache"))
        made(Path())
    return root


def made(root: Path) -> None:
    """Fill the working folder."""
    text = root / "text.txt"
    text.write_text("def f(x):\n    return x\n" * 200)
    run = root / "study" / "a" / "seed_0"
    done("train", *COPY, "--training.max_steps=2", "--model.attention.kind=selective", "--out", run,
         "--measure.entanglement.enabled=true", "--measure.entanglement.window=8")  # fmt: skip
    done("runs", "push", run, root / "copied")
    (root / "study" / "study.yaml").write_text(
        "name: study\nbaseline: a\nseeds: [0]\nbudget: {kind: steps, value: 2}\n"
        "variants:\n  a: {label: A, kind: selective, expected_engine: null, params_total: 9}\n"
    )
    (root / "study" / "max_lengths.json").write_text(
        '{"rows": [{"variant": "a", "kind": "flash", "limit_mb": 40.0, "until": 256, "max_seq_len": 128, '
        '"capped": false, "measured_by": "tensors", "tried": []}]}\n'
    )
    done("prune", run, "--mode", "low", "--fraction", 0.5, "--zero", "--sequences", 2, "--draws", 1,
         "--out", root / "pruned")  # fmt: skip
    done("budget", run, "--budgets", 1, 0.5, "--sequences", 2, "--out", root / "budgets")
    done("profile", run, "--n-samples", 2, "--context-length", 16, "--out", root / "profile")
    done("data", "prepare", text, "--tokenizer", "bytes", "--keep", "all", "--length", 16,
         "--out", root / "shards", "--shard-sequences", 200)  # fmt: skip
    done("geometry", run, "--json", root / "heads.json", "--profile", root / "profile")
    rows = "\n".join(f"{s},0,0,target,{1 + s},{s},{2 - s},9" for s in (0.5, 1.0, 1.5))
    (root / "q_scale_intervention_results.csv").write_text(
        f"scale,layer,head,head_type,mean_entropy,mean_max_attn,mean_k_eff,n_tokens\n{rows}\n"
    )
    (root / "study-file.yaml").write_text(
        "name: s\nbase:\n  model: {d_model: 8, n_heads: 2, n_layers: 1}\n  data: {name: copy, seq_len: 16}\n"
        "variants:\n  a: {overrides: {model.attention.kind: flash}}\n  b: {seeds: [0], label: b}\n"
        "axes: {training.lr: [0.1, 0.2]}\nseeds: [0]\nbudget: {kind: steps, value: 2}\n"
    )
    (root / "nb.md").write_text(
        "```headwise:finished/0123abcd a\nheadwise train --seed 0\n```\n\nCompare: a vs b, val_loss, lower\n"
    )
    past = {"id": "0123abcd", "code": "version 0", "data": "0", "commands": "dfc22ba9972ba1a8",
            "configuration": "0", "verbs": [], "study": None,
            "runs": [{"path": "study/a/seed_0", "id": "00000000", "group": "a", "seed": 0}]}  # fmt: skip
    seen = {"seen": "2026-01-01", "exploratory": False, "looks": [{"n": 1, "at": "2026-01-01"}]}
    (root / "nb.headwise.json").write_text(
        json.dumps({"format": 1, "blocks": {"a": past}, "compares": {"a vs b, val_loss, lower": seen}})
    )
    model = root / "model"
    model.mkdir()
    (model / "config.json").write_text(
        json.dumps({"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8})
    )
    (root / "records.jsonl").write_text('{"text": "one two three"}\n' * 9)
    results = root / "results"
    results.mkdir()
    about = {"threads": 1, "device": "cpu", "device_name": "CPU", "torch": "2"}
    (results / "a.json").write_text(
        json.dumps({"benchmark": "a", "measured": "2026-11-28", "environment": about, "rows": [{"ms": 1.5}]})
    )
