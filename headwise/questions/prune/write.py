"""The pruned model as a folder: a run at step 0, or a Hugging Face folder; and what was found beside it."""

from __future__ import annotations

import dataclasses
import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from headwise.config.run import Config, to_yaml
from headwise.errors import HeadwiseError
from headwise.files import local, must_be_folder, no_folder, replacing
from headwise.model.decoder import Decoder
from headwise.pretrained import load_tokenizer
from headwise.questions.prune import page
from headwise.questions.prune.files import RECORD, RESULTS, results_csv
from headwise.questions.prune.measure import Options, Pruned
from headwise.report.collect import finite
from headwise.runs import checkpoint
from headwise.runs.environment import environment
from headwise.runs.folder import RunFolder
from headwise.training.telemetry import Telemetry
from headwise.watch.load import is_run


def folder_for(name: str, options: Options, out: str | None) -> Path:
    """Where the pruned model goes: `out`, or a folder inside of the run, or one below `results/prune`.

    Raises:
        HeadwiseError: it is taken or cannot be a folder.
    """
    if out is None:
        words = [options.mode, *([] if options.mode == "random" else [options.by]), f"{options.fraction:g}"]
        words += [word for word, used in (("per-layer", options.per_layer), ("zero", options.zero)) if used]
        words += [f"seed-{options.seed}"] if options.seed or options.mode == "random" else []
        inside = Path(name) / "prune" if is_run(name) else Path("results/prune") / local(name).name
        path = inside / "-".join(words)
    else:
        path = Path(out)
    must_be_folder(path)
    _refuse_taken(path)
    if reason := no_folder(path):
        raise HeadwiseError(f"cannot write to --out {path}: {reason}; pass another --out")
    return path


def write(pruned: Pruned, out: Path, *, trust_remote_code: bool = False) -> None:
    """Write the whole folder, or nothing of it."""
    record = finite(pruned.record)
    with replacing(out) as draft:
        draft.mkdir(parents=True, exist_ok=True)
        if pruned.after.loaded.run is None:
            _write_pretrained(pruned, draft, trust_remote_code)
        else:
            _write_run(pruned, draft)
        (draft / RECORD).write_text(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        (draft / RESULTS).write_text(results_csv([record]))
        (draft / "prune.md").write_text(page.markdown(record))
        page.figure([record]).savefig(draft / "prune.png", dpi=130, facecolor="white", format="png")
        _refuse_taken(out)  # another process may have written there meanwhile


def _refuse_taken(path: Path) -> None:
    if path.is_dir() and any(path.iterdir()):
        raise HeadwiseError(f"{path} exists and is not empty; give another --out, or delete it")


def _write_run(pruned: Pruned, draft: Path) -> None:
    """A run that was never trained: `train --resume` trains it on, `--init-from` starts others from it."""
    config: Config = pruned.after.loaded.run
    training = dataclasses.replace(config.training, keep_optimizer=False)
    config = dataclasses.replace(config, out=None, init_from=None, training=training)
    model = cast(Decoder, pruned.after.loaded.model)
    weights = {name: parameter.detach().float().cpu() for name, parameter in model.named_parameters()}
    state: dict[str, Any] = {
        "step": 0, "best": None, "best_loss": math.inf, "evaluation": None, "evaluated_at": -1,
        "telemetry": Telemetry(config.training.smoothing, 1, 1).state(),
    }  # fmt: skip
    about = environment(str(next(model.parameters()).device)) | {
        "engine": model.attentions()[0].engine or "unknown",
    }
    if "checksum" in pruned.record["data"] and pruned.record["data"].get("split") == "val":
        about["data"] = {k: v for k, v in pruned.record["data"].items() if k != "split"}
    folder = RunFolder(draft)
    folder.config.write_text(to_yaml(config))
    folder.environment.write_text(json.dumps(about, indent=2) + "\n")
    checkpoint.save(folder.checkpoints, checkpoint.Checkpoint(weights, {}, state))
    for line in page.statements(pruned.record):
        folder.say(line)
    folder.write_status("planned", reason="heads were removed; not trained since", step=0)


def _write_pretrained(pruned: Pruned, draft: Path, trust: bool) -> None:
    model: Any = pruned.after.loaded.model
    model.config.use_cache = True
    model.save_pretrained(draft)
    model.config.use_cache = False
    source = local(pruned.after.loaded.name)
    if source.is_dir() and not any(source.glob("*token*")):
        return  # transformers would make one up
    with suppress(
        Exception
    ):  # transformers raises errors of many libraries for a tokenizer that is not there
        load_tokenizer(pruned.after.loaded.name, trust=trust).save_pretrained(draft)
