"""Numbers in, numbers out: statistics, verdicts and honesty checks. No torch, no files."""
