"""`report.md` has the per-head metrics study's sections, word for word, after what must be known first."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from headwise.report import markdown
from headwise.report.collect import collect
from headwise.runs.read import Study


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory, make) -> str:
    """The per-head metrics study's three variants."""
    variants = {
        "standard": make.Variant("flash", "standard (SDPA)"),
        "standard_flex": make.Variant("flex", "standard (FlexAttention)", expected_engine="flex"),
        "tropical": make.Variant("tropical", "tropical (margins)", expected_engine=None, margin=True),
    }
    folder = make.study(
        tmp_path_factory.mktemp("suite") / "pv0_smoke", variants, shape=make.SMALL, name="pv0_smoke",
        title="Per-head metrics suite", budget={"kind": "flops", "value": 2e8},
        command="headwise per-head-metrics --target-flops 2e8",
    )  # fmt: skip
    return markdown.render(collect(Study.read(folder)), {})


def test_begins_with_the_conclusion_of_every_variant(suite: str) -> None:
    lines = suite.splitlines()
    assert lines[0] == "# Per-head metrics suite"
    assert re.match(
        r"- \*\*standard_flex\*\*: \w+ \w+ standard: validation loss [+-]\S+ nats \[\S+, \S+\] "
        r"\(3 seeds\), .*\. Costs: parameters 1\.00x, .*\. Distrust: ",
        lines[2],
    )
    assert lines[3].startswith("- **tropical**: ")


def test_head_of_the_per_head_metrics_study(suite: str) -> None:
    assert (
        "\n\n## Study\n\n- Run ID: `pv0_smoke`\n- Device: `cpu`\n- Seeds: `0, 1, 2`\n"
        "- Target FLOPs/run (est): `2.000e+08`\n"
    ) in suite


def test_sections_in_order(suite: str) -> None:
    headings = re.findall(r"^#+ .*$", suite, re.M)
    title = "# Per-head metrics suite"
    assert headings[:5] == [title, "## Study", "## Honesty flags", "## Question", "## Verdict"]
    start = headings.index("## Variants")
    entropy, margin = "#### attention_entropy (per head)", "#### tropical margin gamma (per head)"
    every, runs = "#### Every measure (per layer and head)", "#### Runs"
    assert headings[start:] == [
        "## Variants", "### standard", entropy, every, runs, "### standard_flex", entropy, every, runs,
        "### tropical", margin, every, runs, "## Costs", "## Parameters and FLOPs",
        "## Appendix: configurations", "## Environment", "## Command",
    ]  # fmt: skip


def test_lines_of_a_variant(suite: str) -> None:
    block = suite.split("### standard_flex\n")[1].split("####")[0]
    assert "- label: `standard (FlexAttention)`\n" in block
    assert "- attention_type: `flex`\n" in block
    assert "- expected_use_flex_attention: `True`\n" in block
    assert re.search(r"^- final_loss: mean=`\d\.\d+` std=`\d\.\d+` ci95=`\d\.\d+` n=`3`$", block, re.M)


def test_tables_of_the_per_head_metrics_study(suite: str) -> None:
    assert "| head | entropy_mean | std | ci95 |\n| --- | --- | --- | --- |\n| 0 | " in suite
    assert "| head | gamma_mean | std | ci95 |\n" in suite
    assert "| seed | status | final_loss | summary |\n" in suite
    row = r"^\| 0 \| finished \| \d\.\d{6} \| .*pv0_smoke/standard/seed_0/summary\.json \|$"
    assert re.search(row, suite, re.M)
    assert re.search(r"^\| 0 \| \d\.\d{6} \| \d\.\d{6} \| \d\.\d{6} \|$", suite, re.M)


def test_ends_with_the_command(suite: str) -> None:
    assert suite.endswith("## Command\n\n```bash\nheadwise per-head-metrics --target-flops 2e8\n```\n")


def test_one_seed_has_no_interval(tmp_path: Path, make) -> None:
    folder = make.study(tmp_path, {"flash": make.Variant("flash")}, seeds=(0,), shape=make.SMALL)
    text = markdown.render(collect(Study.read(folder)), {})
    assert "std=`n/a` ci95=`n/a` n=`1`" in text
    assert "n = 1, so there is no interval" in text
    assert "±" not in re.sub(r"Mean ±.*", "", text)


def test_a_reason_cannot_break_a_table(tmp_path: Path, make) -> None:
    broken = make.Variant("flash", states={0: ("failed", "a | b\nc")})
    folder = make.study(tmp_path, {"flash": broken}, seeds=(0,), shape=make.SMALL)
    assert "| 0 | failed (a \\| b c) | n/a |" in markdown.render(collect(Study.read(folder)), {})


@pytest.mark.parametrize(
    ("budget", "line"),
    [({"kind": "steps", "value": 1500}, "- Steps/run: `1,500`"),
     ({"kind": "tokens", "value": 2e6}, "- Tokens/run: `2,000,000`")],
)  # fmt: skip
def test_budgets(tmp_path: Path, make, budget: dict, line: str) -> None:
    folder = make.study(tmp_path, {"flash": make.Variant("flash")}, (0,), make.SMALL, budget=budget)
    assert line in markdown.render(collect(Study.read(folder)), {})
