"""The language model: tokens, positions, blocks of attention and MLP, logits.

Pre-norm decoder. What varies is one keyword each in `ModelConfig`: the attention kind, RMSNorm or
LayerNorm, GELU or SwiGLU, RoPE / sinusoidal / learned positions, tied or untied output, and a head
width that is free of d_model / n_heads. Initialised as GPT-2.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headwise.attention import Attention, Carry, attention_kind
from headwise.attention.projection import projections
from headwise.model.config import ModelConfig
from headwise.model.rope import Rope


class Mlp(nn.Module):
    """`W_down gelu(W_up x)`, or `W_down (silu(W_gate x) * W_up x)` for swiglu (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gated = config.mlp == "swiglu"
        self.approximate = "tanh" if config.mlp == "gelu_tanh" else "none"
        hidden = config.width_of_mlp()
        self.up = nn.Linear(config.d_model, hidden * (2 if self.gated else 1), bias=config.bias)
        self.down = nn.Linear(hidden, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`x (B, T, d_model)` to the same shape."""
        if self.gated:
            gate, up = self.up(x).chunk(2, dim=-1)
            return self.down(F.silu(gate) * up)
        return self.down(F.gelu(self.up(x), approximate=self.approximate))


class Block(nn.Module):
    """Attention, then the MLP, each on a normalised copy of the residual stream and added to it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        kind = attention_kind(config.attention.kind)
        self.attention_norm = make_norm(config)
        self.attention: Attention = kind(config.attention_shape(layer), config.attention.options())
        self.mlp_norm = make_norm(config)
        self.mlp = Mlp(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, *, attn_mask: Tensor | None, causal: bool, rope: Rope | None, carry: Carry
    ) -> Tensor:
        """`x (B, T, d_model)` to the same shape."""
        normed = self.attention_norm(x)
        y = self.attention(normed, attn_mask=attn_mask, causal=causal, rope=rope, carry=carry)
        x = x + self.dropout(y)
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Decoder(nn.Module):
    """The language model.

    Args:
        config: validated, with `vocab_size` set.
        seq_len: the training length, which sizes the tables of learned positions.
    """

    def __init__(self, config: ModelConfig, seq_len: int = 1024) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise ValueError("model.vocab_size is not set; take it from the data before building the model")
        self.config = config
        self.max_seq_len = config.max_seq_len or seq_len
        self.tokens = nn.Embedding(config.vocab_size, config.d_model)
        learned = config.position == "learned"
        self.positions = nn.Embedding(self.max_seq_len, config.d_model) if learned else None
        rotated = config.attention.rotated_width(config.width_of_head())
        self.rope = Rope(rotated, config.rope_theta, seq_len) if config.position == "rope" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.tokens.weight
        self.initialise()

    def initialise(self) -> None:
        """Draw the weights as GPT-2: normal(0, init_std), less by √(2·n_layers) where a branch ends."""
        own = dict(projections(self))
        drawn = set()
        # last what a kind of attention adds: one seed gives the same projections whatever the kind
        for name, parameter in sorted(self.named_parameters(), key=lambda item: _is_added(item[0])):
            at = next((stem for stem in own if name.startswith(f"{stem}.")), None)
            if at is not None and at not in drawn:
                own[at].draw(self._spread(at))
                drawn.add(at)
            elif at is None and parameter.dim() >= 2:
                nn.init.normal_(parameter, std=self._spread(name.removesuffix(".weight")))
        for module in self.modules():
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for attention in self.attentions():
            attention.initialise()
            attention.initialise_modifiers()

    def _spread(self, name: str) -> float:
        """The standard deviation that the matrix of that name starts with."""
        ends_branch = name.endswith(("attention.out", "mlp.down"))
        return self.config.init_std / (math.sqrt(2 * self.config.n_layers) if ends_branch else 1)

    def forward(
        self,
        tokens: Tensor,
        *,
        attn_mask: Tensor | None = None,
        causal: bool = True,
        carry: Carry | None = None,
    ) -> Tensor:
        """Logits for the next token.

        Args:
            tokens: `(B, T)` int64.
            attn_mask: `(B or 1, T, T)`, bool (True = may attend) or additive float.
            causal: whether a token sees only itself and earlier ones.
            carry: filled with what the layers add to the loss.

        Returns:
            `(B, T, vocab_size)`.

        Raises:
            ValueError: T exceeds the table of learned positions.
        """
        x = self.hidden(tokens, attn_mask=attn_mask, causal=causal, carry=carry)
        return self.head(x)

    def hidden(
        self,
        tokens: Tensor,
        *,
        attn_mask: Tensor | None = None,
        causal: bool = True,
        carry: Carry | None = None,
    ) -> Tensor:
        """The normalised residual stream that the output layer reads, `(B, T, d_model)`."""
        x = self.tokens(tokens)
        length = tokens.shape[1]
        if self.positions is not None:
            if length > self.max_seq_len:
                raise ValueError(
                    f"{length} tokens exceed the {self.max_seq_len} learned positions of this model"
                )
            x = x + self.positions.weight[:length]
        elif self.config.position == "sinusoidal":
            # the paper's factor: without it the sinusoids drown embeddings that start at init_std
            x = x * math.sqrt(x.shape[-1]) + sinusoids(length, x.shape[-1], x.device).to(x.dtype)
        x = self.dropout(x)
        carry = carry or Carry()
        for block in self.blocks:
            x = block(x, attn_mask=attn_mask, causal=causal, rope=self.rope, carry=carry)
        return self.norm(x)

    def attentions(self) -> list[Attention]:
        """The attention of each layer, in order."""
        return [cast(Block, block).attention for block in self.blocks]

    def deciding(self) -> Attention:
        """The first layer whose queries decide which keys later queries see; layer 0 where none does."""
        layers = self.attentions()
        return next((layer for layer in layers if layer.selects), layers[0])


def _is_added(name: str) -> bool:
    part = name.partition(".attention.")[2].partition(".")[0]
    return part not in ("", "qkv", "out")


def make_norm(config: ModelConfig) -> nn.Module:
    """The normalisation that `config` names."""
    if config.norm == "rmsnorm":
        return nn.RMSNorm(config.d_model, eps=1e-6)
    return nn.LayerNorm(config.d_model, bias=config.bias)


def sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """Sinusoidal positions `(T, d_model)` (Vaswani et al. 2017): sines, then cosines."""
    half = -(-width // 2)
    frequency = 10_000.0 ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
    return torch.cat((angle.sin(), angle.cos()), dim=-1)[:, :width]
