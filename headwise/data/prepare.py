"""From raw text to token shards (query-scaling study): filter by source, tokenise, cut, write, check.

Every document is tokenised alone and cut into non-overlapping sequences of `length` tokens; what
is left at its end is dropped, so no sequence mixes documents and none is padded. Sequences keep
the documents' order. Shards are `.npz` with `input_ids` int32 `(N, length)`.

Memory holds one group of documents and one shard. After each shard, a file with the position and
the sequences not yet written replaces its predecessor; a process that is killed at any moment
goes on from there and ends with the same bytes. The manifest is written last: shards with a
manifest are complete and checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np
from msgspec import Meta

from headwise import reading
from headwise.data.documents import Document, Documents, Fields, Position, open_documents
from headwise.data.progress import progress
from headwise.data.shards import MANIFEST, read_manifest, read_shard
from headwise.data.text import files_checksum
from headwise.data.tokenizer import Tokenizer, load_tokenizer
from headwise.errors import HeadwiseError
from headwise.files import alone, must_be_folder, replacing, sweep, write_json

KEEP = ("CommonCrawl", "C4", "Wikipedia", "StackExchange")
_UNFINISHED = ".unfinished.npz"
_GROUP_DOCUMENTS, _GROUP_CHARACTERS = 256, 1 << 21


@dataclass
class PrepareConfig:
    """What to prepare.

    Args:
        source: a file or folder (jsonl, Parquet, text), or the name of a Hugging Face dataset.
        tokenizer: Hugging Face tokenizer, a path or a name; `bytes` leaves the bytes of UTF-8 as they are.
        out: the folder for the shards.
        keep: sources to keep, or ("all",). Compared without case, the prefix RedPajama and a plural s.
        drop: sources to drop of those.
        text_field, source_field: where a record has them; a dot goes into a nested record.
        length: tokens per sequence.
        shard_sequences: sequences per shard.
        max_sequences: stop after so many; None takes all.
        dataset_config, split, streaming: of a Hugging Face dataset. Streaming saves the download
            and is slower; without it a cached download is read.
        cache: folder for the download; default Hugging Face's own.
        pattern: of a folder's files, those to read.
        trust_remote_code: run code that comes with the tokenizer where it names some.
    """

    source: str
    tokenizer: str
    out: str
    keep: tuple[str, ...] = KEEP
    drop: tuple[str, ...] = ()
    text_field: str = "text"
    source_field: str = "meta.redpajama_set_name"
    length: int = 512
    shard_sequences: int = 3000
    max_sequences: int | None = None
    dataset_config: str | None = None
    split: str = "train"
    streaming: bool = False
    cache: str | None = None
    pattern: str = "*"
    trust_remote_code: bool = False

    def validate(self) -> None:
        """Refuse what cannot be prepared.

        Raises:
            HeadwiseError: a number below 1, or nothing to keep.
        """
        for key in ("length", "shard_sequences", "max_sequences"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise HeadwiseError(f"--{key.replace('_', '-')} {value} is too small; it must be at least 1")
        if not self.keep:
            raise HeadwiseError("--keep names no source; give names, or all")

    @property
    def keeps_all(self) -> bool:
        return [name.lower() for name in self.keep] == ["all"]

    def wants(self, source: str) -> bool:
        """Whether documents of this source are kept."""
        kept = self.keeps_all or _plain(source) in map(_plain, self.keep)
        return kept and _plain(source) not in map(_plain, self.drop)


def _plain(source: str) -> str:
    return source.lower().removeprefix("redpajama").removesuffix("s")


@dataclass
class _Work:
    """All that an interrupted preparation needs to go on: saved after every shard."""

    position: Position = (0, 0)
    shards: int = 0
    written: int = 0
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    waiting: list[np.ndarray] = field(default_factory=list)
    origins: list[str] = field(default_factory=list)
    checksums: list[str] = field(default_factory=list)

    def reached(self, limit: int | None) -> bool:
        """Whether the sequences written and waiting are as many as asked for."""
        return limit is not None and self.written + len(self.origins) >= limit

    def keep_at_most(self, limit: int | None) -> None:
        """Let no more sequences wait than are asked for."""
        if limit is not None:
            self.waiting = [np.concatenate(self.waiting)[: limit - self.written]]
            del self.origins[limit - self.written :]


def prepare(config: PrepareConfig) -> dict[str, Any]:
    """Make all shards and the manifest; go on where an earlier call was interrupted.

    Returns:
        The manifest.

    Raises:
        HeadwiseError: the source, the tokenizer or the folder cannot be used, or nothing is kept.
    """
    out = Path(config.out)
    for _ in prepare_shards(config):
        pass
    return read_manifest(out) or {}


def prepare_shards(config: PrepareConfig) -> Iterator[Path]:
    """As `prepare`, yielding each shard when it is on disk; may be left at any time."""
    config.validate()
    tokenizer = load_tokenizer(config.tokenizer, trust_remote_code=config.trust_remote_code)
    tokenizer.plain = True
    fields = Fields(config.text_field, config.source_field if _needs_sources(config) else None)
    documents = open_documents(
        config.source,
        fields,
        dataset_config=config.dataset_config,
        split=config.split,
        streaming=config.streaming,
        cache=Path(config.cache) if config.cache else None,
        pattern=config.pattern,
    )
    settings = _settings(config, tokenizer, documents)
    out = Path(config.out)
    must_be_folder(out)
    with alone(out / ".lock", f"prepares {str(out)!r}"):
        sweep(out)
        if _finished(out, settings):
            return
        work = _resume(out, settings)
        try:
            with progress("preparing", config.max_sequences, "sequences", work.written) as advance:
                for shard, rows in _write_all(config, tokenizer, documents, settings, work):
                    advance(rows)
                    yield shard
            _finish(config, tokenizer, settings, work)
        except HeadwiseError:
            if work.shards == 0:  # nothing was done that could be gone on with
                (out / _UNFINISHED).unlink(missing_ok=True)
            raise


def _needs_sources(config: PrepareConfig) -> bool:
    return not config.keeps_all or bool(config.drop)


def _settings(config: PrepareConfig, tokenizer: Tokenizer, documents: Documents) -> dict[str, Any]:
    return {
        "input": documents.identity(),
        "tokenizer": {"name": tokenizer.name, "checksum": tokenizer.checksum},
        "vocab_size": tokenizer.vocab_size,
        "length": config.length,
        "shard_sequences": config.shard_sequences,
        "max_sequences": config.max_sequences,
        "keep": list(config.keep),
        "drop": list(config.drop),
        "text_field": config.text_field,
        "source_field": config.source_field,
    }


def _write_all(
    config: PrepareConfig,
    tokenizer: Tokenizer,
    documents: Documents,
    settings: dict[str, Any],
    work: _Work,
) -> Iterator[tuple[Path, int]]:
    """Read, tokenise, cut and write until the documents or the sequences asked for are through."""
    groups = _groups(documents.read(work.position))
    while not work.reached(config.max_sequences) and (group := next(groups, None)):
        _cut(config, tokenizer, group, work)
        work.position = group[-1].next
        work.keep_at_most(config.max_sequences)
        yield from _write_shards(config, settings, work, least=config.shard_sequences)
    yield from _write_shards(config, settings, work, least=1)


def _write_shards(
    config: PrepareConfig, settings: dict[str, Any], work: _Work, least: int
) -> Iterator[tuple[Path, int]]:
    """Write shards while at least `least` sequences wait, and after each what is left to do."""
    while len(work.origins) >= least:
        shard = _write_shard(config, work)
        _save(Path(config.out), settings, work)
        yield shard


def _groups(documents: Iterator[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    characters = 0
    for document in documents:
        group.append(document)
        characters += len(document.text)
        if len(group) == _GROUP_DOCUMENTS or characters >= _GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _cut(config: PrepareConfig, tokenizer: Tokenizer, group: list[Document], work: _Work) -> None:
    """Tokenise the documents that are kept and add their sequences to those that wait."""
    kept = []
    for document in group:
        source = document.source or "text"
        counts = work.sources.setdefault(
            source, {"kept": 0, "documents": 0, "too_short": 0, "tokens": 0, "sequences": 0}
        )
        counts["documents"] += 1
        if document.source is None or config.wants(source):
            counts["kept"] = 1
            kept.append((source, document.text))
    for (source, _), ids in zip(kept, tokenizer.encode([text for _, text in kept]), strict=True):
        n = len(ids) // config.length
        counts = work.sources[source]
        counts["tokens"] += len(ids)
        counts["too_short"] += n == 0
        if n:
            rows = np.asarray(ids[: n * config.length], dtype=np.int32)
            work.waiting.append(rows.reshape(n, config.length))
            work.origins += [source] * n


def _write_shard(config: PrepareConfig, work: _Work) -> tuple[Path, int]:
    n = min(config.shard_sequences, len(work.origins))
    rows = np.concatenate(work.waiting)
    path = Path(config.out) / f"shard_{work.shards:05}.npz"
    with replacing(path) as draft:
        np.savez(draft, input_ids=rows[:n])
    for source in work.origins[:n]:
        work.sources[source]["sequences"] += 1
    work.checksums.append(files_checksum([path]))
    work.waiting, work.origins = [rows[n:]], work.origins[n:]
    work.shards += 1
    work.written += n
    return path, n


def _save(out: Path, settings: dict[str, Any], work: _Work) -> None:
    facts = {
        "settings": settings,
        "position": work.position,
        "shards": work.shards,
        "written": work.written,
        "sources": work.sources,
        "origins": work.origins,
        "checksums": work.checksums,
    }
    with replacing(out / _UNFINISHED) as draft:
        np.savez(
            draft,
            waiting=np.concatenate(work.waiting),
            facts=np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8),
        )


class _Counts(TypedDict):
    kept: int
    documents: int
    too_short: int
    tokens: int
    sequences: int


class _Unfinished(TypedDict):
    settings: dict[str, Any]
    position: tuple[Annotated[int, Meta(ge=0)], Annotated[int, Meta(ge=0)]]
    shards: Annotated[int, Meta(ge=0)]
    written: Annotated[int, Meta(ge=0)]
    sources: dict[str, _Counts]
    origins: list[str]


def _resume(out: Path, settings: dict[str, Any]) -> _Work:
    path = out / _UNFINISHED
    if not path.exists():
        if any(out.glob("*.npz")):
            raise HeadwiseError(f"--out {str(out)!r} holds other shards; choose an empty folder")
        # Says from the first moment whose shards these are, so that the first may be lost too.
        work = _Work(waiting=[np.empty((0, settings["length"]), dtype=np.int32)])
        _save(out, settings, work)
        return work
    try:
        with reading.Arrays.open(path) as saved:
            facts = reading.check(reading.parse_json(saved.read("facts", "u", 1).tobytes()), _Unfinished)
            waiting = saved.read("waiting", "i", 2)
        if len(waiting) != len(facts["origins"]):
            raise reading.Unreadable(path, f"its waiting sequences are {waiting.shape}")
        if stray := next((name for name in facts["origins"] if name not in facts["sources"]), None):
            raise reading.Unreadable(path, f"it counts no source {stray[:80]!r}")
    except reading.Unreadable as error:
        raise HeadwiseError(
            f"{path} is damaged ({error.reason}); delete the folder and start again"
        ) from error
    _same(out, facts["settings"], settings, "an unfinished preparation")
    if waiting.shape[1] != settings["length"]:
        raise HeadwiseError(f"{path} is damaged (its waiting sequences are {waiting.shape}); start again")
    _check_shards(out, {f"shard_{i:05}.npz": sum_ for i, sum_ in enumerate(facts["checksums"])})
    return _Work(
        position=tuple(facts["position"]),
        shards=facts["shards"],
        written=facts["written"],
        sources=facts["sources"],
        waiting=[waiting],
        origins=facts["origins"],
        checksums=facts["checksums"],
    )


def _finished(out: Path, settings: dict[str, Any]) -> bool:
    manifest = read_manifest(out)
    if manifest is None:
        return False
    _same(out, manifest.get("settings", {}), settings, "shards")
    _check_shards(out, {shard["file"]: shard["sha256"] for shard in manifest["shards"]})
    (out / _UNFINISHED).unlink(missing_ok=True)
    return True


def _check_shards(out: Path, stated: dict[str, str]) -> None:
    """Refuse shards that are not, byte by byte, those that were written here."""
    for name, checksum in stated.items():
        path = out / name
        if not path.is_file() or files_checksum([path]) != checksum:
            what = "has changed since it was written" if path.is_file() else "is missing"
            raise HeadwiseError(f"{path} {what}; delete the folder {str(out)!r} and prepare again")


def _same(out: Path, found: dict[str, Any], wanted: dict[str, Any], what: str) -> None:
    wanted = json.loads(json.dumps(wanted))
    for key, value in wanted.items():
        if found.get(key) != value:
            if changed := _changed_file(found.get(key), value):
                raise HeadwiseError(
                    f"--out {str(out)!r} holds {what} {changed}; use the same input, or choose another folder"
                )
            raise HeadwiseError(
                f"--out {str(out)!r} holds {what} with {key} {found.get(key)!r}, not {value!r}; "
                "use the same options, or choose another folder"
            )


def _changed_file(found: Any, wanted: Any) -> str | None:
    """The first file that two inputs do not have alike, in words; None where they are no lists of files."""
    if not all(isinstance(one, dict) and isinstance(one.get("files"), dict) for one in (found, wanted)):
        return None
    before, now = found["files"], wanted["files"]
    name = next((name for name in sorted(before | now) if before.get(name) != now.get(name)), None)
    if isinstance(before.get(name), int):
        return "of an older version, which noted the sizes of its input's files and not their content"
    return None if name is None else f"of another {name}: its content differs"


def _finish(config: PrepareConfig, tokenizer: Tokenizer, settings: dict[str, Any], work: _Work) -> None:
    """Check every shard as it lies on the disk, then write the manifest."""
    out = Path(config.out)
    if work.shards == 0:
        seen = ", ".join(sorted(work.sources)) or "none"
        raise HeadwiseError(
            f"no sequence of {config.length} tokens was made: sources seen: {seen}; kept: "
            f"{', '.join(config.keep)}; choose with --keep, or a smaller --length"
        )
    shards = [_checked(out / f"shard_{i:05}.npz", config.length, tokenizer) for i in range(work.shards)]
    sources = {name: {**counts, "kept": bool(counts["kept"])} for name, counts in work.sources.items()}
    manifest = {
        "format": 1,
        "key": "input_ids",
        "dtype": "int32",
        "vocab_size": tokenizer.vocab_size,
        "sequences": work.written,
        "tokens": work.written * config.length,
        "sources": dict(sorted(sources.items())),
        "shards": shards,
        "settings": settings,
    }
    write_json(out / MANIFEST, manifest)
    (out / _UNFINISHED).unlink(missing_ok=True)


def _checked(path: Path, length: int, tokenizer: Tokenizer) -> dict[str, Any]:
    ids = read_shard(path, tokenizer.vocab_size)
    if ids.shape[1] != length or ids.dtype != np.int32:
        raise HeadwiseError(f"{path} is {ids.dtype} {ids.shape}, not int32 (N, {length}); delete the folder")
    if tokenizer.pad_id is not None and (ids == tokenizer.pad_id).any():
        raise HeadwiseError(f"{path} has the padding token {tokenizer.pad_id}; delete the folder")
    return {"file": path.name, "sequences": len(ids), "sha256": files_checksum([path])}
