"""The contract suite on every kind of this package, and on kinds that declare little."""

from __future__ import annotations

import pytest

from headwise.attention import KINDS
from headwise.attention.base import FEATURES
from headwise.attention.mha import VanillaAttention
from headwise.testing.contract import *  # noqa: F403
from headwise.testing.contract import test_takes_what_it_declares_and_refuses_the_rest as takes_and_refuses
from headwise.testing.modifiers import *  # noqa: F403


@pytest.mark.parametrize("supports", [{"causal"}, {"full"}, {"full", "padding"}, {"causal", "additive_mask"}])
@pytest.mark.parametrize("feature", FEATURES)
def test_whatever_a_kind_does_not_declare_is_refused(
    supports: set[str], feature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Bare(VanillaAttention):
        """Could do everything and declares little."""

    Bare.supports, Bare.kind = frozenset(supports), "bare"
    monkeypatch.setitem(KINDS, "bare", Bare)
    takes_and_refuses("bare", feature)
