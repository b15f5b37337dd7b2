"""The page of `headwise masks`: which token was masked by whom and when, with figures and JSON."""

from __future__ import annotations

import base64
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from headwise.files import replacing, write_json, write_text
from headwise.questions.masks import figures as masks_figures
from headwise.report.collect import finite
from headwise.report.html import templates
from headwise.report.tables import Table, plain

if TYPE_CHECKING:
    from headwise.questions.masks.measure import Masks
    from headwise.questions.masks.selection import Selection

MAX_BYTES = 12_000_000
"""Of packed masks in one page; layers beyond it are left out, the last first."""
MANY = 6
"""Layers beyond which a sentence names two of them rather than all."""
GRADED = 0.2
"""F is called two-valued where at most this share of tokens ends between the bounds."""


def write(found: Masks, out: Path) -> dict[str, Path]:
    """Write page, figures, numbers and arrays into `out` and return their paths by kind."""
    out.mkdir(parents=True, exist_ok=True)
    data = finite(found.data)
    paths = {"html": out / "masks.html", "json": out / "masks.json", "npz": out / "masks.npz"}
    write_json(paths["json"], data)
    with replacing(paths["npz"]) as draft, draft.open("wb") as file:
        np.savez_compressed(file, **arrays(found.layers))  # type: ignore[arg-type]
    for name, figure in masks_figures.draw(data, found.layers).items():
        paths[name] = out / f"{name}.png"
        with replacing(paths[name]) as draft, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # a prompt may be in any script
            figure.savefig(draft, dpi=130, facecolor="white", format="png")
    packed = pack(found.layers)
    write_text(paths["html"], html(data, packed))
    return paths


def arrays(layers: list[Selection]) -> dict[str, np.ndarray]:
    """`attack_<layer>`, `taken_<layer>` and, under protection, `unprotected_<layer>`, `(M, T, T)`."""
    found = {}
    for one in layers:
        for name in ("attack", "taken", "unprotected"):
            if (value := getattr(one, name)) is not None:
                found[f"{name}_{one.layer}"] = value
    return found


def pack(layers: list[Selection]) -> dict[str, list[dict[str, str]]]:
    """For each layer and mask the rows up to the diagonal, as half-precision numbers in base64."""
    packed: dict[str, list[dict[str, str]]] = {}
    room = MAX_BYTES
    i, j = np.tril_indices(layers[0].taken.shape[-1])
    for one in layers:
        named = {name: getattr(one, name) for name in ("attack", "taken", "unprotected")}
        stacks = {name: x[:, i, j] for name, x in named.items() if x is not None}
        room -= sum(2 * x.size for x in stacks.values())
        if room < 0 and packed:
            break
        packed[str(one.layer)] = [
            {name: _half(x[mask]) for name, x in stacks.items()} for mask in range(len(one.taken))
        ]
    return packed


def _half(values: np.ndarray) -> str:
    most = float(np.finfo(np.float16).max)
    return base64.b64encode(np.clip(values, -most, most).astype("<f2").tobytes()).decode()


def statements(data: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """The questions of the selective attention log, each with its answer as sentences."""
    return [
        ("Is masking mostly local?", _local(data)),
        ("How many tokens are masked at all?", _masked(data)),
        ("Is F two-valued or graded?", _graded(data)),
        ("How much do the masks of a layer differ?", _differ(data)),
        ("What does protection change?", _protection(data)),
    ]


def _local(data: dict[str, Any]) -> list[str]:
    every, near, alike = data["all"], data["near"], data["alike"]
    attack, effect = every["attack"], every["effect"]
    if attack is None:
        return ["No query attacks any token."]
    if effect is None and not data["switches"].get("mask_layernorm"):
        return ["Queries attack, and no token loses anything by it."]
    kind = "effect" if effect else "attack"
    told = [_by_layer({one["layer"]: found["median"] <= near for one, found in _having(data, kind)})]
    if effect:
        medians = _each({one["layer"]: found["median"] for one, found in _having(data, kind)}, "d")
        told.append(
            f"Half of all the strength that tokens lost was taken by queries at most "
            f"{_tokens(effect['median'])} later, {effect['near']:.0%} of it within {near} "
            f"({medians})."
        )
    told.append(
        f"{'By attack alone, half' if effect else 'Half'} of the attack is spent on keys at most "
        f"{_tokens(attack['median'])} back, {attack['near']:.0%} of it within {near} (if queries attacked "
        f"all keys alike: {alike['median']} and {alike['near']:.0%})."
    )
    if effect and effect["median"] < attack["median"]:
        told.append("The difference is attack on keys that are masked already, which changes little.")
    return told


def _having(data: dict[str, Any], kind: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [(one, one["all"][kind]) for one in data["layers"] if one["all"][kind]]


def _by_layer(holds: dict[int, bool], yes: str = "Yes", no: str = "No") -> str:
    """The answer where all layers agree; otherwise which of them say what."""
    if len(set(holds.values())) == 1:
        return f"{yes if all(holds.values()) else no}{', in every layer' if len(holds) > 1 else ''}."
    those = [layer for layer, held in holds.items() if held]
    others = [layer for layer, held in holds.items() if not held]
    return f"{yes} in {_layers(those)}, {no.lower()} in {_layers(others)}."


def _layers(numbers: list[int]) -> str:
    """`layer 3`, or `layers 0, 2 to 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    told = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"layer{'s' if len(numbers) > 1 else ''} {', '.join(told)}"


def _each(values: dict[int, float], style: str) -> str:
    """The value of each layer; of many layers the least and the largest."""
    if len(values) > MANY:
        ends = (min(values, key=lambda n: values[n]), max(values, key=lambda n: values[n]))
        values = {layer: values[layer] for layer in ends}
        return " to ".join(f"{format(value, style)} in layer {layer}" for layer, value in values.items())
    return "; ".join(f"layer {layer}: {format(value, style)}" for layer, value in values.items())


def _masked(data: dict[str, Any]) -> list[str]:
    every = data["all"]
    if every["masked"] is None:
        return ["The prompt is too short: no token can be masked."]
    told = f"{every['masked']:.0%} of the {every['tokens']} tokens that can be masked end with F of 1 or more"
    if every["masked_seasoned"] is not None:
        told += f"; of the {every['seasoned']} with at least {data['later']} later queries, " \
                f"{every['masked_seasoned']:.0%}"  # fmt: skip
    return [
        f"{told} (mean over layers and masks).",
        f"A query keeps {every['kept_context']:.0%} of the keys that it sees, on average.",
    ]


def _graded(data: dict[str, Any]) -> list[str]:
    every, (low, high) = data["all"], data["bounds"]
    if every["graded"] is None:
        return []
    holds = {one["layer"]: one["all"]["graded"] <= GRADED for one in data["layers"]}
    shares = _each({one["layer"]: one["all"]["graded"] for one in data["layers"]}, ".0%")
    return [
        _by_layer(holds, "Mostly two-valued", "Graded"),
        f"{every['graded']:.0%} of tokens end with F between {low} and {high} ({shares}). Over all pairs of "
        f"a query and an earlier key it is {every['graded_pairs']:.0%}.",
        f"The median of F at the end is {every['median']:.2f}, which leaves exp(-F) = "
        f"{np.exp(-every['median']):.2g} of a key's weight.",
    ]


def _differ(data: dict[str, Any]) -> list[str]:
    several = {one["layer"]: apart for one in data["layers"] if (apart := _apart(one))}
    if not several:
        return ["Every layer has one mask."]
    differing = {layer: difference for layer, (difference, _) in several.items()}
    alike = {layer: r for layer, (_, r) in several.items() if r is not None}
    told = [
        f"Two masks of a layer differ in min(F, 1) by {np.mean([*differing.values()]):.2f} on average "
        f"({_each(differing, '.2f')})."
    ]
    if alike:
        told.append(f"Their correlation is {np.mean([*alike.values()]):.2f} ({_each(alike, '.2f')}).")
    return told


def _apart(layer: dict[str, Any]) -> tuple[float, float | None] | None:
    """Mean difference and correlation over pairs of a layer's masks; None where it has one mask."""
    pairs = layer["differences"]
    known = [pair["correlation"] for pair in pairs if pair["correlation"] is not None]
    if not pairs:
        return None
    return float(np.mean([p["difference"] for p in pairs])), float(np.mean(known)) if known else None


def _protection(data: dict[str, Any]) -> list[str]:
    if not data["protected"]:
        return ["The run has no protection (protection.kind is none), so there is nothing to compare."]
    every = data["all"]
    bare = every["unprotected"]
    told = []
    if every.get("absorbed") is not None:
        told.append(f"Protection takes up {every['absorbed']:.1%} of the attack.")
    told.append(
        "With it and without it, for the same logits: "
        f"{every['masked'] or 0:.1%} and {bare['masked'] or 0:.1%} of tokens end masked; "
        f"{every['kept_context']:.1%} and {bare['kept_context']:.1%} of the keys are kept."
    )
    if every["effect"] and bare["effect"]:
        told.append(
            f"Strength lost to queries within {data['near']} tokens: {every['effect']['near']:.0%} and "
            f"{bare['effect']['near']:.0%}."
        )
    return [*told, "Without it, F is worked out from the same logits; later layers are not run again."]


def table(data: dict[str, Any]) -> Table:
    """A row for each layer, each of its masks, and each without protection."""
    rows = []
    for one in data["layers"]:
        entries = [(f"{m}", mask) for m, mask in enumerate(one["masks"])]
        for name, entry in entries if len(entries) == 1 else [("all", one["all"]), *entries]:
            apart = _apart(one) if name == "all" else None
            differ = [plain(value, ".2f") for value in apart or (None, None)]
            rows.append(
                [str(one["layer"]), name, *_cells(entry), *differ, "yes" if data["protected"] else "none"]
            )
            if "unprotected" in entry:
                rows.append([str(one["layer"]), name, *_cells(entry["unprotected"]), "", "", "left out"])
    near = data["near"]
    headers = ["layer", "mask", "median distance, strength lost", f"within {near}", "median distance, attack",
               f"within {near} (attack)", "masked", f"masked, {data['later']}+ later", "graded",
               "graded, all pairs", "median F", "context kept", "masks differ", "correlation",
               "protection"]  # fmt: skip
    low, high = data["bounds"]
    note = (
        f"Masked: F of 1 or more at the last query, of the {data['all']['tokens']} tokens that can be. "
        f"Graded: F between {low} and {high}. Kept context: Σ_j (1 - min(F, 1)) as a share of the visible "
        "keys, mean over queries. Masks differ: mean |difference| of min(F, 1) between two masks of a layer."
    )
    return Table(headers, rows, note)


def _cells(entry: dict[str, Any]) -> list[str]:
    effect, attack = entry["effect"] or {}, entry["attack"] or {}
    return [
        plain(effect.get("median"), "d"), plain(effect.get("near"), ".0%"), plain(attack.get("median"), "d"),
        plain(attack.get("near"), ".0%"), plain(entry["masked"], ".0%"),
        plain(entry["masked_seasoned"], ".0%"), plain(entry["graded"], ".0%"),
        plain(entry["graded_pairs"], ".0%"), plain(entry["median"], ".2f"),
        plain(entry["kept_context"], ".1%"),
    ]  # fmt: skip


def html(data: dict[str, Any], packed: dict[str, Any]) -> str:
    """The page, with all data inside; it works offline."""
    from plotly.offline import get_plotlyjs

    left_out = [one["layer"] for one in data["layers"] if str(one["layer"]) not in packed]
    notes = list(data["notes"])
    if left_out:
        named = ", ".join(map(str, left_out))
        notes.append(f"The tokens of layers {named} are left out of this page for its size; see --layers.")
    shown = [{key: value for key, value in one.items() if key != "masks"} for one in data["layers"]]
    return templates().get_template("masks.html.j2").render(
        data=data | {"variants": [], "layers": shown}, packed=packed, notes=notes, facts=_facts(data),
        answers=statements(data), numbers=table(data), plotly=get_plotlyjs(),
    )  # fmt: skip


def _facts(data: dict[str, Any]) -> list[tuple[str, str]]:
    unit = data["unit"]
    return [
        ("Run", f"{data['run']}, {data['checkpoint']}"),
        ("Prompt", f"{len(data['tokens'])} {unit}s of {data['source']}"),
        ("Training length", f"{data['seq_len']} {unit}s"),
        ("Selection", ", ".join(f"{name} {value}" for name, value in data["switches"].items())),
        ("Written", data["written"]),
    ]


def _tokens(count: int) -> str:
    return f"{count} token" if count == 1 else f"{count} tokens"
