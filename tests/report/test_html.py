"""`report.html` holds the numbers, needs no network, and shows the flags first."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from headwise import report
from headwise.report import maps
from headwise.runs.read import Run

TEMPLATES = Path(report.__file__).parent / "templates"


class Page(HTMLParser):
    """Ids in order, attributes that fetch, scripts by id, and the text outside scripts and styles."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.scripts: list[tuple[str | None, str]] = []
        self.styles = ""
        self.text = ""
        self.policy = ""
        self._inside: tuple[str, str | None] = ("", None)
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self._inside = (tag, found.get("id"))
        if tag == "script":
            self.scripts.append((found.get("id"), ""))
        if found.get("id"):
            self.ids.append(str(found["id"]))
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = str(found["content"])
        self.links += [str(v) for k, v in attrs if k in ("src", "href", "action", "data", "poster")]

    def handle_endtag(self, tag: str) -> None:
        self._inside = ("", None)

    def handle_data(self, data: str) -> None:
        tag, name = self._inside
        if tag == "script":
            self.scripts[-1] = (name, self.scripts[-1][1] + data)
        elif tag == "style":
            self.styles += data
        else:
            self.text += data


@pytest.fixture(scope="module")
def page(built: dict[str, Path]) -> Page:
    return Page(built["html"].read_text())


def test_embeds_the_numbers_of_report_json(page: Page, built: dict[str, Path]) -> None:
    embedded = json.loads(dict(page.scripts)["report-data"])
    assert embedded == json.loads(built["json"].read_text())


def test_fetches_nothing(page: Page) -> None:
    inside = [link for link in page.links if not link.startswith("#")]
    assert all("seed_" in link and ":" not in link and not link.startswith("/") for link in inside)
    assert "url(" not in page.styles
    assert "@import" not in page.styles
    assert page.policy.startswith("default-src 'none'")
    own = [text for name, text in page.scripts if name is None][-1]
    assert "http" not in own.replace("http://www.w3.org/2000/svg", "")


def test_plotly_is_inside_once(page: Page) -> None:
    assert sum("plotly.js v" in text[:200] for _, text in page.scripts) == 1


def test_the_conclusion_with_its_doubts_comes_first_and_flags_before_the_rest(page: Page) -> None:
    order = ["conclusion", "flags", "verdict", "curves", "comparison", "atlas"]
    assert [name for name in page.ids if name in order] == order
    text = " ".join(page.text.split())
    assert text.index("loss was not finite at step 61") < text.index("INCONCLUSIVE")


def test_every_section_of_the_demo_is_there(page: Page) -> None:
    for name in ("maps", "costs", "parts", "heads", "runs", "environment", "theme", "atlas-step"):
        assert name in page.ids
    assert len(page.ids) == len(set(page.ids))


def test_scripts_ask_only_for_elements_that_exist(page: Page, built: dict[str, Path]) -> None:
    asked = set(re.findall(r'(?:byId|box|segments)\("([\w-]+)"', built["html"].read_text()))
    assert asked <= set(page.ids)


def test_numbers_in_the_tables_are_those_of_the_data(page: Page, built: dict[str, Path]) -> None:
    data = json.loads(built["json"].read_text())
    for variant in data["variants"]:
        if variant["n"]:
            loss = variant["results"]["val_loss"]
            assert f"{loss['mean']:.4f} ± {loss['ci95']:.4f}" in page.text


def test_text_from_a_run_cannot_become_markup(tmp_path: Path, make) -> None:
    evil = "</script><script>alert(1)</script>"
    broken = make.Variant("flash", label=evil, states={0: ("failed", evil)})
    folder = make.study(tmp_path, {"flash": broken}, seeds=(0,), shape=make.SMALL, title=evil)
    page = Page(report.build(folder)["html"].read_text())
    assert len(page.scripts) == 4
    assert evil in page.text
    assert json.loads(dict(page.scripts)["report-data"])["title"] == evil


def test_the_first_screen_has_labels_and_its_cells_say_what_they_are(tmp_path: Path, make) -> None:
    """A narrow screen shows the conclusions cell below cell, without the table's head."""
    variants = {"flash": make.Variant("flash", label="plain"), "tt": make.Variant("tt", label="tensor train")}
    folder = make.study(tmp_path, variants, seeds=(0, 1), shape=make.SMALL)
    source = report.build(folder)["html"].read_text()
    first = source[source.index('<div id="conclusion">') : source.index('<section id="flags"')]
    assert "tensor train <small>tt</small>" in first
    cells = first.count("<td")
    assert cells == first.count("data-of=") == 5
    assert 'data-of="against plain"' in first
    assert "<dt>Baseline</dt><dd>plain</dd>" in first
    assert ".conclusions thead { display: none; }" in source


@pytest.mark.skipif(shutil.which("node") is None, reason="no node to parse JavaScript with")
def test_scripts_parse(tmp_path: Path) -> None:
    names = ("core.js", "curves.js", "atlas.js", "maps.js")
    whole = tmp_path / "whole.js"
    whole.write_text("\n".join((TEMPLATES / name).read_text() for name in names))
    subprocess.run(["node", "--check", whole], check=True, timeout=60)


def test_maps_survive_packing(demo: Path, page: Page) -> None:
    run = Run(demo / "flash" / "seed_0")
    with np.load(run.maps(), allow_pickle=False) as stored:
        weights = stored["weights_1"].astype(np.float32)
    packed = json.loads(dict(page.scripts)["report-maps"])["flash"]
    prompt = packed["prompts"][1]
    found = np.frombuffer(base64.b64decode(prompt["data"]), np.uint8).reshape(prompt["shape"])
    assert np.abs((found / 255.0) ** 2 - weights).max() < 0.005
    assert (packed["seed"], packed["step"], len(prompt["tokens"])) == (0, 200, 24)


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (np.frombuffer(b"a b", np.uint8), ["a", "␣", "b"]),
        (np.array(["ab", "\n", "ç"]), ["ab", "⏎", "ç"]),
        (np.array("abc"), ["a", "b", "c"]),
        (np.array([b"x", b"\x00", b"z"]), ["x", "", "z"]),
        (np.array([5, 17, 3]), ["5", "17", "3"]),
        (None, ["0", "1", "2"]),
        (np.array(["short"] * 2), ["short", "short", ""]),
    ],
)
def test_tokens_in_any_form(raw: np.ndarray | None, expected: list[str]) -> None:
    assert maps.tokens(raw, 3) == expected


def test_maps_that_are_too_many_are_left_out(monkeypatch: pytest.MonkeyPatch, demo: Path) -> None:
    run = Run(demo / "flash" / "seed_0")
    prompts = maps.read(run)
    monkeypatch.setattr(maps, "MAX_BYTES", prompts[0][1].size)
    assert len(maps.pack({"flash": (run, prompts)})["flash"]["prompts"]) == 1
