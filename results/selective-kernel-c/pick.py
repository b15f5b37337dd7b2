"""Copy about BYTES of the kernel's C files into a folder, in an order that their names' hashes decide.

    python pick.py linux-source-6.1 picked 155000000

Files that are not UTF-8 are left out. The copies are numbered, so that whoever reads them in the order of
their names reads drivers, file systems and architectures mixed.
"""

import hashlib
import sys
from pathlib import Path


def main() -> None:
    source, out, wanted = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    files = {path.relative_to(source).as_posix(): path for path in source.rglob("*.c") if path.is_file()}
    order = sorted(files, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    out.mkdir(parents=True, exist_ok=True)
    taken = number = 0
    for name in order:
        text = files[name].read_bytes()
        try:
            text.decode()
        except UnicodeDecodeError:
            continue
        (out / f"{number:05}_{name.replace('/', '_')}"[:200]).write_bytes(text)
        taken, number = taken + len(text), number + 1
        if taken >= wanted:
            break
    print(f"{number} files, {taken} bytes")


if __name__ == "__main__":
    main()
