"""`model.attention.holo`: the form of holographic attention and its switches."""

from __future__ import annotations

from dataclasses import dataclass

from headwise.errors import in_range, one_of

FORMS = ("boundary", "hrr")
READS = ("retrieve", "reweight")
SECTION = "model.attention.holo"


@dataclass
class HoloConfig:
    """Holographic attention.

    Attributes:
        form: boundary (softmax attention with the four switches below) or hrr (holographic reduced
            representations: a running sum of keys bound with values, read by queries; linear in T).
        radial_gate: boundary: each head's queries times sigmoid(r_h), which starts at 1/2.
        boundary_residual: boundary: W_b x is added to the output; W_b (d_model x d_model) starts at 0.
        poincare: boundary: scores are negative distances in a Poincaré ball instead of products.
        curvature: boundary: c > 0 at the start; one is learned for each layer.
        tropical_temperature: boundary: each head's scores times a learned τ_h > 0, which starts at 1.
        read: hrr: retrieve (what the query reads, normalised) or reweight (the token's own value times the
            running softmax weight of its cosine with what was read).
        eps: distance to the ball's boundary and to x = 0 and u = v below which distances are clamped; for
            hrr the least modulus by which a spectrum is divided.
        match_parameters: where model.d_ff is not given, make the MLP narrower by the parameters of W_b, so
            that the model has as many as with softmax attention.
    """

    form: str = "boundary"
    radial_gate: bool = True
    boundary_residual: bool = True
    poincare: bool = False
    curvature: float = 1.0
    tropical_temperature: bool = False
    read: str = "retrieve"
    eps: float = 1e-6
    match_parameters: bool = True

    @property
    def has_boundary(self) -> bool:
        """Whether there is a W_b."""
        return self.form == "boundary" and self.boundary_residual

    @property
    def has_distances(self) -> bool:
        """Whether scores are distances, which no fused engine computes."""
        return self.form == "boundary" and self.poincare

    def validate_values(self) -> None:
        """Refuse what has no meaning, also where another kind is chosen.

        Raises:
            HeadwiseError: an unknown form or read, or a number out of its range.
        """
        one_of(f"{SECTION}.form", self.form, FORMS)
        one_of(f"{SECTION}.read", self.read, READS)
        in_range(f"{SECTION}.curvature", self.curvature, 0.0, 1e4, above=True)
        # below it float32 loses what is divided by it, above it most of the ball is cut off
        in_range(f"{SECTION}.eps", self.eps, 1e-7, 0.1)
