"""The head atlas of a profile: its numbers are the table's, and the page needs nothing but itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from headwise.errors import HeadwiseError
from headwise.report.profile import atlas, collect
from headwise.storage.head_table import write_part

LAYERS, HEADS, TOKENS, SAMPLES = 3, 4, 20, 4
MEASURED = ("entropy", "max_weight", "k_eff", "query_norm", "sink_weight", "previous_weight", "mean_distance")


@pytest.fixture
def profile(tmp_path) -> Path:
    """A finished profile of a model whose head 1.2 looks at key 0 and whose head 2.3 is NaN."""
    draw = np.random.default_rng(0)
    shape = (SAMPLES, LAYERS, HEADS, TOKENS)
    values = {name: draw.uniform(0.1, 0.4, shape).astype(np.float32) for name in MEASURED}
    values["mean_distance"] += 4
    values["sink_weight"][:, 1, 2] = 0.9
    for name in MEASURED:
        values[name][:, 2, 3] = np.nan
    keys = dict(zip(("sample", "layer", "head", "token"), np.indices(shape), strict=True))
    for part in range(2):
        some = slice(2 * part, 2 * part + 2)
        columns = {name: value[some].reshape(-1) for name, value in {**keys, **values}.items()}
        write_part(tmp_path / "heads", f"part_{part:06d}", columns)
    means = {name: value.mean((0, 3)).reshape(-1) for name, value in values.items()}
    r = np.linspace(-0.9, 0.9, LAYERS * HEADS)
    columns = {"layer": keys["layer"][0, ..., 0].reshape(-1), "head": keys["head"][0, ..., 0].reshape(-1)}
    uniform = {"uniform_keys": np.full(12, 10.5), "uniform_distance": np.full(12, 4.75)}
    columns |= uniform | means | {"pearson_entropy": r, "spearman_entropy": -r}
    rows = zip(*columns.values(), strict=True)
    lines = [",".join(columns), *(",".join("" if np.isnan(v) else str(v) for v in row) for row in rows)]
    (tmp_path / "per_head.csv").write_text("\n".join(lines) + "\n")
    about = {"model": "a/<b>", "weights": "0f", "data": {"name": "text"}, "scores": "pre_rope", "seed": None}
    (tmp_path / "profile.json").write_text(
        json.dumps({**about, "context_length": TOKENS, "aggregate": False})
    )
    summary = {"samples": SAMPLES, "tokens": SAMPLES * TOKENS, "heads": 12, "layers_with_nan": [2]}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    return tmp_path


def test_grids_kinds_and_distributions_are_the_profiles(profile):
    data = collect(profile)
    assert [m["name"] for m in data["measures"]] == list(MEASURED)
    grid = np.array(data["grids"]["sink_weight"])
    assert grid.shape == (LAYERS, HEADS)
    assert grid[1, 2] == pytest.approx(0.9)
    assert np.isnan(grid[2, 3])
    assert data["kinds"]["grid"]["cells"][1][2] == ["sink"]
    assert data["kinds"]["rules"][0][-1] == "L1 H2: sink_weight 0.9"
    assert data["top"][1][:2] == ["0", "0"]
    shares = np.array(data["distributions"]["measures"]["entropy"]["shares"])
    assert shares.shape == (LAYERS, 48)
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-3)
    assert any("NaN in layer 2" in flag for flag in data["flags"])


def test_the_page_holds_its_data_and_fetches_nothing(profile):
    page = atlas(profile).read_text()
    found = re.search(r'<script id="report-data" type="application/json">(.*?)</script>', page, re.S)
    assert found
    data = json.loads(found[1])
    assert data["grids"]["entropy"][2][3] is None
    assert data["model"] == "a/<b>"
    assert "<title>Heads of a/&lt;b&gt;</title>" in page
    body = page[: page.index('<script id="report-data"')]
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"', body)
    for section in ("kinds", "atlas", "distributions", "correlations", "numbers"):
        assert f'<section id="{section}"' in page


def test_an_unfinished_profile_has_no_atlas(profile):
    (profile / "summary.json").unlink()
    with pytest.raises(HeadwiseError, match=r"summary\.json cannot be read .* run the profile to its end"):
        atlas(profile)
