"""Runs side by side share out the GPUs that they may see."""

from __future__ import annotations

import pytest

from headwise.study.local import visible_gpus


@pytest.mark.parametrize(("visible", "found"), [("3,5", ["3", "5"]), ("", []), ("GPU-1", ["GPU-1"])])
def test_only_visible_gpus_are_shared_out(
    visible: str, found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus() == found
