"""Run the kernel that undoes a rotation in Triton's interpreter; print a JSON line per case."""

from __future__ import annotations

import json

import torch

import headwise.functional.rotation  # noqa: F401  (registers the operator)
from headwise.functional.rotation.kernel import unrotate
from headwise.watch.rotation import Convention, Form, Tables, _unrotate


def main() -> None:
    torch.manual_seed(0)
    for layout in ("half", "interleaved", "split"):
        for start, pairs, batch in ((0, 12, 1), (0, 6, 2), (12, 6, 1)):
            for dtype in (torch.float32, torch.float16):
                x = torch.randn(2, 21, 3, 24, dtype=dtype).transpose(1, 2)
                tables = Tables(*torch.randn(2, batch, 1, 21, pairs), Form("once", False))
                expected = _unrotate(x, tables, Convention(0, layout, start))
                got = unrotate(
                    x, tables.cos, tables.sin, start,
                    from_halves=layout != "interleaved", to_halves=layout == "half",
                )  # fmt: skip
                assert got.dtype == dtype
                torch.testing.assert_close(got, expected, msg=f"{layout} {start} {pairs} {batch} {dtype}")
                print(json.dumps({"case": f"{layout} {start} {pairs} {batch} {dtype}"}), flush=True)
    x = torch.randn(2, 9, 3, 16).transpose(1, 2).requires_grad_()
    weight, (cos, sin) = torch.randn(16, requires_grad=True), torch.randn(2, 9, 16)
    operator = torch.ops.headwise_rotation.forward.default
    for case, outcome in torch.library.opcheck(operator, (x, cos, sin, weight, 1e-6)).items():
        assert outcome == "SUCCESS", outcome
        print(json.dumps({"case": case}), flush=True)


if __name__ == "__main__":
    main()
