"""`headwise intervene`: scale the query of single heads, or remove heads, and see what follows."""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise import reading
from headwise.cli.quiet import quiet_transformers
from headwise.cli.text_options import add_text_options, add_trust_option, source_of
from headwise.errors import HeadwiseError, one_of
from headwise.files import must_be_folder, write_json, write_text
from headwise.questions.intervene.gain import Gain, gain_of, summary_row
from headwise.questions.intervene.sweep import (
    SCALES,
    Sweep,
    parse_sweeps,
    sample_rows,
    sweep_rows,
    with_samples,
)

if TYPE_CHECKING:
    from headwise.questions.intervene.measure import Setting, Target
    from headwise.watch.effect import Speaker
    from headwise.watch.hooks import Layer
    from headwise.watch.samples import Samples

RESULTS = "q_scale_intervention_results.csv"
SAMPLES = "q_scale_intervention_samples.csv"
CHECK_TOKENS = 128


def main(argv: list[str]) -> int:
    """Intervene, or draw gains from saved sweeps; returns the exit code."""
    if argv[:1] == ["gain"]:
        return _gains_of_files(argv[1:])
    args = _parser().parse_args(argv)
    scales = _check(args)
    must_be_folder(args.out)

    from headwise.training.distributed import find_device
    from headwise.watch.effect import load_speaker
    from headwise.watch.hooks import attention_layers
    from headwise.watch.samples import open_samples

    quiet_transformers()
    speaker = load_speaker(
        args.model,
        dtype=args.dtype,
        device=find_device(args.device),
        trust_remote_code=args.trust_remote_code,
    )
    samples = open_samples(
        source_of(args), speaker.loaded, n_samples=args.n_samples, context_length=args.context_length,
        seed=args.seed,
    )  # fmt: skip
    layers = attention_layers(speaker.loaded.model, speaker, samples.batch(0, 1)[:, :CHECK_TOKENS])
    if args.remove:
        return _remove(args, speaker, samples, layers)
    return _scale(args, speaker, samples, layers, scales)


def _say_what(args: argparse.Namespace, samples: Samples, layers: list[Layer]) -> None:
    print(f"{args.model}: {len(layers)} layers, {len(samples)} samples of {samples.context_length} tokens")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headwise intervene",
        description="Scale the query of one head and measure the head and the model; or remove heads. "
        "`headwise intervene gain CSV… --out DIR` compares the gains of saved sweeps.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder, Hugging Face name, or headwise run")
    what = parser.add_argument_group("what to change")
    what.add_argument("--target-layer", type=int, metavar="L")
    what.add_argument("--target-head", type=int, metavar="H")
    what.add_argument("--control-head", type=int, metavar="C", help="a head to compare the target with")
    what.add_argument("--control-layer", type=int, metavar="L", help="of the control; default the target's")
    what.add_argument(
        "--head-type", default="target", choices=["target", "control"], help="label of the head"
    )
    what.add_argument("--all-heads", action="store_true", help="the gain of every head, from one pass")
    what.add_argument("--scales", type=float, nargs="+", default=list(SCALES), help="factors on the query")
    what.add_argument(
        "--remove", nargs="+", metavar="L.H", help="remove these heads, each alone and all together"
    )
    what.add_argument(
        "--how", default="zero", help="what a removed head gives: zero, or its mean (%(default)s)"
    )
    add("--data", help="shards, text file or folder, jsonl, Parquet, Hugging Face dataset, pystdlib, enwik8, "
        "wikitext103; for a headwise run default its own validation data")  # fmt: skip
    add("--out", default="results/intervention", metavar="DIR", help="tables and figures (%(default)s)")
    add("--n-samples", type=int, default=16, help="contexts to measure (%(default)s)")
    add("--context-length", type=int, default=512, help="tokens per context (%(default)s)")
    add("--seed", type=int, help="draw contexts at random; default: in order from the first")
    add("--scores", default="pre_rope", help="pre_rope or post_rope: logits before or after rotation "
        "(%(default)s)")  # fmt: skip
    add("--ignore-first", type=int, default=2, help="first tokens that are not measured (%(default)s)")
    add("--batch-size", type=int, default=4, help="contexts per forward pass (%(default)s)")
    add("--dtype", default="auto", help="of the model: auto (as stored), float32, bfloat16, float16")
    add("--device", default="auto", help="cpu, cuda, cuda:1, or auto")
    add_trust_option(parser)
    add_text_options(parser)
    return parser


def _check(args: argparse.Namespace) -> tuple[float, ...]:
    """Refuse options that do not go together, before anything is loaded; the scales, in order."""
    one_of("--scores", args.scores, ("pre_rope", "post_rope"))
    one_of("--how", args.how, ("zero", "mean"))
    if (args.target_layer is None) != (args.target_head is None):
        raise HeadwiseError("--target-layer and --target-head name one head together; give both")
    if args.target_layer is None and not args.all_heads and not args.remove:
        raise HeadwiseError(
            "nothing to change: give --target-layer L --target-head H, --all-heads, or --remove L.H"
        )
    if args.control_head is not None and args.target_layer is None:
        raise HeadwiseError(
            "--control-head is compared with a target; give --target-layer and --target-head too"
        )
    if args.control_layer is not None and args.control_head is None:
        raise HeadwiseError(f"--control-layer {args.control_layer} needs --control-head")
    if args.remove and (args.all_heads or args.target_layer is not None):
        raise HeadwiseError("--remove and scaling a query are two experiments; run them one after the other")
    control = (args.target_layer if args.control_layer is None else args.control_layer, args.control_head)
    if args.control_head is not None and control == (args.target_layer, args.target_head):
        raise HeadwiseError(
            f"layer {control[0]} head {control[1]} is both target and control; give another control"
        )
    for name, least in (("batch_size", 1), ("ignore_first", 0)):
        if getattr(args, name) < least:
            raise HeadwiseError(
                f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least {least}"
            )
    if args.context_length <= args.ignore_first + 1:
        raise HeadwiseError(
            f"--context-length {args.context_length} leaves no token to measure after --ignore-first "
            f"{args.ignore_first}; make it longer"
        )
    scales = tuple(sorted(set(args.scales)))
    if scales[0] <= 0 or len(scales) < 2:
        given = " ".join(f"{s:g}" for s in args.scales)
        raise HeadwiseError(f"--scales {given}: give at least two different factors above 0")
    return scales


def _scale(
    args: argparse.Namespace,
    speaker: Speaker,
    samples: Samples,
    layers: list[Layer],
    scales: tuple[float, ...],
) -> int:
    from headwise.data.progress import progress
    from headwise.questions.intervene.measure import (
        Setting,
        all_heads,
        check_baseline,
        check_isolation,
        refuse_unmeasurable,
        selects,
        sweep,
    )
    from headwise.questions.intervene.page import expectations, sweep_table

    targets = _targets(args, layers)
    tokens = samples.batch(0, 1)[:, :CHECK_TOKENS]
    setting = Setting(scales, args.scores, args.batch_size, args.ignore_first)
    refuse_unmeasurable(speaker, layers, targets, tokens, setting, everyone=args.all_heads)
    _say_what(args, samples, layers)
    print(
        "The query is scaled after its projection and normalisation, before RoPE; where it is reached after\n"
        "the rotation that is the same, for a rotation is linear. "
        f"Measured from q and k {'before' if args.scores == 'pre_rope' else 'after'} RoPE."
    )
    for target in targets:
        check_baseline(speaker, target, tokens)
        check_isolation(speaker, target, tokens)
        print(f"check passed, {target.name}: scale 1.0 equals no intervention, to the bit")
        print(f"check passed, {target.name}: other heads' queries, all keys and all values are bit-equal")
    print(expectations(scales))
    if _softcap(speaker):
        print("  (this model soft-caps its logits, so these trends are likely but not forced)")
    batches = -(-len(samples) // args.batch_size)
    origin = hashlib.sha256(samples.batch(0, len(samples)).numpy().tobytes()).hexdigest()[:16]
    found, everyone = [], []
    if args.all_heads:
        slow = [layer for layer in layers if selects(layer)]
        if slow:
            numbers = ", ".join(str(layer.number) for layer in slow)
            print(
                f"layer {numbers} selects: a query there also decides what later queries see, so one pass "
                "is not enough and the model is run for each head and scale"
            )
        runs = batches * (1 + len(scales) * sum(layer.n_heads for layer in slow))
        with progress("all heads", runs, "passes") as advance:
            everyone = all_heads(speaker, samples, layers, replace(setting, advance=advance))
    if targets:
        with progress("intervening", batches * len(scales) * len(targets), "passes") as advance:
            found = sweep(speaker, samples, targets, replace(setting, advance=advance))
    found, everyone = ([replace(s, samples_of=origin) for s in sweeps] for sweeps in (found, everyone))
    for one in found:
        print("\n" + sweep_table(one))
    out = Path(args.out)
    about = _about(args, samples, setting) | {"checks": "passed" if targets else None}
    _write(out, found, everyone, about)
    return 0


def _write(out: Path, sweeps: list[Sweep], everyone: list[Sweep], about: dict[str, Any] | None) -> None:
    """Save what was measured, then conclude from it."""
    from headwise.questions.intervene.page import all_heads_table, draw_all_heads, draw_sweeps

    if about is not None:
        write_json(out / "intervene.json", about)
    if sweeps and about is not None:
        _write_csv(out / RESULTS, [row for s in sweeps for row in sweep_rows(s)])
        _write_csv(out / SAMPLES, [row for s in sweeps for row in sample_rows(s)])
        draw_sweeps(sweeps, out / "q_scale_intervention.png")
    gains_of_all = [gain_of(s) for s in everyone]
    known = [g for g in gains_of_all if math.isfinite(g.gain)]
    if everyone:
        _write_csv(out / "gain_all_heads.csv", [summary_row(g) for g in gains_of_all])
    if len(known) < len(gains_of_all):
        missing = len(gains_of_all) - len(known)
        share = f"{missing} of {len(gains_of_all)}"
        print(f"headwise: {share} gains are NaN; are there NaN weights?", file=sys.stderr)
    if known:
        print("\n" + all_heads_table(known))
        draw_all_heads(known, out / "gain_all_heads.png")
    if known or sweeps:
        _conclude(out, sweeps, known)
    print(f"\nwrote {out}: " + ", ".join(sorted(path.name for path in out.iterdir() if path.is_file())))


def _conclude(out: Path, sweeps: list[Sweep], everyone: list[Gain]) -> None:
    """Gains of the sweeps, their comparison, and the verdict."""
    from headwise.questions.intervene.page import draw_comparison, draw_fit, gain_table, verdict

    gains = [gain_of(s) for s in sweeps]
    if gains:
        print("\n" + gain_table(gains) + "\n")
        print(verdict(gains, everyone))
        _write_csv(out / "gain_summary.csv", [summary_row(g) for g in gains])
    for gain, sweep in zip(gains, sweeps, strict=True):
        draw_fit(gain, sweep, out / f"gain_fit_L{gain.layer}_H{gain.head}.png")
    draw_comparison(gains, out / "gain_comparison.png", everyone)


def _gains_of_files(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="headwise intervene gain", description="Compare the gains of one or several saved sweeps."
    )
    parser.add_argument("csv", nargs="+", metavar="CSV", help=f"{RESULTS} of one or several sweeps")
    parser.add_argument("--out", required=True, metavar="DIR")
    args = parser.parse_args(argv)
    must_be_folder(args.out)
    sweeps: dict[tuple[int, int], Sweep] = {}
    for name in args.csv:
        path = Path(name)
        found = parse_sweeps(_read_csv(path), name)
        beside = path.with_name(SAMPLES)
        if path.name == RESULTS and beside.is_file():
            found = with_samples(found, _read_csv(beside), str(beside))
        for one in found:
            if (one.layer, one.head) in sweeps:
                raise HeadwiseError(f"{name} holds {one.name} again; give each head once")
            sweeps[one.layer, one.head] = one
    _write(Path(args.out), list(sweeps.values()), [], None)
    return 0


def _remove(args: argparse.Namespace, speaker: Speaker, samples: Samples, layers: list[Layer]) -> int:
    from headwise.data.progress import progress
    from headwise.questions.intervene.ablate import remove
    from headwise.questions.intervene.page import draw_removals, removal_table
    from headwise.watch.hooks import find_layer

    heads = []
    for text in dict.fromkeys(args.remove):
        if not re.fullmatch(r"\d+\.\d+", text):
            raise HeadwiseError(f"--remove {text!r} is not LAYER.HEAD, as 3.0")
        number, head = map(int, text.split("."))
        heads.append((find_layer(layers, number, head), head))
    _say_what(args, samples, layers)
    sets = [[head] for head in heads] + ([heads] if len(heads) > 1 else [])
    passes = -(-len(samples) // args.batch_size) * (len(sets) + (args.how == "mean"))
    with progress("removing", passes, "passes") as advance:
        found = remove(speaker, samples, sets, how=args.how, batch_size=args.batch_size, advance=advance)
    print(removal_table(found, args.how))
    out = Path(args.out)
    rows: list[dict[str, Any]] = []
    for removal in found:
        row: dict[str, Any] = {"heads": removal.name, "how": args.how, "n_samples": len(samples)}
        for name in ("delta_loss", "kl", "output_change"):
            row[name] = removal.effect.mean(name)
            row[f"{name}_ci95"] = removal.effect.half_width(name)
        rows.append(row)
    _write_csv(out / "removed_heads.csv", rows)
    draw_removals(found, args.how, out / "removed_heads.png")
    write_json(out / "removed_heads.json", _about(args, samples, None) | {"how": args.how, "removed": rows})
    print(f"\nwrote {out}: removed_heads.csv, removed_heads.json, removed_heads.png")
    return 0


def _targets(args: argparse.Namespace, layers: list[Layer]) -> list[Target]:
    from headwise.questions.intervene.measure import Target
    from headwise.watch.hooks import find_layer

    if args.target_layer is None:
        return []
    target = find_layer(layers, args.target_layer, args.target_head)
    targets = [Target(target, args.target_head, args.head_type)]
    if args.control_head is not None:
        number = args.target_layer if args.control_layer is None else args.control_layer
        targets.append(Target(find_layer(layers, number, args.control_head), args.control_head, "control"))
    return targets


def _about(args: argparse.Namespace, samples: Samples, setting: Setting | None) -> dict[str, Any]:
    about = {
        "model": args.model,
        "data": samples.identity,
        "n_samples": len(samples),
        "context_length": samples.context_length,
        "seed": args.seed,
        "dtype": args.dtype,
    }
    if setting is not None:
        about |= {"scales": setting.scales, "scores": setting.scores, "ignore_first": setting.ignore_first}
    return about


def _softcap(speaker: Speaker) -> bool:
    config = getattr(speaker.loaded.model, "config", None)
    get_text_config = getattr(config, "get_text_config", lambda: None)
    return bool(getattr(get_text_config(), "attn_logit_softcapping", None))


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def _read_csv(path: Path) -> list[dict[str, str]]:
    try:
        return reading.read_csv(path)
    except reading.Missing:
        raise HeadwiseError(f"{path} does not exist; `headwise intervene MODEL …` makes it") from None
