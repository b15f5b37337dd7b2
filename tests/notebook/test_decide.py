"""A comparison takes only runs of the commands that the document has, at one revision of the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from headwise.files import write_json
from headwise.notebook.decide import decided, floors
from headwise.notebook.document import parse
from headwise.notebook.memory import Memory, PastBlock
from headwise.notebook.naming import commands_sum, named
from headwise.runs.folder import RunFolder

TEXT = "".join(f"```headwise {name}\nheadwise train --x {name}\n```\n" for name in "abc") + (
    "# One\nCompare: a vs b, val_loss, lower\n# Two\nCompare: c vs b, val_loss, lower\n"
    "Compare: a vs c, val_loss, lower\n"
)
SEEDS = range(4)


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    """Three blocks whose runs have ended."""
    blocks = {}
    for name, fence in named(parse(TEXT)).items():
        for seed in SEEDS:
            folder = RunFolder(tmp_path / name / f"seed_{seed}")
            folder.path.mkdir(parents=True)
            folder.write_status("finished")
            write_json(folder.summary, {"val_loss": ord(name) + seed * 0.0123456789})
        past: PastBlock = {
            "id": "a" * 8, "code": "one", "data": "", "commands": commands_sum(fence), "configuration": "",
            "runs": [{"path": f"{name}/seed_{seed}", "id": "a" * 8, "group": name, "seed": seed}
                     for seed in SEEDS],
            "verbs": [], "study": None,
        }  # fmt: skip
        blocks[name] = past
    return Memory(tmp_path / "nb.headwise.json", blocks)


def waits(memory: Memory, text: str = TEXT) -> list[str]:
    document = parse(text)
    return [one.waits for one in decided(document, memory, named(document))]


def test_runs_of_earlier_commands_are_in_no_comparison(memory: Memory) -> None:
    assert waits(memory) == ["", "", ""]
    changed = "waits for a: its commands changed since it was run"
    assert waits(memory, TEXT.replace("--x a", "--x other")) == [changed, "", changed]


def test_revisions_of_the_code_are_not_mixed(memory: Memory) -> None:
    memory.blocks["a"]["code"] = "two"
    first, second, third = waits(memory)
    assert first == "a and b ran at different revisions of the code; run both blocks"
    assert (second, bool(third)) == ("", True)


def test_the_noise_floor_is_corrected_as_its_comparisons_are(memory: Memory) -> None:
    document = parse(TEXT)
    both = floors(document, memory, named(document))
    alone = parse(TEXT.replace("Compare: c vs b, val_loss, lower\n", ""))
    (mine,) = (one for name, _, one in both if name == "b")
    (other,) = (one for name, _, one in floors(alone, memory, named(alone)) if name == "b")
    assert mine.detectable[0].difference > other.detectable[0].difference


def test_a_comparison_that_is_removed_after_a_decision_still_counts(memory: Memory) -> None:
    def confidence(text: str) -> tuple[float, int]:
        document = parse(text)
        first = decided(document, memory, named(document))[0]
        assert first.decision is not None
        return first.decision.confidence, first.removed

    two = TEXT.replace("# Two\n", "")
    one = two.replace("Compare: c vs b, val_loss, lower\n", "")
    memory.compares["c vs b, val_loss, lower"] = {"seen": "", "exploratory": False, "looks": []}
    alone, _ = confidence(one)
    memory.compares["c vs b, val_loss, lower"]["looks"].append({"n": 4, "at": ""})
    assert confidence(one)[1] == 1
    assert confidence(one)[0] > alone
    assert confidence(two)[1] == 0
