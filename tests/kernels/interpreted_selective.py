"""Run the kernels of selective attention in Triton's interpreter and print their errors, a JSON line per case.

A program of its own because Triton reads TRITON_INTERPRET when it is imported; `test_selective.py`
starts it once.
"""

from __future__ import annotations

import json

import torch

from headwise.bench.selective import CASES, errors


def main() -> None:
    for name, case in CASES.items():
        torch.manual_seed(0)
        small = {"batch": 2, "tokens": 70, "heads": case.get("heads", 4), "width": case.get("width", 16)}
        print(json.dumps({"case": name, "errors": errors(case, torch.device("cpu"), torch.float32, **small)}))


if __name__ == "__main__":
    main()
