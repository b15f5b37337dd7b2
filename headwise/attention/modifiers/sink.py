"""`sink`: one more logit in the softmax's denominator, whose weight goes to no key (Miller 2023; GPT-OSS).

    y_i = Σ_j exp(s[i,j]) v_j / (exp(c) + Σ_l exp(s[i,l]))

`zero` has c = 0 for every head, `learned` one c per head, which also starts at 0. Neither starts as the model
without a sink: that is c = -∞, where the gradient of c is 0.

The measure `null_weight` is the sink's share, exp(c) / (exp(c) + Σ_l exp(s[i,l])). All other measures use the
weights over the keys, normalised to 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headwise.attention.observation import Scores

ROWS = 64
"""Queries whose scores are in memory at a time."""


class Sink(nn.Module):
    """The sinks of a layer's heads.

    Args:
        n_heads: H.
        learned: whether they are learned; otherwise they are 0.
    """

    logit: Tensor

    def __init__(self, n_heads: int, *, learned: bool) -> None:
        super().__init__()
        if learned:
            self.logit = nn.Parameter(torch.empty(n_heads))
        else:
            self.register_buffer("logit", torch.zeros(n_heads), persistent=False)

    def initialise(self) -> None:
        """Start every sink at 0."""
        nn.init.zeros_(self.logit)


@torch.no_grad()
def null_weight(seen: Scores, sink: Tensor) -> Tensor:
    """The share of each query's weight that its sink takes, `(B, H, T)` float32; 1 where it sees no key.

    Args:
        seen: the scores of the layer's softmax.
        sink: `(H,)`.
    """
    q, k = seen.q, seen.k
    batch, heads, tokens, _ = q.shape
    k = k.float().repeat_interleave(heads // k.shape[1], dim=1)
    position = torch.arange(tokens, device=q.device)
    found = torch.empty(batch, heads, tokens, device=q.device)
    with torch.autocast(q.device.type, enabled=False):
        for start in range(0, tokens, ROWS):
            rows = slice(start, min(start + ROWS, tokens))
            scores = q[:, :, rows].float() @ k.mT * seen.scale
            scores = scores if seen.bias is None else scores + seen.bias[:, :, rows].float()
            scores = scores.masked_fill(_hidden(seen, position, rows), -torch.inf)
            found[:, :, rows] = torch.sigmoid(sink.float()[:, None] - scores.logsumexp(-1))
    return found


def _hidden(seen: Scores, position: Tensor, rows: slice) -> Tensor:
    """Which keys some queries do not see, `(B or 1, 1, rows, T)`."""
    behind = position[rows, None] - position
    hidden = torch.zeros_like(behind, dtype=torch.bool)[None, None]
    if seen.causal:
        hidden = hidden | (behind < 0)
    if seen.window is not None:
        hidden = hidden | (behind.abs() >= seen.window)
    if seen.key_mask is not None:
        hidden = hidden | ~seen.key_mask[:, None, None]
    if seen.documents is not None:
        hidden = hidden | (seen.documents[:, None, rows, None] != seen.documents[:, None, None])
    return hidden
