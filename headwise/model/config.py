"""`model`: the shape of the decoder and what it is made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from headwise.attention.base import AttentionShape
from headwise.attention.config import AttentionConfig
from headwise.attention.kinds import attention_kind
from headwise.errors import HeadwiseError, in_range, one_of

COUNTS = {
    "d_model": 2**17, "n_layers": 2**12, "n_heads": 2**12, "n_kv_heads": 2**12, "head_dim": 2**14,
    "d_ff": 2**20, "vocab_size": 2**24, "max_seq_len": 2**24,
}  # fmt: skip
"""Sizes, with the largest that is taken."""

MOST_PARAMETERS = 10**13
NORMS = ("rmsnorm", "layernorm")
MLPS = ("gelu", "gelu_tanh", "swiglu")
POSITIONS = ("rope", "sinusoidal", "learned", "none")


@dataclass
class ModelConfig:
    """A decoder-only language model.

    Attributes:
        d_model: width of the residual stream.
        n_layers: number of blocks.
        n_heads: query heads per layer, H.
        n_kv_heads: key/value heads per layer, K; H where not given. H % K == 0.
        heads_by_layer: query heads of each layer where layers differ, as after pruning; n_heads in every
            layer where not given. A key/value head serves as many query heads in every layer, or all where
            there is one.
        head_dim: width of a head, D; d_model / n_heads where not given, and free of it where given.
        d_ff: width of the MLP's hidden layer; 4·d_model, or for swiglu 8/3·d_model (rounded up to a
            multiple of 32), where not given, less what a kind of attention adds to the parameters of softmax
            attention where it says so.
        vocab_size: number of tokens; the data's where not given.
        norm: rmsnorm or layernorm, before attention and MLP (pre-norm).
        mlp: gelu, gelu_tanh (GPT-2's approximation) or swiglu.
        position: rope, sinusoidal, learned or none.
        rope_theta: base of the rotation's frequencies.
        max_seq_len: rows of the learned position table; data.seq_len where not given.
        tie_embeddings: whether the output layer is the token embedding.
        bias: whether linear layers and layer norms have biases.
        dropout: share of residual-branch outputs and embeddings dropped in training.
        init_std: standard deviation of the initial weights (GPT-2: 0.02).
        attention: the kind of attention and its options.
    """

    d_model: int = 128
    n_layers: int = 2
    n_heads: int = 4
    n_kv_heads: int | None = None
    heads_by_layer: list[int] | None = None
    head_dim: int | None = None
    d_ff: int | None = None
    vocab_size: int | None = None
    norm: str = "rmsnorm"
    mlp: str = "gelu"
    position: str = "rope"
    rope_theta: float = 10_000.0
    max_seq_len: int | None = None
    tie_embeddings: bool = True
    bias: bool = False
    dropout: float = 0.0
    init_std: float = 0.02
    attention: AttentionConfig = field(default_factory=AttentionConfig)

    def kv_heads(self) -> int:
        """K, as given or H."""
        return self.n_kv_heads or self.n_heads

    def heads_of(self, layer: int) -> tuple[int, int]:
        """H and K of one layer."""
        if self.heads_by_layer is None:
            return self.n_heads, self.kv_heads()
        heads = self.heads_by_layer[layer]
        return heads, heads // self.heads_that_share() if self.kv_heads() > 1 else 1

    def heads_that_share(self) -> int:
        """Query heads that one key/value head serves where there are several; H / K."""
        return self.n_heads // self.kv_heads()

    def width_of_head(self) -> int:
        """D, as given or d_model / n_heads."""
        return self.head_dim or self.d_model // self.n_heads

    def width_of_mlp(self) -> int:
        """d_ff, as given or the usual multiple of d_model, less what the attention has its MLP pay for."""
        if self.d_ff:
            return self.d_ff
        usual = -(-8 * self.d_model // 3 // 32) * 32 if self.mlp == "swiglu" else 4 * self.d_model
        extra = attention_kind(self.attention.kind).extra_parameters(
            self.attention_shape(0), self.attention.options()
        )
        if not extra:
            return usual
        step = 8 if usual >= 256 else 1  # a width that matrix units multiply fast
        matrices = 3 if self.mlp == "swiglu" else 2
        return max(1, round((usual - extra / (matrices * self.d_model)) / step) * step)

    def _refuse_odd_rotation(self) -> None:
        """Refuse a kind that rotates parts of a head which have no pairs."""
        rotated = self.attention.rotated_width(self.width_of_head())
        if self.position == "rope" and rotated % 2:
            raise HeadwiseError(
                f"model.head_dim is {self.width_of_head()}, of which attention kind {self.attention.kind!r} "
                f"rotates {rotated} at a time, and RoPE rotates pairs: change it, or choose another "
                "model.position"
            )

    def least_parameters(self) -> int:
        """Parameters that a model of these sizes has at least: its embeddings and matrices."""
        attention, options = attention_kind(self.attention.kind), self.attention.options()
        shapes = (self.attention_shape(layer) for layer in range(self.n_layers))
        projections = sum(attention.projection_parameters(shape, options) for shape in shapes)
        mlp = (3 if self.mlp == "swiglu" else 2) * self.d_model * self.width_of_mlp()
        words = (self.vocab_size or 0) * self.d_model * (1 if self.tie_embeddings else 2)
        table = (self.max_seq_len or 0) * self.d_model if self.position == "learned" else 0
        return words + table + projections + self.n_layers * mlp

    def attention_shape(self, layer: int) -> AttentionShape:
        """The sizes of the attention in `layer`."""
        heads, kv_heads = self.heads_of(layer)
        return AttentionShape(
            d_model=self.d_model,
            n_heads=heads,
            n_kv_heads=kv_heads,
            head_dim=self.width_of_head(),
            bias=self.bias,
            dropout=self.attention.dropout,
            head_dropout=self.attention.head_dropout,
            layer=layer,
            n_layers=self.n_layers,
            modifiers=self.attention.modifiers(layer),
        )

    def validate(self) -> None:
        """Refuse what no model can be built from.

        Raises:
            HeadwiseError: one line with the value received and what to do.
        """
        for name, largest in COUNTS.items():
            in_range(f"model.{name}", getattr(self, name), 1, largest)
        for name, most in (("rope_theta", 1e15), ("init_std", 1e3)):
            in_range(f"model.{name}", getattr(self, name), 0, most, above=True)
        one_of("model.norm", self.norm, NORMS)
        one_of("model.mlp", self.mlp, MLPS)
        one_of("model.position", self.position, POSITIONS)
        if self.n_heads % self.kv_heads():
            raise HeadwiseError(
                f"model.n_heads {self.n_heads} is not divisible by model.n_kv_heads {self.kv_heads()}: "
                "each key/value head serves the same number of query heads"
            )
        self._check_layers()
        if self.head_dim is None and self.d_model % self.n_heads:
            raise HeadwiseError(
                f"model.d_model {self.d_model} is not divisible by model.n_heads {self.n_heads}; "
                "change one of them, or set model.head_dim, which is free of both"
            )
        if self.position == "rope" and self.width_of_head() % 2:
            raise HeadwiseError(
                f"model.head_dim is {self.width_of_head()}, and RoPE rotates pairs: "
                "make it even, or choose another model.position"
            )
        kind = attention_kind(self.attention.kind)
        for layer in {self.heads_of(layer): layer for layer in range(self.n_layers)}.values():
            heads, kv_heads = self.heads_of(layer)
            self.attention.validate(n_heads=heads, n_kv_heads=kv_heads, head_dim=self.width_of_head())
            kind.check(self.attention_shape(layer), self.attention.options())
        if self.least_parameters() > MOST_PARAMETERS:
            raise HeadwiseError(
                f"model.d_model {self.d_model}, model.n_layers {self.n_layers} and the other sizes make "
                f"{self.least_parameters():.1e} parameters; no machine holds that: lower them"
            )
        if not 0 <= self.dropout < 1:
            raise HeadwiseError(f"model.dropout is {self.dropout}; it is a share, 0 <= dropout < 1")
        if self.attention.value_residual and self.n_layers == 1:
            raise HeadwiseError(
                "model.attention.value_residual mixes the first layer's values into later layers, and "
                "model.n_layers is 1; set more layers, or turn it off"
            )
        self._refuse_odd_rotation()

    def _check_layers(self) -> None:
        """Refuse heads by layer that are not one number a layer, or that key/value heads cannot serve."""
        if self.heads_by_layer is None:
            return
        if len(self.heads_by_layer) != self.n_layers:
            raise HeadwiseError(
                f"model.heads_by_layer has {len(self.heads_by_layer)} numbers for {self.n_layers} layers; "
                "give one for each"
            )
        for layer, heads in enumerate(self.heads_by_layer):
            in_range(f"model.heads_by_layer[{layer}]", heads, 1, COUNTS["n_heads"])
            if self.kv_heads() > 1 and heads % self.heads_that_share():
                raise HeadwiseError(
                    f"model.heads_by_layer[{layer}] is {heads}, not a multiple of the "
                    f"{self.heads_that_share()} query heads that each key/value head serves"
                )
        kv_heads = {self.heads_of(layer)[1] for layer in range(self.n_layers)}
        if self.attention.value_residual and len(kv_heads) > 1:
            raise HeadwiseError(
                f"model.heads_by_layer gives layers of {', '.join(map(str, sorted(kv_heads)))} key/value "
                "heads, and model.attention.value_residual mixes the first layer's values into those of the "
                "others: give each layer as many, or turn it off"
            )
