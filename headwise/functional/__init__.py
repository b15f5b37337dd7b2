"""What attention is: pure functions on tensors, each with its definition in plain PyTorch.

Needs torch and numpy alone. Where Triton and a GPU are present a function hands over to the kernel
of the same name beside it.
"""

from headwise.functional.differential import differential_attention
from headwise.functional.head_stats import HeadStats, head_stats, weights_stats
from headwise.functional.selective import (
    own_mask_attention,
    selection,
    selection_logits,
    selection_mask,
    selective_attention,
)
from headwise.functional.selective.scan import attack_and_protect
from headwise.functional.tensor_train import reconstruct, tensor_train
from headwise.functional.tropical import tropical_attention

__all__ = [
    "HeadStats", "attack_and_protect", "differential_attention", "head_stats", "own_mask_attention",
    "reconstruct", "selection", "selection_logits", "selection_mask", "selective_attention",
    "tensor_train", "tropical_attention", "weights_stats",
]  # fmt: skip
