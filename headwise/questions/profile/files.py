"""What the JSON files of a profile hold, as types that a reader holds them against."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired, TypedDict

from msgspec import Meta

Count = Annotated[int, Meta(ge=0, le=2**62)]


class DataOfProfile(TypedDict, total=False):
    """`data` of `profile.json`: the identity of what was read."""

    name: str | None
    path: str | None
    checksum: str | None


class ProfileFile(TypedDict):
    """`profile.json`: what is profiled, and how. Its other keys are compared whole."""

    model: str
    weights: str
    data: DataOfProfile
    scores: Literal["pre_rope", "post_rope"]
    context_length: Count
    seed: int | None
    aggregate: bool


class SummaryFile(TypedDict):
    """`summary.json`, written when a profile is finished."""

    samples: Count
    tokens: Count
    heads: Count
    layers_with_nan: list[Count]
    unmeasured: NotRequired[dict[str, str]]
