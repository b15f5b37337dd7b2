"""The picture of a budget: panels by how keys are chosen, differences to the baseline where there is one."""

from __future__ import annotations

from typing import Any

import pytest

from headwise.questions.budget.page import figure, panels, shown


def point(budget: float, difference: float | None, ci95: float | None = 0.01) -> dict[str, Any]:
    found = {"mean": difference, "ci95": ci95}
    return {"budget": budget, "keys": 8, "mean": 2.0, "ci95": 0.5, "difference": found}


def curve(variant: str, method: str, *points: dict[str, Any]) -> dict[str, Any]:
    return {"name": variant, "variant": variant, "method": method, "points": list(points), "parity": None}


def data(*series: dict[str, Any], baseline: bool = True) -> dict[str, Any]:
    return {"series": list(series), "baseline": {"name": "flash", "mean": 2.0} if baseline else None}


FLASH = curve("flash", "window", point(1.0, 0.0, None), point(0.5, 0.02))
KEPT = curve("selective", "kept", point(1.0, -0.05), point(0.5, 1.7))


def test_windows_are_beside_every_way_to_choose_keys() -> None:
    found = panels(data(FLASH, KEPT, curve("selective", "per layer", point(0.5, -0.04))))
    assert {title: [one["method"] for one in series] for title, series in found.items()} == {
        "one budget for all layers": ["window", "kept"],
        "a budget for each layer": ["window", "per layer"],
    }
    assert panels(data(FLASH)) == {"a window": [FLASH]}


def test_a_curve_far_above_the_baseline_does_not_decide_the_range() -> None:
    low, high = shown(data(FLASH, KEPT)) or (0, 0)
    assert low == pytest.approx(-0.06 - 0.06 * 0.36)
    assert high == pytest.approx(0.3 + 0.06 * 0.36)  # 15% of the baseline's loss
    assert shown(data(FLASH, KEPT, baseline=False)) is None


def test_a_point_without_a_common_seed_is_left_out() -> None:
    drawn = figure(data(FLASH, curve("selective", "kept", point(1.0, -0.05), point(0.5, None))))
    (axis,) = drawn.axes
    lengths = [len(container.lines[0].get_xdata()) for container in axis.containers]
    assert lengths == [2, 1]
