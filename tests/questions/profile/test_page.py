"""The head atlas of a profile: its numbers are the table's, and the page needs nothing but itself."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from headwise.errors import HeadwiseError
from headwise.measures.table import write_part
from headwise.questions.profile.page import atlas, collect

LAYERS, HEADS, TOKENS, SAMPLES = 3, 4, 20, 4
MEASURED = ("entropy", "max_weight", "k_eff", "query_norm", "sink_weight", "previous_weight", "mean_distance")


@pytest.fixture
def profile(tmp_path) -> Path:
    """A finished profile: head 1.2 looks at key 0, head 2.3 and layer 0 are NaN."""
    draw = np.random.default_rng(0)
    shape = (SAMPLES, LAYERS, HEADS, TOKENS)
    values = {name: draw.uniform(0.1, 0.4, shape).astype(np.float32) for name in MEASURED}
    values["mean_distance"] += 4
    values["sink_weight"][:, 1, 2] = 0.9
    for name in MEASURED:
        values[name][:, 2, 3] = values[name][:, 0] = np.nan
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
        json.dumps({**about, "context_length": TOKENS, "n_samples": SAMPLES, "aggregate": False})
    )
    summary = {"samples": SAMPLES, "tokens": SAMPLES * TOKENS, "heads": 12, "layers_with_nan": [0, 2]}
    summary["unmeasured"] = {"head.attention": "it bypasses the interface"}
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
    assert data["flags"][0] == "head.attention is not measured: it bypasses the interface."
    assert data["kinds"]["rules"][0][-1] == "L1 H2: sink_weight 0.9"
    assert data["top"][1][:2] == ["0", "0"]
    shares = np.array(data["distributions"]["measures"]["entropy"]["shares"])
    assert shares.shape == (LAYERS, 48)
    np.testing.assert_allclose(shares[1:].sum(1), 1, atol=1e-3)
    assert np.isnan(shares[0]).all()
    assert any("NaN in layer 0, 2" in flag for flag in data["flags"])


def test_a_head_of_which_nothing_is_known_has_no_kind(profile):
    data = collect(profile)
    assert data["kinds"]["grid"]["cells"][0] == [None] * HEADS
    assert data["kinds"]["grid"]["cells"][2][3] is None
    named = {row[0]: int(row[2]) for row in data["kinds"]["rules"]}
    assert sum(named.values()) == LAYERS * HEADS - HEADS - 1
    assert data["numbers"][1][:3] == ["0", "0", ""]


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


def test_without_the_measures_of_the_rules_no_kinds_are_shown(profile):
    lines = [line.split(",") for line in (profile / "per_head.csv").read_text().splitlines()]
    needed = {*MEASURED} - {"query_norm", "entropy"}
    kept = [i for i, name in enumerate(lines[0]) if name not in needed]
    (profile / "per_head.csv").write_text("\n".join(",".join(line[i] for i in kept) for line in lines))
    page = atlas(profile).read_text()
    assert '<section id="kinds"' not in page
    assert 'href="#kinds"' not in page
    assert '<section id="atlas"' in page


@pytest.mark.parametrize(
    ("scores", "rotates", "warns"),
    [("pre_rope", True, True), ("post_rope", True, False), ("pre_rope", False, False)],
)
def test_scores_before_a_rotation_are_warned_of(profile, scores, rotates, warns):
    about = json.loads((profile / "profile.json").read_text())
    (profile / "profile.json").write_text(json.dumps(about | {"scores": scores}))
    flags = collect(profile, rotates=rotates)["flags"]
    assert any("previous-token heads do not show" in f and "--scores post_rope" in f for f in flags) == warns


def test_every_heatmap_has_a_scale_and_the_sorted_table_says_by_what(profile):
    page = atlas(profile).read_text()
    for section in ("atlas", "distributions", "correlations"):
        part = page[page.index(f'<section id="{section}"') :]
        assert '<div class="scale">' in part[: part.index("</section>")]
    assert "<h3>Strongest with entropy, by |Spearman|</h3>" in page


MACHADO = {  # severity 1, linear RGB (Machado, Oliveira and Fernandes 2009)
    "full": np.eye(3),
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}
XYZ = np.array([[0.4339, 0.3762, 0.1899], [0.2126, 0.7152, 0.0722], [0.0178, 0.1095, 0.8727]])  # white is 1


@pytest.mark.parametrize("vision", MACHADO)
def test_kinds_are_told_apart_by_colour(profile, vision):
    """At least 20 apart in CIELAB (17 was too close), and from both themes' paper; 2.3 is barely visible."""
    page = atlas(profile).read_text()
    kinds = [
        re.search(rf"--kind{i}: (#\w{{6}})", page)[1] for i in range(len(collect(profile)["kinds"]["names"]))
    ]
    colours = [*kinds, *re.findall(r"--card: (#\w{6})", page)]
    rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in colours])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.array(MACHADO[vision]).T, 0, 1) @ XYZ.T
    x, y, z = np.where(seen > 0.008856, np.cbrt(seen), (903.3 * seen + 16) / 116).T
    lab = np.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)))
    apart = np.linalg.norm(lab[:, :, None] - lab[:, None], axis=0)
    assert apart[np.triu_indices(len(colours), 1)].min() > 20


def test_an_unfinished_profile_has_no_atlas(profile):
    (profile / "summary.json").unlink()
    with pytest.raises(HeadwiseError, match=r"summary\.json cannot be read: .*run the profile to its end"):
        atlas(profile)
