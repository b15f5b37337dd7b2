"""`headwise geometry`: what the weights of every head say of it, and whether that predicts how it attends."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from headwise import reading
from headwise.errors import HeadwiseError
from headwise.files import must_be_folder, must_be_writable, write_json, write_text
from headwise.measures.table import check_part
from headwise.questions.geometry import correlation
from headwise.questions.geometry import numbers as geometry

if TYPE_CHECKING:
    from headwise.questions.geometry.projections import HeadWeights

LARGEST = 512 << 20
"""Bytes of the head geometry note's file: every singular value of every head as text."""
CIRCUITS = {"query_key": "query-key circuit W_Kᵀ W_Q", "value_output": "value-output circuit W_O W_V"}


def main(argv: list[str]) -> int:
    """Describe a model's heads, or correlate a file of heads; returns the exit code."""
    if argv[:1] == ["correlate"]:
        return _correlate(argv[1:])
    args = _parser().parse_args(argv)
    if args.profile and not args.json:
        raise HeadwiseError("--profile gives the dynamics of the file that --json writes; name that file too")
    if args.out:
        must_be_folder(args.out)
    if args.json:
        must_be_writable(args.json, "--json")
    dynamics = _dynamics(Path(args.profile)) if args.profile else None
    if args.profile:
        _check_profile(Path(args.profile), args.model)

    from headwise.cli.quiet import quiet_transformers
    from headwise.questions.geometry.projections import read_weights

    quiet_transformers()
    weights = read_weights(args.model, fold_norm=args.fold_norm, stack=args.stack)
    singular = _singular_values(weights, args.matrix)
    counts = [len(values) for values in singular["query_key"]]
    shape = len(counts), max(counts)
    if dynamics is not None and dynamics["entropy"].shape != shape:
        found = " x ".join(map(str, dynamics["entropy"].shape))
        raise HeadwiseError(
            f"the profile {args.profile} has {found} (layers x heads), the model "
            f"{shape[0]} x {shape[1]}; profile the same model"
        )
    described = {name: _descriptors(values, shape[1]) for name, values in singular.items()}
    heads = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{max(counts)}"
    print(f"{weights.name}: {shape[0]} layers x {heads} heads, matrix {args.matrix}")
    for line in _remarks(weights):
        print(f"  {line}")
    for circuit, values in described.items():
        _print_layers(CIRCUITS[circuit], weights.layers, values, counts)
    broken = sum(
        int(np.isnan(v["op_norm"]).sum()) - shape[0] * shape[1] + sum(counts) for v in described.values()
    )
    if broken:
        circuits = "circuit has" if broken == 1 else "circuits have"
        print(f"headwise: {broken} {circuits} weights that are not finite: NaN descriptors", file=sys.stderr)
    if args.out:
        _write(Path(args.out), described, weights, counts)
    if args.json:
        about = {
            "model": weights.name,
            "matrix": args.matrix,
            "fold_norm": args.fold_norm,
            "notes": weights.notes,
            "not_covered": [dataclasses.asdict(one) for one in weights.not_covered],
            "layers": weights.layers,
            "heads": counts,
        }
        padded = [_padded(values, shape[1]) for values in singular["query_key"]]
        write_json(args.json, correlation.heads_document(padded, dynamics) | about)
        print(f"wrote {args.json}" + ("" if dynamics else " (without dynamics: --profile DIR adds them)"))
    return 0


def _correlate(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="headwise geometry correlate",
        description="Correlate the geometry of heads with entropy and logit spread (head geometry note).",
    )
    parser.add_argument("file", help="JSON made by `headwise geometry MODEL --json FILE --profile DIR`")
    parser.add_argument("--out", metavar="DIR", help="write the tables and the figures there")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap over layers (default: 0)")
    args = parser.parse_args(argv)
    if args.out:
        must_be_folder(args.out)

    from headwise.questions.geometry.page import document_tables, draw_correlation, further_tables

    heads = correlation.parse_heads(_read_json(Path(args.file)), args.file)
    report = correlation.correlate(heads, seed=args.seed)
    text = f"{document_tables(report)}\n\n{further_tables(report)}\n"
    print(text, end="")
    if args.out:
        folder = Path(args.out)
        write_text(folder / "correlation.txt", text)
        made = [folder / "correlation.txt", *draw_correlation(heads, report, folder)]
        print("wrote " + ", ".join(str(path) for path in made))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headwise geometry",
        description="Singular values of every head's circuits, from its weights alone; "
        "`headwise geometry correlate FILE.json` relates them to how the heads attend.",
    )
    parser.add_argument("model", help="a folder with safetensors, a name on the hub, or a headwise run")
    parser.add_argument(
        "--matrix", choices=geometry.MATRICES, default="metric",
        help="metric: W_Kᵀ W_Q; core: the head_dim x head_dim product W_K W_Qᵀ (default: metric)",
    )  # fmt: skip
    parser.add_argument(
        "--fold-norm", action="store_true", help="fold in the gain of the norm before attention"
    )
    parser.add_argument("--stack", help="which stack of layers, where a model has several")
    parser.add_argument("--json", metavar="FILE", help="write the head geometry note's file")
    parser.add_argument("--profile", metavar="DIR", help="a profile of the same model: the file's dynamics")
    parser.add_argument("--out", metavar="DIR", help="write geometry.csv and heatmaps there")
    return parser


def _singular_values(weights: HeadWeights, matrix: str) -> dict[str, list[np.ndarray]]:
    """Per circuit and layer `(H, D)`."""
    from headwise.data.progress import progress

    found: dict[str, list[np.ndarray]] = {name: [] for name in CIRCUITS}
    with progress("decomposing", len(weights), "layers") as advance:
        for number, layer in weights:
            if matrix == "core" and layer.o.shape[1] != layer.v.shape[2]:
                raise HeadwiseError(
                    f"layer {number} of {weights.name} reads a width of {layer.v.shape[2]} and writes one of "
                    f"{layer.o.shape[1]}, so that W_V W_O is not defined; leave out --matrix core"
                )
            found["query_key"].append(geometry.query_key_singular_values(layer.q, layer.k, matrix))
            found["value_output"].append(geometry.value_output_singular_values(layer.v, layer.o, matrix))
            advance(1)
    return found


def _remarks(weights: HeadWeights) -> list[str]:
    """What the projections leave out, and what has none."""
    return [*weights.notes, *(f"not covered: {one}" for one in weights.not_covered)]


def _padded(values: np.ndarray, heads: int) -> np.ndarray:
    """`(H, …)` to `(heads, …)`: NaN for the heads that this layer does not have."""
    missing = np.full((heads - len(values), *values.shape[1:]), np.nan)
    return np.concatenate([values, missing]) if len(missing) else values


def _descriptors(singular: list[np.ndarray], heads: int) -> dict[str, np.ndarray]:
    """Descriptor to `(L, heads)`."""
    layers = [geometry.descriptors(values) for values in singular]
    return {name: np.stack([_padded(one[name], heads) for one in layers]) for name in geometry.DESCRIPTORS}


def _print_layers(title: str, layers: list[int], values: dict[str, np.ndarray], counts: list[int]) -> None:
    """The mean over heads of each layer; the table stays readable for any depth."""
    print(f"\n{title}, mean over the heads of a layer (condition: median)")
    print(f"{'layer':>7}" + "".join(f"{name:>14}" for name in values))
    for row, layer in enumerate(layers):
        own = {name: v[row, : counts[row]] for name, v in values.items()}
        means = [np.median(v) if name == "condition" else v.mean() for name, v in own.items()]
        print(f"{layer:>7}" + "".join(f"{mean:>14.5g}" for mean in means))


def _write(
    folder: Path, described: dict[str, dict[str, np.ndarray]], weights: HeadWeights, counts: list[int]
) -> None:
    from headwise.questions.geometry.page import draw_descriptors

    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["layer", "head", "circuit", *geometry.DESCRIPTORS])
    for circuit, values in described.items():
        for row, head in np.ndindex(values["op_norm"].shape):
            if head >= counts[row]:
                continue
            numbers = (float(v[row, head]) for v in values.values())
            writer.writerow([weights.layers[row], head, circuit, *numbers])
    write_text(folder / "geometry.csv", text.getvalue())
    for circuit, values in described.items():
        draw_descriptors(
            values, f"{Path(weights.name).name}: {CIRCUITS[circuit]}", folder / f"geometry_{circuit}.png"
        )
    lines = [f"# Geometry of {weights.name}", "", *(f"- {line}" for line in _remarks(weights))]
    write_text(folder / "geometry.md", "\n".join(lines) + "\n")
    print(
        f"wrote {folder / 'geometry.csv'}, what it leaves out in geometry.md, and a heatmap of each circuit"
    )


def _read_json(path: Path) -> object:
    try:
        return reading.read_json(path, limit=LARGEST)
    except reading.Missing:
        raise HeadwiseError(
            f"{path} does not exist; `headwise geometry MODEL --json FILE` makes it"
        ) from None


def _check_profile(folder: Path, model: str) -> None:
    """Refuse a profile of other weights; a table without a checksum of them is taken with a word.

    Raises:
        HeadwiseError: the profile was made of other files than the model's.
    """
    from headwise.watch.tensors import checksum_of

    about = _read_json(folder / "profile.json") if (folder / "profile.json").is_file() else {}
    stated = about.get("files") if isinstance(about, dict) else None
    if stated is None or (found := checksum_of(model)) is None:
        print(f"headwise: nothing tells whether {folder} was measured on these weights", file=sys.stderr)
    elif stated != found:
        raise HeadwiseError(
            f"the profile {folder} was measured on other weights than {model}; profile it again"
        )


def _dynamics(folder: Path) -> dict[str, np.ndarray]:
    """Mean entropy and logit_std `(L, H)` of a head table: of its last step, NaN left out.

    Raises:
        HeadwiseError: no head table there, a damaged part, or a column or head that is missing.
    """
    import polars

    inside = folder / "heads"
    parts = sorted((inside if inside.is_dir() else folder).glob("*.parquet"))
    if not parts:
        raise HeadwiseError(
            f"no head table in {folder}: it holds no .parquet part; `headwise profile` makes one"
        )
    columns: set[str] = set()
    for part in parts:
        try:
            columns |= check_part(part).keys()
        except reading.Unreadable as error:
            raise HeadwiseError(f"a part of {folder} is damaged ({error})") from error
    if "part" in columns:
        raise HeadwiseError(
            f"heads of {folder} have several softmaxes, each with rows of its own, and geometry compares "
            "with one query-key product a head: profile a model whose heads have one"
        )
    missing = [name for name in correlation.DYNAMICS if name not in columns]
    if missing:
        raise HeadwiseError(f"the profile {folder} has no column {missing[0]}; profile with that measure")
    with reading.library_problems(folder):
        table = polars.scan_parquet(parts, missing_columns="insert", glob=False, hive_partitioning=False)
        last = polars.col("step").max()
        means = (
            table.filter(polars.col("step").is_null() | (polars.col("step") == last))
            .group_by("layer", "head")
            .agg(polars.col(name).fill_nan(None).mean() for name in correlation.DYNAMICS)
            .sort("layer", "head")
            .collect()
        )
    layers, heads = means["layer"].n_unique(), means["head"].n_unique()
    if len(means) != layers * heads:
        raise HeadwiseError(f"the profile {folder} does not hold every head of every layer; finish it first")
    return {
        name: means[name].cast(polars.Float64).fill_null(float("nan")).to_numpy().reshape(layers, heads)
        for name in correlation.DYNAMICS
    }
