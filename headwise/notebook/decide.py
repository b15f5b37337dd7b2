"""The decision on each `Compare:` line of a notebook, and its record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from headwise.analysis.claims import Claim, Decision, NoiseFloor, Value, decide, noise_floor
from headwise.analysis.conclusion import signed
from headwise.notebook.document import Compare, Document, Fence, claim
from headwise.notebook.edit import Board
from headwise.notebook.memory import Memory, now
from headwise.notebook.naming import commands_sum
from headwise.notebook.results import Group, escaped, groups_of, label, value_of
from headwise.runs.folder import RESULTS


@dataclass(frozen=True)
class Decided:
    """A `Compare:` line with its decision, or, while its runs have not ended, the reason in `waits`.

    Attributes:
        removed: comparisons with the same second group that were decided and are no longer in the notebook.
            They count in the correction.
    """

    compare: Compare
    decision: Decision | None
    exploratory: bool
    looks: int
    waits: str = ""
    removed: int = 0

    @property
    def word(self) -> str:
        """The decision in one or two words; `pending` while there is none."""
        return self.decision.decision if self.decision else "pending"


def first_seen(document: Document, memory: Memory, ended: Collection[str]) -> None:
    """Record the comparisons that are new.

    Args:
        ended: the groups in which a run has ended. A new comparison of two such groups is exploratory.
    """
    for compare in document.compares:
        late = compare.a in ended and compare.b in ended
        memory.compares.setdefault(compare.text, {"seen": now(), "exploratory": late, "looks": []})


def decided(document: Document, memory: Memory, blocks: Mapping[str, Fence]) -> list[Decided]:
    """Every comparison, decided with the others of its section.

    Args:
        blocks: the notebook's blocks by name.
    """
    groups = groups_by_name(memory, blocks)
    values = {
        (name, compare.measure): values_of(groups[name], compare.measure)
        for compare in document.compares
        for name in (compare.a, compare.b)
        if name in groups
    }
    found = {}
    for section in dict.fromkeys(compare.section for compare in document.compares):
        mine = [compare for compare in document.compares if compare.section == section]
        earlier = [
            past
            for past in _removed(document, memory)
            if any((past.b, past.measure) == (compare.b, compare.measure) for compare in mine)
        ]
        claims = [claim_of(compare, memory) for compare in [*mine, *earlier]]
        for compare, stated, decision in zip(mine, claims, decide(claims, values), strict=False):
            waits = _waits(compare, groups, memory, blocks)
            looks = len(memory.compares.get(compare.text, {"looks": []})["looks"])
            found[compare] = Decided(
                compare, None if waits else decision, stated.exploratory, looks, waits, len(earlier)
            )  # fmt: skip
    return [found[compare] for compare in document.compares]


def _removed(document: Document, memory: Memory) -> list[Compare]:
    """The comparisons that were decided and are no longer in the document."""
    present = {compare.text for compare in document.compares}
    gone = [text for text, past in memory.compares.items() if past["looks"] and text not in present]
    return [claim(0, text, "") for text in gone]


def groups_by_name(memory: Memory, blocks: Mapping[str, Fence]) -> dict[str, Group]:
    """The groups of a notebook's blocks, of those whose commands are the ones that were run."""
    found = {}
    for name, fence in blocks.items():
        past = memory.blocks.get(name)
        if past and past["commands"] == commands_sum(fence):
            found.update({group.name: group for group in groups_of(past, memory.path.parent)})
    return found


def claim_of(compare: Compare, memory: Memory) -> Claim:
    """The claim of a line; a line without a record is exploratory if the notebook has recorded runs."""
    past = memory.compares.get(compare.text)
    exploratory = past["exploratory"] if past else bool(memory.blocks)
    smallest = compare.smallest or 0.0
    return Claim(compare.a, compare.b, compare.measure, compare.direction, smallest, exploratory)


def values_of(group: Group, measure: str) -> list[Value]:
    """A value for each run."""
    found = []
    for seed, run in zip(group.seeds, group.runs, strict=True):
        value = value_of(run, measure)
        why = "" if value is not None else run.state if run.state != "finished" else f"no {measure}"
        found.append(Value(seed, value, why, "", str(run.get("data_checksum") or "")))
    return found


def floors(
    document: Document, memory: Memory, blocks: Mapping[str, Fence]
) -> list[tuple[str, str, NoiseFloor]]:
    """The noise floor of every second group of a comparison: its name, the measure, the floor.

    The detectable difference is corrected for the comparisons of the section, of the largest one of several.
    """
    groups = groups_by_name(memory, blocks)
    sizes = Counter(compare.section for compare in document.compares)
    pairs: dict[tuple[str, str], int] = {}
    for compare in document.compares:
        key = (compare.b, compare.measure)
        pairs[key] = max(pairs.get(key, 1), sizes[compare.section])
    return [
        (name, measure, noise_floor(values_of(groups[name], measure), name, comparisons=size))
        for (name, measure), size in pairs.items()
        if name in groups
    ]


def write(
    document: Document, memory: Memory, blocks: Mapping[str, Fence], board: Board, say: Callable[[str], None]
) -> None:
    """Write the decisions on comparisons whose runs have ended, and record each look at a larger n."""
    floor = {(name, measure): found for name, measure, found in floors(document, memory, blocks)}
    for one in decided(document, memory, blocks):
        if one.decision is None:
            say(f"{one.compare.text}: {one.waits}")
            continue
        looks = memory.compares[one.compare.text]["looks"]
        n = one.decision.difference.n
        if not looks or looks[-1]["n"] != n:
            looks.append({"n": n, "at": now()})
        compare, kind = one.compare, " (exploratory)" * one.exploratory
        say(f"{compare.text}: {one.decision.decision}{kind}: {one.decision.why}")
        board.mark(compare.mark, text(one, floor.get((compare.b, compare.measure)), len(looks)))


def text(one: Decided, floor: NoiseFloor | None, looks: int) -> str:
    """A decision as Markdown."""
    return "\n".join(
        f"- {line}" for line in [f"**{one.word}**{_kind(one)}", *map(escaped, facts(one, floor, looks))]
    )


def _kind(one: Decided) -> str:
    return " (exploratory: stated after its runs ended)" if one.exploratory else " (planned)"


def facts(one: Decided, floor: NoiseFloor | None, looks: int) -> list[str]:
    """The lines of a decision: the reason, the difference with its interval, the noise floor, the looks."""
    decision, compare = one.decision, one.compare
    if decision is None:
        return [one.waits]
    found = [decision.why]
    difference = decision.difference
    if difference.mean is not None:
        interval = "no interval"
        if difference.low is not None and difference.high is not None:
            interval = (
                f"{decision.confidence:.4g} interval {signed(difference.low)} to {signed(difference.high)}"
            )
            interval = interval.replace(f"{decision.confidence:.4g}", f"{decision.confidence:.1%}", 1)
        p = "" if decision.p is None else f", p = {decision.p:.2g}"
        found.append(
            f"{compare.a} − {compare.b}, {label(compare.measure)}: {signed(difference.mean)}, {interval}{p}, "
            f"n = {difference.n} pairs of seeds"
        )
    if floor is not None:
        found.append(f"noise floor: {floor.text}")
    found += decision.notes
    if one.removed:
        found.append(
            f"removed from the notebook after a decision, and still counted in the correction: {one.removed}"
        )
    if looks > 1:
        found.append(f"decided {looks} times, each time with more seeds; the interval allows for this")
    return found


def _waits(compare: Compare, groups: dict[str, Group], memory: Memory, blocks: Mapping[str, Fence]) -> str:
    codes = {}
    for name in (compare.a, compare.b):
        block = name if name in blocks else name.partition("/")[0]
        past = memory.blocks.get(block)
        if past and block in blocks and past["commands"] != commands_sum(blocks[block]):
            return f"waits for {name}: its commands changed since it was run"
        if name not in groups or past is None:
            return f"{name} has not run yet"
        codes[name] = past["code"]
        ended = sum(run.state in (*RESULTS, "failed", "skipped") for run in groups[name].runs)
        if ended < len(groups[name].runs):
            return f"{ended} of {len(groups[name].runs)} runs of {name} have ended"
    if len(set(codes.values())) > 1:
        return f"{compare.a} and {compare.b} ran at different revisions of the code; run both blocks"
    return ""
