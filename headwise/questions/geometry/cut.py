"""One attention module's projections, cut into heads.

How many heads there are is told by the module or the configuration of its tower; where heads were pruned, by
the width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.questions.geometry.architecture import HEAD_COUNTS, WIDTHS, Architecture
from headwise.questions.geometry.layouts import layout_of, split
from headwise.questions.geometry.places import FUSED, Place
from headwise.watch.tensors import Tensors

Array = NDArray[np.float32]


@dataclass(frozen=True)
class LayerWeights:
    """One layer in float32: q `(H, D, d_in)`, k `(K, D, d_in)`, v `(K, V, d_in)`, o `(H, d_out, V)`.

    d_in and d_out are the widths of the streams it reads and writes, d_model in most models; V is D in most.
    """

    q: Array
    k: Array
    v: Array
    o: Array


def fused_role(roles: dict[str, str]) -> str | None:
    """The projection of several roles that a place has instead of separate ones."""
    return None if {"q", "k", "v"} <= roles.keys() else next((role for role in roles if role in FUSED), None)


def cut(place: Place, source: Place | None, tensors: Tensors, architecture: Architecture) -> LayerWeights:
    """Projections of one place, cut into heads; keys and values are those of `source` where it has some."""
    roles = place.roles

    def get(role: str, of: Place = place) -> Tensor:
        name = of.roles[role]
        tensor = _matrix(_floating(tensors.get(name), name, tensors.name), name, tensors.name)
        return tensor.T if _keeps_inputs_first(tensor, name, role, of, architecture) else tensor

    output, fused = get("o"), fused_role(roles)
    if fused is not None:
        weight = get(fused)
        heads, width = _heads(place, output.shape[1], weight.shape[1], fused, architecture)
        layout = layout_of(fused, architecture.family(place), architecture.settings(place))
        assert layout is not None  # or the place is not covered
        q, k, v = split(weight, heads, width, layout, place.root)
    else:
        q = get("q")
        other = source or place
        k = get("k", other)
        v = get("v", other) if "v" in other.roles else k
        heads, width = _heads(place, _rows(place, q, output, architecture), q.shape[1], "q", architecture)
        if q.shape[0] == 2 * heads * width:  # as in Qwen3-Next
            q = q.reshape(heads, 2, width, -1)[:, 0].flatten(0, 1)  # a gate follows each head's query
    kv_heads = k.shape[0] // width
    if (
        q.shape[0] != heads * width
        or k.shape[0] % width
        or heads % max(kv_heads, 1)
        or v.shape[0] % max(kv_heads, 1)
        or output.shape[1] * kv_heads != heads * v.shape[0]
    ):
        shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in (("q", q), ("k", k), ("v", v)))
        raise HeadwiseError(f"{place.root}: projections {shapes} do not divide into {heads} heads of {width}")
    if q.shape[1] != k.shape[1]:
        raise HeadwiseError(
            f"{place.root}: its queries read a width of {q.shape[1]} and its keys one of {k.shape[1]}, so "
            "they do not read one stream; choose another --stack"
        )
    q, k = (t.reshape(-1, width, t.shape[-1]) for t in (q, k))
    v = v.reshape(kv_heads, -1, v.shape[-1])
    o = output.reshape(output.shape[0], heads, -1).transpose(0, 1)
    return LayerWeights(*(np.ascontiguousarray(t.float().cpu().numpy()) for t in (q, k, v, o)))


def _rows(place: Place, q: Tensor, output: Tensor, architecture: Architecture) -> int:
    """Rows of the queries alone: half of the projection where a gate as wide lies beside them."""
    heads, width = architecture.heads(place), architecture.width(place)
    narrower_values = bool(heads and width) and q.shape[0] == (heads or 0) * (width or 0)
    return output.shape[1] if q.shape[0] == 2 * output.shape[1] and not narrower_values else q.shape[0]


def _heads(place: Place, rows: int, inputs: int, role: str, architecture: Architecture) -> tuple[int, int]:
    """Number and width of the query heads that `rows` hold.

    The count of module or configuration holds, unless heads were pruned: then their width tells.

    Raises:
        HeadwiseError: the count is not known, or does not divide the rows.
    """
    heads, width = architecture.heads(place), architecture.width(place)
    name, tensors = place.roles[role], architecture.tensors
    as_built = architecture.shape_of(place, name) == tuple(tensors.get(name).shape)
    own = None if architecture.attribute(place, HEAD_COUNTS) else architecture.attribute(place, WIDTHS)
    if as_built and own and rows % own == 0:  # a layer's own width is nearer than its tower's count
        return rows // own, own
    pruned = tensors.module is not None or not as_built
    told = pruned and bool(width) and rows % (width or 1) == 0 and architecture.states_input(place, inputs)
    if told and width and (heads is None or rows // width < heads):
        return rows // width, width
    if heads is None or not (as_built or architecture.stated_heads(place)):
        raise HeadwiseError(
            f"{tensors.name}: its config.json does not say how many heads it has "
            f"({', '.join(HEAD_COUNTS[:5])})"
        )
    return heads, _even(rows, heads, place.root, "output projection")


def _keeps_inputs_first(
    tensor: Tensor, name: str, role: str, place: Place, architecture: Architecture
) -> bool:
    """Whether a weight is `(in, out)`, as in GPT-2's Conv1D, not `(out, in)`."""
    module = architecture.module_at(place, name)
    if module is not None:
        return type(module).__name__ == "Conv1D"
    fused = fused_role(place.roles)
    if fused is None:
        return False
    shape = tensor.shape if role == fused else architecture.tensors.get(place.roles[fused]).shape
    return shape[0] < shape[1]


def _matrix(tensor: Tensor, name: str, source: str) -> Tensor:
    """A projection as a matrix; a convolution of kernel 1 is one."""
    matrix = tensor.flatten(1) if tensor.ndim > 2 and set(tensor.shape[2:]) == {1} else tensor
    if matrix.ndim != 2:
        raise HeadwiseError(f"{source}: {name} has shape {tuple(tensor.shape)}; a projection is a matrix")
    return matrix


def _floating(tensor: Tensor, name: str, source: str) -> Tensor:
    if not tensor.dtype.is_floating_point or tensor.dtype.itemsize < 2:
        raise HeadwiseError(
            f"{source}: {name} is quantised ({str(tensor.dtype).removeprefix('torch.')}); "
            "use the checkpoint it was made from"
        )
    return tensor.detach()


def _even(size: int, heads: int, where: str, what: str) -> int:
    if size % heads:
        raise HeadwiseError(f"{where}: the {what}'s {size} rows do not divide into {heads} heads")
    return size // heads
