"""Measures are written once, and one from outside is a measure like any other, from a layer to a page."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from headwise import report
from headwise.attention import Attention, kinds
from headwise.attention.observation import Margins, Observation, Scores, Unmeasured, Values, Weights
from headwise.cli.main import main
from headwise.errors import HeadwiseError
from headwise.functional.head_stats import MASS, HeadStats
from headwise.measures import moments, spec
from headwise.measures import table as head_table
from headwise.measures.collector import Collector, measure
from headwise.measures.spec import Measure, measure_of, measure_table, measures, register_measure
from headwise.model.config import AttentionConfig, ModelConfig
from headwise.model.decoder import Decoder
from headwise.questions.profile.config import ProfileConfig
from headwise.questions.profile.measure import Profile
from headwise.questions.profile.page import collect
from headwise.report.atlas import grid
from headwise.runs.read import Run
from headwise.watch import watch
from headwise.watch.load import Loaded
from headwise.watch.samples import Samples

ROOT = Path(__file__).parents[2]

OUTSIDE = (
    Measure(
        "surprise", "Surprise", "Σ p |i-j|²", "tokens²", source="layer", needs_context=True, correlated=True
    ),
    Measure(
        "reach",
        "Reach",
        "furthest key",
        "tokens",
        source="layer",
        absent=-math.inf,
        table=("reach (per head)", "reach"),
    ),
)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures and kinds that a test adds are gone after it."""
    monkeypatch.setattr(spec, "MEASURES", dict(spec.MEASURES))
    monkeypatch.setattr(kinds, "KINDS", dict(kinds.KINDS))


def extra(batch: int, heads: int, tokens: int) -> dict[str, Tensor]:
    """Values of both measures: surprise = i + head, reach = i, absent where i is odd."""
    i = torch.arange(tokens, dtype=torch.float32).expand(batch, heads, tokens)
    head = torch.arange(heads, dtype=torch.float32)[:, None]
    return {"surprise": i + head, "reach": torch.where(i % 2 == 1, -math.inf, i)}


@pytest.fixture
def outside(registry: None) -> Decoder:
    """A model of a kind from outside, which lists two measures and has nothing to do with a softmax."""

    @kinds.register("outside")
    class Outside(Attention):
        supports = frozenset({"causal", "gqa", "cpu_training"})
        engine_family = "eager"
        measures = OUTSIDE

        def core(self, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool) -> Tensor:
            return v.repeat_interleave(self.shape.n_heads // self.shape.n_kv_heads, 1).cumsum(2)

        def observation(self, q: Tensor, *_: Tensor, **__: object) -> Observation:
            return Values(extra(*q.shape[:3]))

    config = ModelConfig(
        n_layers=2,
        n_heads=3,
        n_kv_heads=3,
        d_model=12,
        vocab_size=31,
        attention=AttentionConfig(kind="outside"),
    )
    return Decoder(config, 16).eval()


def test_the_page_has_the_table_as_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show-config", "--list-measures"]) == 0
    printed = capsys.readouterr().out
    assert printed == measure_table()
    assert f"\n{printed}\n" in (ROOT / "docs" / "measures.md").read_text(encoding="utf-8")
    for name, known in measures().items():
        assert f"| `{name}` | {known.label} | " in printed
    assert str(MASS) in measure_of("k_eff").definition


def test_no_other_file_decides_by_a_measures_name() -> None:
    """No comparison, in or match with the literal name of a measure (a question's own choice is data)."""
    names, found = set(measures()) | set(spec.FORMER_NAMES), []
    allowed = {"headwise/measures/collector.py": {"k_eff", "kept_context", "query_norm"}}
    for path in (ROOT / "headwise").rglob("*.py"):
        place = path.relative_to(ROOT).as_posix()
        if place.startswith(("headwise/bench/", "headwise/analysis/")) or path.name == "spec.py":
            continue  # benchmarks compare engines measure by measure; the analysis has a rule called memory
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            literals = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            used = {x.value for x in literals if isinstance(x, ast.Constant)} & names
            found += [f"{place}:{node.lineno} {name}" for name in used - allowed.get(place, set())]
    assert found == []


def test_every_measure_comes_from_the_observation_that_its_source_names() -> None:
    q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    of = {
        "weights": Weights(torch.rand(2, 4, 9, 9).tril(), 9),
        "logits": Scores(q, k, 0.5),
        "query": Scores(q, k, 0.5),
        "taken": Scores(q, k, 0.5, taken=torch.rand(2, 1, 9, 9)),
        "margins": Margins(torch.rand(2, 4, 9)),
        "layer": Values({name: torch.rand(2, 4, 9) for name in measures()}),
    }
    for name, known in measures().items():
        of["layer"] = Values({name: torch.rand(2, 4, 9)})
        assert set(measure(of[known.source], measures=[name])) == {name}
    for field in HeadStats.__dataclass_fields__:
        assert field in measures()


@pytest.mark.parametrize(
    "observation",
    [
        Values(extra(2, 4, 9)),
        Margins(torch.rand(2, 4, 9), extra=extra(2, 4, 9)),
        Weights(torch.rand(2, 4, 9, 9).tril(), 9, extra=extra(2, 4, 9)),
        Scores(torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), 0.5, extra=extra(2, 4, 9)),
    ],
)
@pytest.mark.usefixtures("registry")
def test_any_observation_may_carry_registered_measures(observation: Observation) -> None:
    for one in OUTSIDE:
        register_measure(one)
    assert set(measure(observation, measures=["surprise"])) == {"surprise"}
    means, rows = Collector(), Collector(per_token=True)
    means.add(0, observation)
    rows.add(0, observation)
    found = means.columns()
    assert found["surprise"].tolist() == [5 + head for head in range(4)]  # tokens 2 to 8
    assert found["reach"].tolist() == [4] * 4  # tokens 0, 2, 4, 6, 8
    every = rows.columns()
    assert np.isnan(every["surprise"]).tolist() == (every["token"] < 2).tolist()
    assert (every["reach"] == -math.inf).tolist() == (every["token"] % 2 == 1).tolist()


@pytest.mark.usefixtures("registry")
def test_what_a_layer_hands_over_must_be_registered_and_fit() -> None:
    with pytest.raises(HeadwiseError, match="'surprise', which is not registered"):
        Collector().add(0, Values(extra(1, 2, 3)))
    register_measure(OUTSIDE[0])
    with pytest.raises(HeadwiseError, match=r"'surprise' of shape \(2, 3\); expected \(B, H, T\)"):
        Collector().add(0, Values({"surprise": torch.zeros(2, 3)}))
    scores = Scores(torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8), 1.0, extra=extra(1, 2, 3))
    with pytest.raises(HeadwiseError, match=r"shape \(1, 2, 3\); expected \(1, 2, 4\)"):
        measure(Scores(scores.q, scores.k, 1.0, extra={"surprise": scores.extra["surprise"]}))


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("entropy", "layer", "'entropy' is registered already"),
        ("Surprise!", "layer", "'Surprise!' cannot be a column"),
        ("two words", "layer", "'two words' cannot be a column"),
        ("token", "layer", "'token' cannot be a column"),
        ("memory", "layer", "'memory' cannot be a column"),
        ("pearson_entropy", "layer", "'pearson_entropy' cannot be a column"),
        ("surprise", "wieghts", r"'wieghts' is not known \(did you mean 'weights'"),
    ],
)
@pytest.mark.usefixtures("registry")
def test_what_cannot_be_registered(name: str, source: str, message: str) -> None:
    before = measures()
    with pytest.raises(HeadwiseError, match=message):
        register_measure(Measure(name, "x", "x", source=source))  # type: ignore[arg-type]
    assert measures() == before


@pytest.mark.usefixtures("registry")
def test_absence_is_marked_by_what_no_value_can_be() -> None:
    with pytest.raises(HeadwiseError, match=r"by -1\.0, which could be a value"):
        register_measure(Measure("reach", "Reach", "x", source="layer", absent=-1.0))


def test_registering_the_same_again_changes_nothing() -> None:
    before = measures()
    assert register_measure(before["entropy"]) == before["entropy"]
    assert measures() == before


def test_a_measure_from_outside_is_a_column_a_choice_and_a_line_of_the_documentation(
    outside: Decoder,
) -> None:
    assert list(measures())[-2:] == ["surprise", "reach"]
    assert "| `surprise` | Surprise | Σ p \\|i-j\\|²; left out for the first" in measure_table()
    with torch.no_grad(), watch(outside, measures=["reach"]) as seen:
        outside(torch.randint(31, (2, 9)))
    assert seen.table().columns == [*spec.KEYS, "reach"]
    with pytest.raises(HeadwiseError, match=r"'suprise' is not known \(did you mean 'surprise'"):
        next(watch(outside, measures=["suprise"]).gen)  # type: ignore[attr-defined]
    ProfileConfig(measures=("surprise",)).validate()
    assert ProfileConfig().measures == tuple(measures())


def test_a_measure_from_outside_is_profiled_and_shown(outside: Decoder, tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 31, (1, 100))
    samples = Samples(tokens, np.arange(5), 12, {"name": "random"})
    loaded = Loaded("outside", outside, None, outside)
    for aggregate in (False, True):
        out = tmp_path / str(aggregate)
        config = ProfileConfig(n_samples=5, context_length=12, samples_per_part=2, aggregate=aggregate)
        summary = Profile(out, config).run(loaded, samples)
        assert summary["layers_with_nan"] == []
        means = pl.read_csv(out / "per_head.csv")
        assert means["surprise"].to_list() == [6.5 + head for head in (0, 1, 2) * 2]
        assert means["reach"].to_list() == [5] * 6
        page = collect(out)
        assert [m["label"] for m in page["measures"]] == ["Surprise", "Reach"]
        assert page["grids"]["reach"] == [[5.0] * 3] * 2
        table = head_table.read(out / "heads")
        if aggregate:
            assert table["reach"].to_list() == [5.0] * 30
    for name in ("surprise", "reach"):  # as where the package with the kind is not loaded
        spec.MEASURES.pop(name)
    kinds.KINDS.pop("outside")
    assert "surprise" not in measures()
    assert {"surprise", "reach"} < set(head_table.read(tmp_path / "False" / "heads").columns)
    assert [m["label"] for m in collect(tmp_path / "False")["measures"]] == ["surprise", "reach"]


def test_a_measure_from_outside_is_in_a_report(outside: Decoder, tmp_path: Path, make) -> None:
    folder = make.study(tmp_path / "s", {"flash": make.Variant("flash")}, seeds=(0,), shape=make.SMALL)
    for part in folder.rglob("heads/*.parquet"):
        frame = pl.read_parquet(part)
        values = pl.Series("reach", np.arange(len(frame)) * 1.0, dtype=pl.Float32)
        frame.with_columns(values).write_parquet(part)
    paths = report.build(folder)
    assert "#### reach (per head)" in paths["markdown"].read_text()
    assert (paths["figures"] / "atlas_reach.png").is_file()
    data = json.loads(paths["json"].read_text())
    assert data["atlas"]["measures"][-1] == {
        "name": "reach", "label": "Reach", "definition": "furthest key", "unit": "tokens"
    }  # fmt: skip


@pytest.mark.parametrize("per_token", [False, True])
def test_infinite_margins_are_left_out_of_every_mean(per_token: bool, tmp_path: Path, make) -> None:
    margin = torch.tensor(
        [[[math.inf, 1.0, 3.0], [math.inf] * 3], [[math.inf, 5.0, 7.0], [math.inf, 2.0, 2.0]]]
    )
    collector = Collector(per_token=per_token)
    collector.add(0, Margins(margin))
    folder = make.run(tmp_path / "run", make.Variant("flash"), 0, make.SMALL)
    for part in (folder / "heads").iterdir():
        part.unlink()
    head_table.write_part(folder / "heads", "step_1", collector.columns() | {"run": "r", "step": 1})
    found = grid(Run(folder))
    assert found is not None
    assert found["measures"]["margin"].tolist() == [[[4.0, 2.0]]]
    gathered = moments.gather(margin[None], ["margin"], 0)
    assert gathered["mean"].tolist() == [[4.0, 2.0]]
    assert gathered["tokens"].tolist() == [[4.0, 2.0]]


def test_the_smallest_value_of_a_head_is_over_every_token_of_every_pass_that_has_one() -> None:
    nan, inf = math.nan, math.inf
    collector = Collector(measures=("margin", "margin_min"))
    collector.add(0, Margins(torch.tensor([[[inf, 1.0, 3.0], [inf, inf, inf], [inf, 2.0, nan]]])))
    collector.add(0, Margins(torch.tensor([[[inf, 0.5, 9.0], [inf, inf, 4.0], [inf, 2.0, 1.0]]])))
    padded = torch.tensor([[True, True, False]])
    collector.add(1, Margins(torch.tensor([[[inf, 5.0, 0.0], [inf] * 3, [1.0, 2.0, 0.0]]]), key_mask=padded))
    columns = collector.columns()
    np.testing.assert_equal(columns["margin_min"].tolist(), [0.5, 4.0, nan, 5.0, nan, 1.0])
    np.testing.assert_equal(columns["margin"].tolist()[3:], [5.0, nan, 1.5])
    per_token = Collector(measures=("margin", "margin_min"), per_token=True)
    per_token.add(0, Margins(torch.rand(1, 2, 3)))
    assert set(per_token.columns()) == {"sample", "layer", "head", "token", "margin"}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([math.inf, -math.inf, math.nan, None]), st.booleans())
def test_one_rule_for_the_mean_wherever_it_is_taken(seed: int, absent: float | None, context: bool) -> None:
    """The collector's means, a profile's from its parts in any cut, and those of its rows agree."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spec, "MEASURES", dict(spec.MEASURES))
        register_measure(Measure("odd", "Odd", "x", source="layer", absent=absent, needs_context=context))
        rng = np.random.default_rng(seed)
        values = rng.random((4, 2, 6)).astype(np.float32)
        if absent is not None:
            values[rng.random(values.shape) < rng.choice([0.3, 0.9])] = absent
        tensor = torch.from_numpy(values)
        collector, rows = Collector(), Collector(per_token=True)
        for one in (collector, rows):
            one.add(0, Values({"odd": tensor[:3]}))
            one.add(0, Values({"odd": tensor[3:]}))
        parts = [
            moments.Moments(**{k: v.numpy() for k, v in moments.gather(part[None], ["odd"], 2).items()})
            for part in (tensor[:1], tensor[1:3], tensor[3:])
        ]
        expected = []
        for head in range(2):
            own = values[:, head, 2 if context else 0 :].ravel()
            has = ~np.isnan(own) & (own != absent)
            expected.append(own[has].mean(dtype=np.float64) if has.any() else math.nan)
        with np.errstate(invalid="ignore"):
            np.testing.assert_allclose(collector.columns()["odd"], expected, rtol=1e-6)
            np.testing.assert_allclose(moments.merge(parts).mean[0], expected, rtol=1e-9)


def test_older_tables_have_todays_names_and_the_same_bits(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random(4).astype(np.float32)
    keys = {"run": "a", "step": 1, "layer": np.zeros(4, np.int32), "head": np.arange(4, dtype=np.int32)}
    new = head_table.write_part(
        tmp_path / "new", "step_1", keys | {"entropy": values, "kept_context": values}
    )
    old = tmp_path / "old" / "step_1.parquet"
    old.parent.mkdir()
    pl.read_parquet(new).rename({"kept_context": "memory"}).with_columns(strange=pl.lit(1.5)).write_parquet(
        old
    )
    read = head_table.read(old.parent)
    assert read.columns == [*head_table.KEYS, "entropy", "kept_context", "strange"]
    assert read.drop("strange").equals(head_table.read(new.parent))
    assert (
        head_table.read_columns(old, ["kept_context"])["kept_context"].to_numpy().tobytes()
        == values.tobytes()
    )
    with pytest.raises(HeadwiseError, match=r"step_1\.parquet .*has no column 'margin'"):
        head_table.read_columns(old, ["margin"])


def test_an_unmeasured_layer_has_no_measures() -> None:
    assert measure(Unmeasured("it has none")) == {}
