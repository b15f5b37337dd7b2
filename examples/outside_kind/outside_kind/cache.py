"""One step of decoding: the slots of a key/value cache, and nothing beside them."""

from __future__ import annotations

import torch
from torch import Tensor

from headwise.attention.cache import KeyValueCache


class NothingCache(KeyValueCache):
    """Keys and values of the last tokens under the extra logit."""

    def core(self, q: Tensor, k: Tensor, v: Tensor, f: Tensor) -> Tensor:
        """Attention to the slots, less the share that goes to nothing."""
        scores = (q @ k.transpose(-2, -1)).float() * self.attention.scale - f
        offset = self.attention.offset.float().unflatten(0, (k.shape[1], -1))[self.order.flatten()]
        keeps = torch.sigmoid(scores.logsumexp(-1) - offset)
        return super().core(q, k, v, f) * keeps[..., None].to(v.dtype)
