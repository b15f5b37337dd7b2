"""Tokenizers of Hugging Face, by path or by name, and texts tokenised once into the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from headwise import pretrained, reading
from headwise.data.hub import ask_for
from headwise.data.progress import progress
from headwise.data.text import Text, character_start, files_checksum, is_sealed, only_one, seal
from headwise.errors import HeadwiseError, in_range
from headwise.files import local, replacing, write_json
from headwise.pretrained import refused, tokenizer_code, tokenizer_settings

LIMIT = 256 << 20
"""Bytes of a tokenizer.json."""

BYTES = "bytes"
"""Names the tokenizer that leaves bytes as they are."""

_PIECE = 1 << 16
"""Bytes tokenised at a time. Part of what a tokenised text is: pieces end at a line's end."""


class Tokenizer:
    """A tokenizer of either library behind one face.

    Attributes:
        name: the path or name it was asked for by.
        vocab_size: the largest id + 1, added tokens included.
        checksum: sha256 of all that decides the ids.
        pad_id: the id of the padding token; None without one.
        plain: read "<|endoftext|>" and the like in a text as the characters they are, not as
            special tokens. Off by default, as in transformers.
    """

    def __init__(self, name: str, fast: Any, slow: Any = None, pad_token: str | None = None) -> None:
        self.name = name
        self.plain = False
        self._fast, self._slow = fast, slow
        if fast is not None:
            fast.no_truncation()
            fast.no_padding()
            vocabulary, content = fast.get_vocab(with_added_tokens=True), fast.to_str()
        else:
            vocabulary = slow.get_vocab()
            content = _saved(slow)
        if not vocabulary:
            raise HeadwiseError(f"tokenizer {name!r} has no tokens; give another")
        self.vocab_size = max(vocabulary.values()) + 1
        in_range(f"the vocabulary of tokenizer {name!r}", self.vocab_size, 1, 2**24)
        self.checksum = hashlib.sha256(content.encode()).hexdigest()
        self.pad_id: int | None = vocabulary.get(pad_token)

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The smaller of uint16 and uint32 that holds every id."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without special tokens around it."""
        if self._fast is not None:
            self._fast.encode_special_tokens = self.plain
            encoded = self._fast.encode_batch_fast(texts, add_special_tokens=False)
            return [one.ids for one in encoded]
        return self._slow(texts, add_special_tokens=False, split_special_tokens=self.plain, verbose=False)[
            "input_ids"
        ]

    def token(self, index: int) -> str:
        """The token with this id, as it reads in a text."""
        return (self._fast or self._slow).decode([index])

    def decode(self, ids: list[int]) -> str:
        """The text of these ids, special tokens included."""
        return (self._fast or self._slow).decode(ids, skip_special_tokens=False)


def _saved(slow: Any) -> str:
    """All that decides the ids of a tokenizer without a fast form: its class, its files, its code."""
    with TemporaryDirectory() as folder:
        slow.save_pretrained(folder)
        files = {
            file.relative_to(folder).as_posix(): files_checksum([file])
            for file in sorted(Path(folder).rglob("*"))
            if file.is_file()
        }
    return repr((type(slow).__name__, sorted(slow.get_vocab().items()), files))


class ByteTokenizer(Tokenizer):
    """The bytes of UTF-8 as they are: 256 ids, no padding."""

    def __init__(self) -> None:
        self.name, self.vocab_size, self.pad_id, self.plain = BYTES, 256, None, True
        self.checksum = hashlib.sha256(BYTES.encode()).hexdigest()

    def encode(self, texts: list[str]) -> list[list[int]]:
        """The bytes of each text."""
        return [list(text.encode()) for text in texts]

    def token(self, index: int) -> str:
        """The byte as a character, or its number where it is part of one."""
        return bytes([index]).decode(errors="backslashreplace")

    def decode(self, ids: list[int]) -> str:
        """The text of these bytes."""
        return text_of_bytes(ids)


def text_of_bytes(ids: Iterable[int]) -> str:
    """Text of ids that are bytes; a model may know more ids than there are bytes."""
    unknown = "\N{REPLACEMENT CHARACTER}".encode()
    return b"".join(bytes([i]) if i < 256 else unknown for i in ids).decode(errors="replace")


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer in a `tokenizer.json` file or a folder, of that name at Hugging Face, or `bytes`.

    Args:
        trust_remote_code: run code that comes with the tokenizer where it names some.

    Raises:
        HeadwiseError: there is none, it cannot be read, or only code of its own can read it.
    """
    if name == BYTES:
        return ByteTokenizer()
    path = local(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file():
        settings = tokenizer_settings(file.parent) if file.name == "tokenizer.json" else {}
        code = tokenizer_code(settings)
        if code is None:
            return _from_file(name, file, settings)
        if not trust_remote_code:
            raise refused(name, code)
        path = file.parent
    elif not path.is_dir() and (name.startswith((".", "/", "~")) or name.endswith(".json")):
        raise HeadwiseError(f"tokenizer {name!r} does not exist; give a tokenizer.json, a folder or a name")
    try:
        if not path.is_dir():
            ask_for(name, "tokenizer.json", "tokenizer_config.json", "config.json")
        loaded = pretrained.load_tokenizer(path if path.is_dir() else name, trust=trust_remote_code)
    except HeadwiseError:
        raise
    except BaseException as error:  # transformers raises errors of many libraries, and tokenizers panics
        if not isinstance(error, Exception) and not reading.is_panic(error):
            raise
        raise HeadwiseError(
            f"tokenizer {name!r} cannot be loaded ({reading.first_line(error)}); "
            "give a folder or another name"
        ) from error
    fast = getattr(loaded, "backend_tokenizer", None)
    return Tokenizer(name, fast, loaded, loaded.pad_token)


def _from_file(name: str, file: Path, settings: dict[str, Any]) -> Tokenizer:
    import tokenizers

    try:
        content = reading.read_bytes(file, limit=LIMIT)
        fast = tokenizers.Tokenizer.from_buffer(content)
        return Tokenizer(name, fast, pad_token=_pad_token(file, settings))
    except reading.Unreadable as error:
        raise HeadwiseError(f"tokenizer {error}") from error
    except HeadwiseError:
        raise
    except BaseException as error:  # tokenizers raises bare Exception, and panics
        if not isinstance(error, Exception) and not reading.is_panic(error):
            raise
        raise HeadwiseError(
            f"tokenizer {str(file)!r} cannot be read ({reading.first_line(error)}); give another"
        ) from error


def _pad_token(file: Path, settings: dict[str, Any]) -> str | None:
    pad = settings.get("pad_token")
    pad = pad.get("content") if isinstance(pad, dict) else pad
    if pad is not None and not isinstance(pad, str):
        raise reading.Unreadable(file.with_name("tokenizer_config.json"), f"its pad_token is {pad!r}")
    return pad


def tokenised(text: Text, tokenizer: Tokenizer, cache: Path) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """The splits of `text` as mapped token ids, and how many bytes of it each split holds.

    Tokenised in pieces, so memory stays small, and once: the cache's key is the checksum of text
    and tokenizer, and where the text is split.

    Raises:
        HeadwiseError: the text is not UTF-8.
    """
    splits_at = [(split, len(part)) for split, part in text.splits.items()]
    key = hashlib.sha256(f"{text.checksum} {tokenizer.checksum} {_PIECE} {splits_at}".encode()).hexdigest()
    folder = cache / "tokens" / key[:32]
    with only_one(folder):
        if not is_sealed(folder):
            with replacing(folder) as draft:
                draft.mkdir()
                _write(text, tokenizer, draft)
                seal(draft)
    try:
        lengths = reading.read_json(folder / "lengths.json", dict[str, tuple[int, int]])
        held = {split: reading.must_be_regular(folder / f"{split}.bin") for split in lengths}
    except reading.Unreadable as error:
        raise error.so(f"delete {folder} and run again") from error
    splits = {}
    for split, (n_tokens, _) in lengths.items():
        file = folder / f"{split}.bin"
        if held[split] != n_tokens * np.dtype(tokenizer.dtype).itemsize:
            raise HeadwiseError(f"{file} is damaged; delete {folder} and run again")
        empty = np.empty(0, dtype=tokenizer.dtype)
        splits[split] = np.memmap(file, dtype=tokenizer.dtype, mode="r") if n_tokens else empty
    return splits, {split: n_bytes for split, (_, n_bytes) in lengths.items()}


def _write(text: Text, tokenizer: Tokenizer, folder: Path) -> None:
    lengths = {}
    total = sum(len(part) for part in text.splits.values())
    with progress("tokenising", total, "B") as advance:
        for split, part in text.splits.items():
            n_tokens = n_bytes = 0
            pieces = _pieces(part)
            with (folder / f"{split}.bin").open("wb") as file:
                while group := list(islice(pieces, 32)):
                    for ids in tokenizer.encode([piece for piece, _ in group]):
                        file.write(np.asarray(ids, dtype=tokenizer.dtype).tobytes())
                        n_tokens += len(ids)
                    read = sum(size for _, size in group)
                    n_bytes += read
                    advance(read)
            lengths[split] = (n_tokens, n_bytes)
    write_json(folder / "lengths.json", lengths)


def _pieces(part: np.ndarray) -> Iterator[tuple[str, int]]:
    """Pieces of UTF-8 text, each with its size in bytes, that end at a line's end where one is."""
    start = 0
    while start < len(part):
        end = min(start + _PIECE, len(part))
        if end < len(part):
            newline = part[start:end].tobytes().rfind(b"\n")
            end = start + newline + 1 if newline >= 0 else character_start(part, end)
        raw = part[start:end].tobytes()
        try:
            yield raw.decode(), len(raw)
        except UnicodeDecodeError as error:
            cut_off = end == len(part) and error.reason == "unexpected end of data"
            if not cut_off:
                raise HeadwiseError(
                    f"the text is not UTF-8 (byte {raw[error.start]:#04x} after {start + error.start} "
                    "bytes of a split); convert it, or read it as bytes without data.tokenizer"
                ) from error
            yield raw[: error.start].decode(), error.start
        start = end
