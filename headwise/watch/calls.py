"""A call of transformers' attention interface, and what its arguments say of masks, documents and sinks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.attention.observation import Mask, Unmeasured


@dataclass(frozen=True)
class Call:
    """What a layer hands to the attention interface.

    Attributes:
        q, k, v: `(B, H, T, D)`, `(B, K, T, D)`, `(B, K, T, D)`, after the rotation.
        mask: as handed over.
        options: the other keyword arguments.
        eager: whether the layer's own eager function attends, which knows no `is_causal`.
        name: of the implementation.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any
    options: dict[str, Any]
    eager: bool
    name: str = ""

    @property
    def softcap(self) -> float | None:
        """What bounds the logits. `sdpa` bounds none: transformers before 5.21 lets it ignore the option."""
        return None if self.name == "sdpa" and not self.eager else self.options.get("softcap")

    @property
    def reads_keywords(self) -> bool:
        """Whether the function that attends may read flash attention's keywords."""
        return not self.eager and self.name not in ("eager", "sdpa", "flex_attention")

    @property
    def adds_as_numbers(self) -> torch.dtype | None:
        """The dtype of a 4-D mask that is added to the scores as 0 and 1, and hides nothing."""
        mask = self.mask
        if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.is_floating_point():
            return None
        return mask.dtype if self.eager or mask.dtype != torch.bool else None


def sink(call: Call) -> Tensor | Unmeasured | None:
    """The sink logits `(H,)` or `(B, H, T)` that this call adds to its softmax; None without any."""
    batch, heads, tokens = call.q.shape[:3]
    for name in ("s_aux", "sinks"):
        sink = call.options.get(name)
        if not isinstance(sink, Tensor):
            continue
        if sink.numel() == heads:
            return sink.flatten()
        if sink.shape in ((batch, heads, tokens), (batch, heads, tokens, 1)):
            return sink.reshape(batch, heads, tokens)
        return Unmeasured(
            f"its sinks have shape {tuple(sink.shape)}, neither one for each of {heads} heads nor one for "
            "each query"
        )
    return None


def unsupported(call: Call, source: str | None) -> str | None:
    """Why this call cannot be measured, or None; `source` is what its keys are made of, if not itself."""
    q, k = call.q, call.k
    if source is not None:
        return f"it is cross-attention, its keys come from {source}: only self-attention is measured"
    if q.dim() != 4 or k.dim() != 4:
        return f"its queries have shape {tuple(q.shape)}, not (B, H, T, D)"
    if q.shape[-2] != k.shape[-2]:
        return (
            f"{q.shape[-2]} queries met {k.shape[-2]} keys: cross-attention and steps with a "
            "key-value cache are not measured, only whole sequences"
        )
    if q.shape[0] != k.shape[0] or q.shape[-1] != k.shape[-1] or q.shape[1] % k.shape[1]:
        return f"queries {tuple(q.shape)} and keys {tuple(k.shape)} do not pair up"
    if call.mask is not None and not isinstance(call.mask, Tensor):
        return f"its mask is a {type(call.mask).__name__}; load the model with attn_implementation='sdpa'"
    if call.adds_as_numbers is not None:
        return (
            f"its mask is {call.adds_as_numbers}, which an eager function adds to the scores as numbers; "
            "give an additive mask, or a boolean one to a model loaded with attn_implementation='sdpa'"
        )
    if call.mask is not None and call.mask.dim() != 4 and call.mask.shape[:-1] != q.shape[:1]:
        return f"its mask has shape {tuple(call.mask.shape)}, neither (B, 1, T, T) nor (B, T)"
    return None


def read_flags(layer: nn.Module, call: Call) -> Mask | Unmeasured:
    """Without a mask, or with padding alone `(B, T)` as flash attention takes it: flags say the rest."""
    given = call.options.get("is_causal")
    causal = bool(getattr(layer, "is_causal", True) if given is None else given)
    window = call.options.get("sliding_window")
    if call.mask is not None:
        return Mask(causal, window, key_mask=call.mask[:, -call.q.shape[-2] :].bool())
    documents = _packed(call) if call.reads_keywords else None
    if isinstance(documents, Unmeasured):
        return documents
    return Mask(causal and not call.eager, window, documents=documents)


def _packed(call: Call) -> Tensor | Unmeasured | None:
    """The documents of a packed row `(B, T)`, by flash attention's keywords; None where a row is one."""
    batch, tokens = call.q.shape[0], call.q.shape[-2]
    ends, key_ends = call.options.get("cu_seq_lens_q"), call.options.get("cu_seq_lens_k")
    positions = call.options.get("position_ids")
    if isinstance(ends, Tensor):
        if isinstance(key_ends, Tensor) and not torch.equal(ends, key_ends):
            return Unmeasured("its cu_seq_lens_q and cu_seq_lens_k differ: only self-attention is measured")
        if int(ends[-1]) != batch * tokens:
            return Unmeasured(f"its cu_seq_lens_q end at {int(ends[-1])}, not at {batch * tokens} tokens")
        place = torch.arange(batch * tokens, device=call.q.device)
        documents = torch.searchsorted(ends.to(place), place, right=True).view(batch, tokens)
        if bool((documents[1:, 0] == documents[:-1, -1]).any()):
            return Unmeasured("a document of its cu_seq_lens_q goes on in the next row of the batch")
        return documents
    if "flash" in call.name and batch == 1 and isinstance(positions, Tensor) and positions.numel() == tokens:
        positions = positions.view(1, tokens)
        if bool((positions.diff() != 1).any()):
            return (positions == positions.min()).cumsum(-1)
    return None
