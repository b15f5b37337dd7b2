"""What Hugging Face's libraries say while they fail."""

from __future__ import annotations

import pytest

from headwise.data.hub import load_dataset
from headwise.errors import HeadwiseError


def test_attempts_to_reach_the_hub_are_not_told_one_by_one(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import datasets
    from huggingface_hub.utils import logging

    def unreachable(path: str) -> None:
        logging.get_logger("huggingface_hub.utils._http").warning("Retrying in 8s [Retry 5/5].")
        raise ConnectionError("no hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    before = logging.get_verbosity()
    with pytest.raises(HeadwiseError, match=r"'some/data' cannot be loaded \(no hub\); give a file$"):
        load_dataset("some/data", "give a file")
    assert "Retrying" not in capfd.readouterr().err
    assert logging.get_verbosity() == before
