"""Trackers: TensorBoard's event files hold the numbers; a package that is missing names the extra."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from headwise.errors import HeadwiseError
from headwise.training.trackers import open_trackers


def test_tensorboard_holds_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tracker,) = open_trackers(["tensorboard"], tmp_path, {})
    tracker.log(3, {"train/loss": 0.5, "val/loss": 0.25})
    tracker.log(4, {"train/loss": 0.125})
    tracker.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(3, 0.5), (4, 0.125)]
    assert [(e.step, e.value) for e in events.Scalars("val/loss")] == [(3, 0.25)]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(HeadwiseError, match=rf"tracker '{name}' needs .* pip install 'headwise\[trackers\]'"):
        open_trackers([name], tmp_path, {})
    assert list(tmp_path.iterdir()) == []
