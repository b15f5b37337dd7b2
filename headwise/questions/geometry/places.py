"""Where attention is in a checkpoint: its tensors grouped by the module and the layer they belong to.

A place is one attention module. Names tell where it is, and which tensor has which role (q, k, v, o, or a
fused projection of several); what it computes is told by the architecture (`architecture.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

ATTENTION = re.compile(r"(?i)att(n|ention)?s?(_.*|\d*)$")
NORM = re.compile(r"(?i)norm|^ln(_|\d|$)")
CROSS = re.compile(r"(?i)cross|encoder_att|encdec|encoder_decoder|multihead_attn")

SEPARATE = {
    "q": ("q_proj", "query", "query_proj", "q_lin", "wq", "Wq", "q", "linear_q", "project_q", "to_q"),
    "k": ("k_proj", "key", "key_proj", "k_lin", "wk", "Wk", "k", "linear_k", "project_k", "to_k"),
    "v": ("v_proj", "value", "value_proj", "v_lin", "wv", "Wv", "v", "linear_v", "project_v", "to_v"),
}
OUTPUT = (
    "o_proj", "out_proj", "out_lin", "dense", "c_proj", "Wo", "wo", "o", "proj", "projection", "output_proj",
    "projection_layer", "linear_out", "attention_out", "to_out", "output_projection",
)  # fmt: skip
FUSED = (
    "qkv_proj", "Wqkv", "in_proj_weight", "qkv", "c_attn", "query_key_value", "att_proj", "in_proj", "wqkv",
    "W_pack", "to_kv", "kv_proj", "query_key", "queries_keys_values",
)  # fmt: skip
"""Projections of several roles at once; `layouts.py` knows how some are laid out."""
KNOWN = frozenset(FUSED) | {name for names in SEPARATE.values() for name in names}


@dataclass
class Place:
    """One attention module of a checkpoint.

    Attributes:
        root: its path, such as `model.layers.0.self_attn`.
        tensors: path below the root to the tensor's name.
        stack, layer: where it is numbered; layer None where it is not.
    """

    root: str
    tensors: dict[str, str] = field(default_factory=dict)
    stack: str = ""
    layer: int | None = None

    @property
    def roles(self) -> dict[str, str]:
        """Role (q, k, v, o, or the name of a fused projection) to tensor."""
        roles: dict[str, str] = {}
        for path, name in self.tensors.items():
            if projection := projection_of(path):
                if projection in FUSED:
                    roles[projection] = name
                elif projection in OUTPUT:
                    roles["o"] = name
                for role, names in SEPARATE.items():
                    if projection in names:
                        roles[role] = name
        return roles

    @property
    def prefix(self) -> str:
        """The path of its layer."""
        return f"{self.stack}.{self.layer}" if self.layer is not None else self.root.rpartition(".")[0]


def projection_of(path: str) -> str:
    """The name of the projection whose weight lies at `path`; empty for anything else."""
    module, _, leaf = path.rpartition(".")
    if leaf in FUSED:
        return leaf
    return module.rpartition(".")[2] if leaf == "weight" else ""


def find_places(names: Iterable[str]) -> list[Place]:
    """Every attention module among tensors of these names, in the order of their layers."""
    places: dict[str, Place] = {}
    loose: dict[str, Place] = {}
    for name in names:
        root = _root(name.split("."))
        if root is not None:
            places.setdefault(root, Place(root)).tensors[name.removeprefix(f"{root}.")] = name
        elif projection_of(name) in KNOWN:
            parent = name.rpartition(".")[0].rpartition(".")[0]
            loose.setdefault(parent, Place(parent))
    for name in names:  # attention in a module of another name, such as Nemotron-H's mixer
        parent = name.rpartition(".")[0].rpartition(".")[0]
        if parent in loose and parent not in places:
            loose[parent].tensors[name.removeprefix(f"{parent}.")] = name
    places |= {root: p for root, p in loose.items() if {"q", "k"} <= p.roles.keys() or _is_fused(p.roles)}
    found = list(places.values())
    _number(found)
    first = {stack: at for at, stack in reversed(list(enumerate(place.stack for place in found)))}
    return sorted(found, key=lambda p: (first[p.stack], -1 if p.layer is None else p.layer))


def _is_fused(roles: dict[str, str]) -> bool:
    return bool({"qkv_proj", "Wqkv", "qkv", "query_key_value", "wqkv"} & roles.keys()) and "o" in roles


def _root(parts: list[str]) -> str | None:
    """The path to the last attention module in a tensor's path, to the first of several in a row."""
    modules = parts[:-1]
    at = next((i for i in range(len(modules) - 1, -1, -1) if _is_attention(modules[i])), None)
    if at is None:
        return None
    while at > 0 and _is_attention(modules[at - 1]):
        at -= 1
    end = at + 1
    if end < len(modules) and modules[end].isdecimal():  # a list of attention modules
        end += 1
    return ".".join(modules[:end])


def _is_attention(part: str) -> bool:
    return bool(ATTENTION.search(part)) and not NORM.search(part)


def _number(places: list[Place]) -> None:
    """Give every place its stack and layer: the innermost number that differs between alike modules."""
    alike: dict[str, list[Place]] = {}
    for place in places:
        pattern = ".".join("#" if part.isdecimal() else part for part in place.root.split("."))
        alike.setdefault(pattern, []).append(place)
    for pattern, group in alike.items():
        at = [i for i, part in enumerate(pattern.split(".")) if part == "#"]
        if not at:
            continue
        rows = [place.root.split(".") for place in group]
        chosen = next((i for i in reversed(at) if len({row[i] for row in rows}) > 1), at[0])
        for place, row in zip(group, rows, strict=True):
            place.stack, place.layer = ".".join(row[:chosen]), int(row[chosen])
