"""Verified copies of runs: `push` writes one, `pull` fetches one, `verify` reads one back.

A push writes the files, reads each of them back (or takes the SHA-256 that the hub computed), writes the
manifest last and reads it back too. Until then the target holds a claim, and no copy. An interrupted push or
pull can be continued: files that arrived complete are not transferred again.
"""

from __future__ import annotations

from headwise.runs.pull import pull
from headwise.runs.push import push
from headwise.runs.remote import Store, open_store
from headwise.runs.transfer import SILENT, Copy, Progress, digest_of, verify

__all__ = ["SILENT", "Copy", "Progress", "Store", "digest_of", "open_store", "pull", "push", "verify"]
