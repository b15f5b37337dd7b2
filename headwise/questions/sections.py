"""What questions and kinds of attention add to the report of a study."""

from __future__ import annotations

from headwise.attention import KINDS
from headwise.attention.kinds import resolve
from headwise.questions.entropy.section import ENTROPIES
from headwise.questions.prune.section import PRUNING
from headwise.questions.surgery.section import SURGERY
from headwise.report.scaling import SCALING
from headwise.report.searches import SEARCHES
from headwise.report.section import Section


def sections() -> list[Section]:
    """Those of every registered kind, then those of questions; each shows itself where runs have its data."""
    places = dict.fromkeys(place for kind in KINDS.values() for place in kind.sections)
    return [*(resolve(place) for place in places), SEARCHES, SCALING, ENTROPIES, SURGERY, PRUNING]
