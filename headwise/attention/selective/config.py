"""`model.attention.selective`: every switch of selective attention, and which of them go together."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

from headwise.errors import HeadwiseError, in_range, one_of
from headwise.functional.dispatch import WIDEST_HEAD
from headwise.functional.selective.scan import SUMS

SOURCES = ("head_zero", "dedicated", "linear_combo", "latent")
MASK_HEADS = ("sliced", "one_each")
COMBINATIONS = ("normal", "head_zero", "head_zero_and_bias")
LATENTS = ("normal", "ones", "inverse")
PROTECTIONS = (
    "none", "zero", "head_two", "linear_combo", "linear_combo_head_two", "leaky_relu", "big_constant",
)  # fmt: skip
ACCUMULATIONS = ("fused", *SUMS)
MOST = 1e9
MOST_LAYERS = 2**12
SECTION = "model.attention.selective"


@dataclass
class ProtectionConfig:
    """Protection of keys, in a game against the attacks of selection.

    Attributes:
        kind: none (the plain running sum), zero, head_two (ReLU of head 1's logits), linear_combo (of
            all heads' logits), linear_combo_head_two (which starts at head 1), leaky_relu
            (relu(-alpha · logit + offset) of the selection logits), big_constant (50).
        scale: factor on the protection.
        bias: where given, p becomes relu(p · scale + bias).
        alpha: slope of leaky_relu.
        offset: offset of leaky_relu.
    """

    kind: str = "none"
    scale: float = 1.0
    bias: float | None = None
    alpha: float = 0.1
    offset: float = 0.0


@dataclass
class PenaltyConfig:
    """A loss on the context that is kept: ε · Σ_layers M / T, with M[i] = Σ_j (1 - min(F[i,j], τ)/τ).

    Attributes:
        epsilon: ε; no penalty where 0.
        tau: τ, what counts as wholly masked.
        reduce: max or mean of M over queries. The mean is what the selective attention log's runs optimised.
        normalize_layers: divide by the number of layers. The selective attention log's runs did not.
    """

    epsilon: float = 0.0
    tau: float = 1.0
    reduce: str = "max"
    normalize_layers: bool = True


@dataclass
class SelectiveConfig:
    """Selective attention: what masks a key for later queries.

    Attributes:
        enabled: False leaves F = 0: the attention of `flash`.
        layers: the layers that select, numbered from 0; all of them where not given. The others compute what
            `flash` computes, and keep their selection parameters untrained.
        source: whose logits select: head_zero (which also attends), dedicated (extra heads that only
            select), linear_combo (a learned combination of all heads), latent (a learned map from few
            logits to one per head).
        n_masks: masks of a layer, shared by groups of heads; for latent the number of latent logits.
        mask_heads: for dedicated and latent: sliced (all of them from the width of one extra head) or
            one_each (one extra head each).
        combination_init: linear_combo starts normal (std 0.02), at head_zero, or head_zero_and_bias.
        combination_lr: learning-rate multiplier of the combination or latent map; 0 freezes it.
        latent_init: normal (std 0.02), ones, or inverse (1/n).
        latent_scale: factor on the latent logits.
        latent_bias: a bias for each head's logits, starting at 0.
        protect_bos: nothing masks the first token.
        protect_self: no token masks itself.
        relu_leak: slope of the activation below 0.
        relu_after_cumsum: another ReLU on F.
        residual_logits: add the previous layer's logits, mixed by a learned matrix.
        mask_layernorm: normalise F over masks and keys of a query, then divide each key's column by
            the number of its later queries.
        accumulate: fused (the kernel, or torch where there is none), torch, sequential or float64.
        memory_penalty: a loss on the context that is kept.
        protection: protection of keys against attacks.
    """

    enabled: bool = True
    layers: list[int] | None = None
    source: str = "head_zero"
    n_masks: int = 1
    mask_heads: str = "sliced"
    combination_init: str = "normal"
    combination_lr: float = 1.0
    latent_init: str = "normal"
    latent_scale: float = 1.0
    latent_bias: bool = False
    protect_bos: bool = True
    protect_self: bool = True
    relu_leak: float = 0.0
    relu_after_cumsum: bool = False
    residual_logits: bool = False
    mask_layernorm: bool = False
    accumulate: str = "fused"
    memory_penalty: PenaltyConfig = field(default_factory=PenaltyConfig)
    protection: ProtectionConfig = field(default_factory=ProtectionConfig)

    def at(self, layer: int) -> SelectiveConfig:
        """The switches of one layer: disabled where `layers` leaves it out."""
        selects = self.layers is None or layer in self.layers
        return self if selects else replace(self, enabled=False)

    def mixes(self, layer: int) -> bool:
        """Whether the logits of `layer` take up those of an earlier layer that selects."""
        return self.residual_logits and layer > min(self.layers or [0])

    def refuse_beyond(self, n_layers: int) -> None:
        """Refuse a layer that the model does not have.

        Raises:
            HeadwiseError: with the layers that it has.
        """
        if self.layers is not None and max(self.layers) >= n_layers:
            _refuse("layers", self.layers, f"the model has layers 0 to {n_layers - 1}")

    def masks(self, n_heads: int) -> int:
        """Distinct masks of a layer."""
        return n_heads if self.source == "latent" else self.n_masks

    def extra_heads(self) -> int:
        """Query/key heads beside those that attend."""
        if self.source not in ("dedicated", "latent"):
            return 0
        return 1 if self.mask_heads == "sliced" else self.n_masks

    def plain_because(self) -> str | None:
        """The switch that keeps selection in plain PyTorch on any device; None where it can run fused."""
        if not self.enabled:
            return None
        for name in ("residual_logits", "mask_layernorm"):
            if getattr(self, name):
                return name
        if self.accumulate != "fused":
            return f"accumulate={self.accumulate}"
        if self.protection.kind == "leaky_relu" and (bias := self._bias()):
            return f"protection.kind=leaky_relu with {bias}"
        return None

    def _bias(self) -> str | None:
        """The switch that gives selection logits a bias."""
        if self.source == "latent" and self.latent_bias:
            return "latent_bias"
        if self.source == "linear_combo" and self.combination_init == "head_zero_and_bias":
            return "combination_init=head_zero_and_bias"
        return None

    def width(self, n_kv_heads: int, head_dim: int) -> int:
        """E, the width of selection queries: of all heads whose logits a mask combines, side by side."""
        if self.source == "linear_combo":
            return n_kv_heads * head_dim
        if self.source == "latent":
            return self.extra_heads() * head_dim
        return head_dim // (self.n_masks if self.source == "dedicated" and self.mask_heads == "sliced" else 1)

    def streams(self, n_heads: int, width: int) -> bool:
        """Whether masks, one a head, can be made within the attention's kernel and never kept.

        Args:
            width: of the selection queries.
        """
        alone = self.protection.kind == "none" and not self.memory_penalty.epsilon
        own = self.masks(n_heads) == n_heads and width <= WIDEST_HEAD
        return self.enabled and alone and own and self.plain_because() is None

    def validate(self, *, n_heads: int, head_dim: int) -> None:
        """Refuse combinations that have no meaning.

        Raises:
            HeadwiseError: with the reason.
        """
        self.validate_values()
        self._validate_masks(n_heads, head_dim)
        self._validate_protection(n_heads)

    def validate_values(self) -> None:
        """Refuse values that mean nothing, whichever kind is chosen.

        Raises:
            HeadwiseError: with the reason.
        """
        one_of(f"{SECTION}.source", self.source, SOURCES)
        one_of(f"{SECTION}.mask_heads", self.mask_heads, MASK_HEADS)
        one_of(f"{SECTION}.combination_init", self.combination_init, COMBINATIONS)
        one_of(f"{SECTION}.latent_init", self.latent_init, LATENTS)
        one_of(f"{SECTION}.accumulate", self.accumulate, ACCUMULATIONS)
        one_of(f"{SECTION}.protection.kind", self.protection.kind, PROTECTIONS)
        one_of(f"{SECTION}.memory_penalty.reduce", self.memory_penalty.reduce, ("max", "mean"))
        for key, value in _numbers(self).items():
            if not abs(value) <= MOST:
                _refuse(key, value, f"it must be a finite number of at most {MOST:.0e} in size")
        if self.combination_lr < 0:
            _refuse("combination_lr", self.combination_lr, "a learning-rate multiplier is at least 0")
        if self.relu_leak < 0:
            _refuse("relu_leak", self.relu_leak, "it is a slope of at least 0")
        if self.memory_penalty.epsilon < 0:
            _refuse("memory_penalty.epsilon", self.memory_penalty.epsilon, "it must not be negative")
        if self.memory_penalty.tau <= 0:
            _refuse("memory_penalty.tau", self.memory_penalty.tau, "it must be greater than 0")
        if self.layers is not None:
            self._validate_layers(self.layers)
        if self.n_masks < 1:
            _refuse("n_masks", self.n_masks, "there is at least one mask")
        in_range(f"{SECTION}.n_masks", self.n_masks, 1, 2**12)
        if self.protection.scale < 0:
            _refuse("protection.scale", self.protection.scale, "a protection is at least 0")

    def _validate_layers(self, layers: list[int]) -> None:
        if not layers:
            _refuse("layers", layers, "it names no layer; set enabled to false to select in none")
        if min(layers) < 0 or max(layers) >= MOST_LAYERS:
            _refuse("layers", layers, "layers are numbered from 0 to model.n_layers - 1")
        if len(set(layers)) < len(layers):
            _refuse("layers", layers, "it names a layer twice")

    def _validate_masks(self, n_heads: int, head_dim: int) -> None:
        sliced = self.source in ("dedicated", "latent") and self.mask_heads == "sliced"
        if self.n_masks > n_heads and self.source != "latent":
            _refuse("n_masks", self.n_masks, f"{n_heads} heads have no use for more than {n_heads} masks")
        if self.source == "head_zero" and self.n_masks > 1:
            _refuse("n_masks", self.n_masks, "source head_zero makes one mask; choose dedicated for several")
        if sliced and head_dim % self.n_masks:
            _refuse(
                "n_masks", self.n_masks,
                f"one head of width {head_dim} cannot be sliced equally; choose a divisor, "
                "or mask_heads one_each",
            )  # fmt: skip
        if self.mask_layernorm and self.masks(n_heads) == 1:
            _refuse("mask_layernorm", True, "it would remove F of a single mask; use n_masks > 1")

    def _validate_protection(self, n_heads: int) -> None:
        kind = self.protection.kind
        if kind == "none":
            return
        if self.relu_leak:
            _refuse(
                "relu_leak", self.relu_leak,
                f"the game of protection.kind {kind} needs attacks of at least 0; reset one of them",
            )  # fmt: skip
        if "head_two" in kind and n_heads < 2:
            _refuse("protection.kind", kind, "it needs a second head; set model.n_heads to 2 or more")


def _numbers(config: SelectiveConfig) -> dict[str, float]:
    """Every number of a configuration by its key."""
    found: dict[str, float] = {}
    for name, value in asdict(config).items():
        parts = (
            {f"{name}.{key}": part for key, part in value.items()}
            if isinstance(value, dict)
            else {name: value}
        )
        found |= {key: part for key, part in parts.items() if type(part) in (int, float)}
    return found


def _refuse(key: str, value: object, reason: str) -> None:
    raise HeadwiseError(f"{SECTION}.{key} is {value}: {reason}")
