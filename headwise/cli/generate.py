"""`headwise generate`: a run continues a text, with a full cache or one that drops masked keys."""

from __future__ import annotations

import argparse


def main(argv: list[str]) -> int:
    """Print the text, its speed, and the cache's bytes; returns the exit code."""
    args = _parser().parse_args(argv)

    from headwise.questions.generate.measure import continue_text

    found = continue_text(
        args.run, args.prompt, args.tokens, budget=args.budget, temperature=args.temperature,
        top_k=args.top_k, seed=args.seed, device=args.device,
    )  # fmt: skip
    print(args.prompt + found.text)
    print(
        f"\n{found.tokens} tokens, {found.tokens_per_sec:,.1f} tokens/s; cache of {found.keys} keys a layer, "
        f"{found.cache_bytes:,} bytes: {found.cache_bytes / found.full_bytes:.1%} of the full cache's "
        f"{found.full_bytes:,} for {found.length} tokens"
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headwise generate",
        description="Continue a text token by token. Within a budget, a model that masks keys drops "
        "those it masked most and uses their memory again; others keep their last keys.",
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder")
    add("--prompt", required=True, metavar="TEXT", help="text to continue; token ids where data is no text")
    add("--tokens", type=int, default=200, metavar="N", help="tokens to write (%(default)s)")
    add("--budget", type=float, default=1.0, metavar="SHARE",
        help="share of prompt and continuation that every layer holds at most (%(default)s)")  # fmt: skip
    add("--temperature", type=float, default=0.0, help="0 takes the likeliest token (%(default)s)")
    add("--top-k", type=int, metavar="K", help="draw among the K likeliest tokens")
    add("--seed", type=int, default=0, help="of the draws (%(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, or auto")
    return parser
