"""The contract of every kind holds for the forms that are not the default, too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

MODULE = '''
from dataclasses import dataclass
from headwise.attention import register
from headwise.attention.holo.config import HoloConfig
from headwise.attention.holo.layer import HRR, HoloAttention

@dataclass
class Superposition(HoloConfig):
    """model.attention.superposition.*

    Attributes:
        form: of HoloConfig.
    """
    form: str = "hrr"

@dataclass
class Distances(HoloConfig):
    """model.attention.distances.*

    Attributes:
        poincare: of HoloConfig.
        tropical_temperature: of HoloConfig.
    """
    poincare: bool = True
    tropical_temperature: bool = True

@register("superposition")
class SuperpositionAttention(HoloAttention):
    options = Superposition
    supports = HRR

@register("distances")
class DistanceAttention(HoloAttention):
    options = Distances
'''


def test_superpositions_and_distances_keep_the_contract(tmp_path: Path) -> None:
    (tmp_path / "forms_of_holo.py").write_text(MODULE)
    command = ["headwise.testing", "superposition", "distances", "--plugins", "forms_of_holo"]
    root = str(Path(__file__).parents[3])
    environment = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
