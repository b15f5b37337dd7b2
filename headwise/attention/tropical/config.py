"""Options of tropical attention."""

from __future__ import annotations

from dataclasses import dataclass, fields

from headwise.errors import HeadwiseError


@dataclass
class TropicalConfig:
    """model.attention.tropical.*

    A vector and the same vector plus a constant are one point of the tropical projective space; to subtract
    the maximum is to choose the representative whose largest number is 0.

    Attributes:
        normalise: divide q and k of each head, after their rotation, by their root mean square.
        gauge: subtract its maximum over D from each q, k, v and y, and the maximum over d_model from what the
            output projection gives.
        centre: subtract each query's largest score from its scores. Under `gauge` this moves y by rounding
            alone, since a constant is subtracted from y again.
    """

    normalise: bool = True
    gauge: bool = True
    centre: bool = True

    def validate_values(self) -> None:
        """Refuse what has no meaning, also where another kind is chosen.

        Raises:
            HeadwiseError: a switch that is neither true nor false.
        """
        for switch in fields(self):
            value = getattr(self, switch.name)
            if not isinstance(value, bool):
                raise HeadwiseError(
                    f"model.attention.tropical.{switch.name} is {value!r}; it is a switch, true or false"
                )
