"""`headwise show-config`: every decision and formula of a profile, before it runs."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from headwise import reading
from headwise.cli.profile import config_of, make_parser
from headwise.errors import HeadwiseError, one_of
from headwise.files import local
from headwise.measures.spec import CORRELATED_WITH, SOURCES, correlated, measure_of, measure_table, measures


def main(argv: list[str]) -> int:
    """Print what `headwise profile` with the same options would do."""
    if "--engines" in argv:
        return _engines(argv)
    if "--list-measures" in argv:
        import headwise.attention  # noqa: F401  # kinds register measures of their own

        print(measure_table(), end="")
        return 0
    parser = make_parser("headwise show-config")
    parser.description = "Print every decision and formula of a profile before it runs; takes its options."
    parser.add_argument(
        "--engines", nargs="?", metavar="KIND", help="instead, for every option of a kind: what runs fused"
    )
    parser.add_argument(
        "--list-measures", action="store_true", help="instead, every measure with its definition"
    )
    for action in parser._actions:
        action.required = action.required and action.dest != "out"
    args = parser.parse_args(argv)
    config = config_of(args)
    for title, lines in _sections(args, config):
        print(f"\n{title}\n{'-' * len(title)}")
        width = max(len(name) for name, _ in lines)
        for name, what in lines:
            print(f"{name:<{width}}  {what}")
    return 0


def _engines(argv: list[str]) -> int:
    """Print which engine computes which option, of one kind or of all that have such a table."""
    from headwise.attention import KINDS
    from headwise.attention.kinds import resolve

    having = {name: kind.engine_table for name, kind in KINDS.items() if kind.engine_table}
    asked = [name for name in argv if name != "--engines"]
    for name in asked or having:
        print(resolve(having[one_of("kind with an engine table", name, having)])(), end="")
    return 0


def _sections(args: argparse.Namespace, config: Any) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    shape = _shape(args.model)
    yield "Model", [("model", args.model), *shape.items(), *_precision(args)]
    yield "Data", _data(args, config)
    yield "Attention that is measured", _attention(config)
    yield "Measures of query i over the keys j it sees", _measures(config)
    yield "Correlations per head", _correlations(config)
    yield "Table", _table(args, config, shape)


def _precision(args: argparse.Namespace) -> list[tuple[str, str]]:
    stored = " (as the checkpoint stores it)" if args.dtype == "auto" else ""
    return [
        ("weights", f"{args.dtype}{stored}"),
        ("measures", f"computed in float32, stored as {args.table_dtype}; means and sums in float64"),
        ("device", args.device),
        ("attention", "the implementation the model has; watching does not change its outputs"),
    ]


def _data(args: argparse.Namespace, config: Any) -> list[tuple[str, str]]:
    order = (
        "in order from the first" if config.seed is None else f"drawn without repetition, seed {config.seed}"
    )
    tokens = config.n_samples * config.context_length
    return [
        ("data", args.data or "the validation data of the run"),
        ("tokenizer", args.tokenizer or "the model's own; shards are tokens already"),
        ("contexts", f"{config.n_samples} x {config.context_length} = {tokens:,} tokens"),
        ("order", order),
        ("cutting", "non-overlapping, whole contexts only, no padding, no special tokens added"),
        ("batch", f"{args.batch_size} contexts per forward pass (does not change the table's rows)"),
    ]


def _attention(config: Any) -> list[tuple[str, str]]:
    where = {
        "pre_rope": "before the rotation (positions do not enter the logits)",
        "post_rope": "after the rotation, as the model attends",
    }[config.scores]
    return [
        ("q, k", where),
        ("logits", "s[i,j] = scale · q_i·k_j, soft-capped where the model does; scale, mask, sliding "
         "window and bias are the model's"),
        ("weights", "p_j = softmax_j(s[i,j] + bias) over the keys that query i sees; with grouped keys "
         "each query head by its own group's"),
    ]  # fmt: skip


def _measures(config: Any) -> list[tuple[str, str]]:
    found = [measure_of(name) for name in config.measures]
    lines = [(m.name, m.definition + (f"  [{m.unit}]" if m.unit else "")) for m in found]
    for m in found:
        if m.needs_context:
            lines.append(("", f"{m.name} is NaN for the first {config.ignore_first} tokens of a context"))
        if m.remark:
            lines.append(("", f"{m.name}: {m.remark}"))
        if m.source not in ("weights", "logits", "query"):
            lines.append(("", f"{m.name} is there only where a layer offers {SOURCES[m.source]}"))
    return lines


def _correlations(config: Any) -> list[tuple[str, str]]:
    against = correlated(config.measures)[1:]
    if not against:
        others = ", ".join(correlated(measures())[1:])
        return [("none", f"they need {CORRELATED_WITH} and one of {others}")]
    tokens = f"over tokens from number {config.ignore_first} on, of all contexts"
    lines = [
        ("of", f"{CORRELATED_WITH} with {', '.join(against)}, {tokens}"),
        ("pearson", "Σ(x-x̄)(y-ȳ) / √(Σ(x-x̄)² Σ(y-ȳ)²), float64"),
    ]
    if config.aggregate:
        return [*lines, ("spearman", "not with --aggregate: ranks need every token")]
    return [*lines, ("spearman", "Pearson's of the ranks; equal values share the mean of theirs")]


def _table(args: argparse.Namespace, config: Any, shape: dict[str, str]) -> list[tuple[str, str]]:
    row = (
        "one row per (sample, layer, head)"
        if config.aggregate
        else "one row per (sample, layer, head, token)"
    )
    lines = [("rows", row)]
    if {"layers", "heads"} <= shape.keys():
        by_layer = [int(heads) for heads in shape["heads"].split()]
        heads = sum(by_layer) if len(by_layer) > 1 else int(shape["layers"]) * by_layer[0]
        count = heads * config.n_samples
        count *= 1 if config.aggregate else config.context_length
        size = count * len(config.measures) * (2 if config.table_dtype == "float16" else 4)
        lines.append(("size", f"{count:,} rows, at most {size / 1e6:,.0f} MB of measures before compression"))
    lines += [
        ("parts", f"Parquet, {config.samples_per_part} contexts each; a part is whole or absent"),
        ("out", args.out or "given by --out: heads/ per_head.csv summary.json, atlas.html"),
        ("resume", "the same command goes on where it stopped; other options are refused"),
    ]
    if config.raw_layers:
        kept = ", ".join(map(str, config.raw_layers))
        lines.append(("raw", f"q, k ({config.scores}) and v of layer {kept}, safetensors in raw/"))
    if args.export:
        from headwise.questions.profile.export import COLUMNS

        lines.append(("csv", "attention_metrics_{timestamp}.csv: " + ", ".join(COLUMNS.values())))
    return lines


def _shape(model: str) -> dict[str, str]:
    """Layers and heads, where a configuration on this machine tells them."""
    folder = local(model)
    if (folder / "config.yaml").is_file():
        from headwise.config.run import load
        from headwise.model.count import attention_block

        own = load(folder / "config.yaml").model
        heads = " ".join(map(str, own.heads_by_layer or [own.n_heads]))
        return {
            "layers": str(own.n_layers), "heads": heads, "head_dim": str(own.width_of_head()),
            "attention block": attention_block(own),
        }  # fmt: skip
    try:
        config = reading.read_json(folder / "config.json", dict[str, Any])
    except reading.Missing:
        return {}
    inner = config.get("text_config")
    config = inner if isinstance(inner, dict) else config
    names = {
        "layers": ("num_hidden_layers", "n_layer"),
        "heads": ("num_attention_heads", "n_head"),
        "key/value heads": ("num_key_value_heads",),
        "head_dim": ("head_dim",),
    }
    found = {label: next((config[k] for k in keys if config.get(k)), None) for label, keys in names.items()}
    for label, value in found.items():
        if value is not None and (type(value) is not int or not 0 < value < 1 << 20):
            raise HeadwiseError(f"{folder / 'config.json'} has {value!r} {label}; it must be a whole number")
    return {label: str(value) for label, value in found.items() if value is not None}
