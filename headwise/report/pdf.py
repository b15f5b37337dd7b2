"""A report as PDF, written by a browser or pandoc."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from headwise.errors import HeadwiseError
from headwise.files import replacing

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
TIMEOUT_S = 120


def write_pdf(html: Path, markdown: Path) -> Path:
    """Print `report.html` with a browser, else convert `report.md` with pandoc, into `report.pdf`.

    Raises:
        HeadwiseError: neither is installed, or the installed one fails.
    """
    path = html.with_suffix(".pdf")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser:
        with replacing(path) as draft, tempfile.TemporaryDirectory() as profile:
            options = ["--headless", "--disable-gpu", "--no-pdf-header-footer", f"--user-data-dir={profile}"]
            if hasattr(os, "geteuid") and os.geteuid() == 0:  # Chromium's sandbox does not start as root
                options.append("--no-sandbox")
            _call([browser, *options, f"--print-to-pdf={draft.absolute()}", html.absolute().as_uri()], draft)
        return path
    if pandoc := shutil.which("pandoc"):
        with replacing(path) as draft:
            call = [pandoc, markdown.name, "--from=gfm", "--to=pdf", "-o", str(draft.absolute())]
            _call(call, draft, markdown.parent)
        return path
    raise HeadwiseError(
        "no PDF was written: neither a browser (chromium, google-chrome) nor pandoc is installed; "
        f"any browser can print {html}"
    )


def _call(command: list[str], made: Path, folder: Path | None = None) -> None:
    name = Path(command[0]).name
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HeadwiseError(f"no PDF was written: {name} failed ({type(error).__name__})") from error
    if done.returncode or not made.is_file():
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise HeadwiseError(
            f"no PDF was written: {name} ended with {done.returncode}: {lines[-1] if lines else 'no message'}"
        )
