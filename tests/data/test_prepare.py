"""Shards from raw text: what is kept, how it is cut, and that an interruption changes nothing."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from headwise.data import DataConfig, open_data
from headwise.data.prepare import PrepareConfig, prepare, prepare_shards
from headwise.data.shards import read_shard
from headwise.data.tokenizer import load_tokenizer
from headwise.errors import HeadwiseError

SOURCES = ["RedPajamaCommonCrawl", "RedPajamaGithub", "RedPajamaC4", "RedPajamaBook", "RedPajamaWikipedia"]


@pytest.fixture(scope="module")
def records(prose: str) -> list[dict]:
    """900 documents of different lengths from five sources."""
    sizes = np.random.default_rng(1).integers(1, 900, size=900)
    return [
        {"text": prose[i * 20 : i * 20 + size], "meta": {"redpajama_set_name": SOURCES[i % 5]}}
        for i, size in enumerate(sizes)
    ]


@pytest.fixture
def source(tmp_path: Path, records: list[dict]) -> Path:
    """The documents in two files: plain and packed."""
    folder = tmp_path / "source"
    folder.mkdir()
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    (folder / "a.jsonl").write_text("".join(lines[:500]))
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.writelines(lines[500:])
    return folder


Configure = Callable[..., PrepareConfig]


@pytest.fixture
def configure(source: Path, tokenizer_file: Path, tmp_path: Path) -> Configure:
    def make(**values) -> PrepareConfig:
        defaults = {
            "source": str(source),
            "tokenizer": str(tokenizer_file),
            "out": str(tmp_path / "out"),
            "length": 16,
            "shard_sequences": 200,
        }
        return PrepareConfig(**{**defaults, **values})

    return make


def rows(out: str | Path) -> np.ndarray:
    return np.concatenate([read_shard(path) for path in sorted(Path(out).glob("*.npz"))])


def contents(out: str | Path) -> dict[str, str]:
    files = [path for path in Path(out).iterdir() if not path.name.startswith(".")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def expected(records: list[dict], tokenizer_file: Path, wanted: set[str], length: int) -> np.ndarray:
    """The definition: each wanted document alone, whole sequences only."""
    tokenizer = load_tokenizer(str(tokenizer_file))
    kept = [r["text"] for r in records if r["meta"]["redpajama_set_name"] in wanted]
    cut = [
        ids[start : start + length]
        for ids in tokenizer.encode(kept)
        for start in range(0, len(ids) - length + 1, length)
    ]
    return np.array(cut)


def test_sequences_are_the_kept_documents_cut_without_overlap_or_padding(
    configure: Configure, records: list[dict], tokenizer_file: Path
) -> None:
    manifest = prepare(configure())
    wanted = {"RedPajamaCommonCrawl", "RedPajamaC4", "RedPajamaWikipedia"}
    made = rows(configure().out)
    assert made.dtype == np.int32
    assert (made == expected(records, tokenizer_file, wanted, 16)).all()
    assert manifest["sequences"] == len(made)
    assert {name for name, counts in manifest["sources"].items() if counts["kept"]} == wanted
    assert sum(counts["sequences"] for counts in manifest["sources"].values()) == len(made)
    assert all(counts["documents"] == 180 for counts in manifest["sources"].values())
    assert [shard["sequences"] for shard in manifest["shards"][:-1]] == [200] * (len(manifest["shards"]) - 1)


def test_the_manifest_describes_the_files(configure: Configure, tokenizer_file: Path) -> None:
    manifest = prepare(configure())
    found = contents(configure().out)
    assert found.pop("manifest.json")
    assert {shard["file"]: shard["sha256"] for shard in manifest["shards"]} == found
    tokenizer = load_tokenizer(str(tokenizer_file))
    assert manifest["vocab_size"] == tokenizer.vocab_size
    assert manifest["settings"]["tokenizer"]["checksum"] == tokenizer.checksum
    data = open_data(DataConfig(name="shards", path=configure().out, seq_len=16), seed=0)
    assert data.vocab_size == tokenizer.vocab_size


def test_sources_are_chosen_by_name(
    configure: Configure, records: list[dict], tokenizer_file: Path, tmp_path: Path
) -> None:
    for keep, drop, wanted in [
        (("books",), (), {"RedPajamaBook"}),
        (("all",), ("GitHub", "RedPajamaBook"), set(SOURCES) - {"RedPajamaGithub", "RedPajamaBook"}),
        (("all",), (), set(SOURCES)),
    ]:
        out = tmp_path / "-".join(keep + drop)
        prepare(configure(out=str(out), keep=keep, drop=drop))
        assert (rows(out) == expected(records, tokenizer_file, wanted, 16)).all()


@pytest.mark.parametrize("limit", [1, 200, 201, 333])
def test_max_sequences_takes_the_first(configure: Configure, tmp_path: Path, limit: int) -> None:
    prepare(configure())
    manifest = prepare(configure(out=str(tmp_path / "few"), max_sequences=limit))
    assert (rows(tmp_path / "few") == rows(configure().out)[:limit]).all()
    assert manifest["sequences"] == limit
    assert sum(counts["sequences"] for counts in manifest["sources"].values()) == limit


@pytest.mark.parametrize("shards", [1, 3])
def test_leaving_after_any_shard_and_going_on_gives_the_same_files(
    configure: Configure, tmp_path: Path, shards: int
) -> None:
    config = configure(shard_sequences=500)
    whole = prepare(config)
    other = configure(shard_sequences=500, out=str(tmp_path / "other"))
    left = 0
    while left < 20 and not (tmp_path / "other" / "manifest.json").exists():
        run = prepare_shards(other)
        left += len(list(islice(run, shards))) == shards
        run.close()
    assert left == len(whole["shards"]) // shards >= 2
    assert contents(tmp_path / "other") == contents(config.out)


def test_killed_it_goes_on_to_the_same_files(configure: Configure, tmp_path: Path) -> None:
    config = configure(shard_sequences=50)
    prepare(config)
    other = configure(shard_sequences=50, out=str(tmp_path / "other"))
    code = (
        "import json, sys; from headwise.data.prepare import PrepareConfig, prepare_shards\n"
        "for shard in prepare_shards(PrepareConfig(**json.loads(sys.argv[1]))): print(shard, flush=True)"
    )
    command = [sys.executable, "-c", code, json.dumps(asdict(other))]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        for _ in range(10):
            process.stdout.readline()
        process.kill()
    assert not (tmp_path / "other" / "manifest.json").exists()
    prepare(other)
    assert contents(tmp_path / "other") == contents(config.out)


def test_what_is_finished_is_not_done_again(configure: Configure) -> None:
    first = prepare(configure())
    before = {path: path.stat().st_mtime_ns for path in Path(configure().out).glob("*.npz")}
    assert prepare(configure()) == first
    assert {path: path.stat().st_mtime_ns for path in Path(configure().out).glob("*.npz")} == before


def test_another_preparation_in_the_folder_is_refused(configure: Configure, tmp_path: Path) -> None:
    run = prepare_shards(configure())
    next(run)
    with pytest.raises(HeadwiseError, match="another process prepares"):
        prepare(configure())
    run.close()
    with pytest.raises(HeadwiseError, match="unfinished preparation with length 16, not 8"):
        prepare(configure(length=8))
    prepare(configure())
    with pytest.raises(HeadwiseError, match="holds shards with max_sequences None, not 5"):
        prepare(configure(max_sequences=5))
    (tmp_path / "foreign").mkdir()
    np.savez(tmp_path / "foreign" / "x.npz", input_ids=np.zeros((2, 16), dtype=np.int32))
    with pytest.raises(HeadwiseError, match="holds other shards"):
        prepare(configure(out=str(tmp_path / "foreign")))


def test_parquet_gives_the_same_as_jsonl(configure: Configure, records: list[dict], tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    prepare(configure())
    table = pa.Table.from_pylist([{**record, "other": i} for i, record in enumerate(records)])
    pq.write_table(table, tmp_path / "all.parquet", row_group_size=70)
    other = configure(source=str(tmp_path / "all.parquet"), out=str(tmp_path / "parquet"))
    run = prepare_shards(other)
    next(run)
    run.close()  # resumes within a row group
    prepare(other)
    assert (rows(tmp_path / "parquet") == rows(configure().out)).all()


def test_text_has_no_sources_and_is_kept(
    configure: Configure, tmp_path: Path, prose: str, tokenizer_file: Path
) -> None:
    path = tmp_path / "prose.txt"
    path.write_text(prose * 20)  # more than one piece
    manifest = prepare(configure(source=str(path), out=str(tmp_path / "text")))
    tokenizer = load_tokenizer(str(tokenizer_file))
    decoded = "".join(tokenizer.token(int(i)) for i in rows(tmp_path / "text")[0])
    assert prose.startswith(decoded.rstrip("�"))
    assert list(manifest["sources"]) == ["text"]
    assert manifest["sources"]["text"]["documents"] == -(-len((prose * 20).encode()) // 2**20)


def test_special_tokens_in_a_document_are_plain_text(configure: Configure, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "<pad> " * 200}) + "\n")
    prepare(configure(source=str(path), out=str(tmp_path / "pads"), keep=("all",)))
    assert (rows(tmp_path / "pads") != 0).all()


def test_input_that_cannot_be_used_is_refused(configure: Configure, tmp_path: Path) -> None:
    (tmp_path / "fields.jsonl").write_text('{"body": "a", "id": 1}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "a", "meta": {"redpajama_set_name": "C4"}}\n{"tex')
    (tmp_path / "number.jsonl").write_text('{"text": 5}\n')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 999)[:-20])
    (tmp_path / "latin.txt").write_bytes("größe\n".encode("latin-1"))
    (tmp_path / "short.txt").write_text("word\n")
    (tmp_path / "nothing").mkdir()
    for name, values, says in [
        ("missing.jsonl", {}, "does not exist"),
        ("nothing", {}, "has no files"),
        ("fields.jsonl", {}, r"record 1 of .* has no field 'text' .it has body, id.*--text-field$"),
        ("fields.jsonl", {"text_field": "body"}, r"no field 'meta.redpajama_set_name'.*--keep all"),
        ("number.jsonl", {"keep": ("all",)}, "has int instead of a text"),
        ("broken.jsonl", {}, "line 2 of .* is not a JSON record"),
        ("broken.parquet", {}, "cannot be read"),
        ("cut.jsonl.gz", {"keep": ("all",)}, "cannot be read"),
        ("latin.txt", {}, "is not UTF-8"),
        ("short.txt", {}, "no sequence of 16 tokens was made: sources seen: text"),
        ("short.txt", {"length": 0}, "--length 0"),
        ("short.txt", {"keep": ()}, "--keep names no source"),
        ("short.txt", {"tokenizer": str(tmp_path / "none.json")}, "tokenizer .* does not exist"),
    ]:
        out = str(tmp_path / f"out-{name}-{len(values)}")
        with pytest.raises(HeadwiseError, match=says) as caught:
            prepare(configure(source=str(tmp_path / name), out=out, **values))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hugging_face_dataset_gives_the_same_as_its_files(
    configure: Configure, source: Path, tokenizer_file: Path, tmp_path: Path, streaming: bool
) -> None:
    pytest.importorskip("datasets")
    from headwise.data.documents import Fields, Files, HubDataset

    fields = Fields()
    files = Files(sorted(source.iterdir()), source, fields)
    hub = HubDataset(str(source), fields, None, "train", streaming, tmp_path / "hf")
    texts = [document.text for document in files.read((0, 0))]
    assert [document.text for document in hub.read((0, 0))] == texts
    third = next(islice(hub.read((0, 0)), 2, 3))
    assert next(hub.read(third.next)).text == texts[3]
    assert hub.identity()["rows"] == (None if streaming else 900)


def overwrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a file's content, and neither its size nor its time."""
    before, stat = path.read_bytes(), path.stat()
    path.write_bytes(change(before))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == len(before)
    assert path.read_bytes() != before


def test_a_source_edited_in_place_is_another_source(configure: Configure, source: Path) -> None:
    prepare(configure())
    assert prepare(configure())["sequences"]  # nothing has changed
    overwrite(source / "a.jsonl", lambda text: text.replace(b" the ", b" eht ", 1))
    with pytest.raises(HeadwiseError, match=r"holds shards of another a\.jsonl: its content differs"):
        prepare(configure())


def test_an_unfinished_preparation_of_a_source_edited_in_place_is_not_continued(
    configure: Configure, source: Path
) -> None:
    next(prepare_shards(configure()))
    overwrite(source / "a.jsonl", lambda text: text.replace(b" the ", b" eht ", 1))
    with pytest.raises(HeadwiseError, match=r"an unfinished preparation of another a\.jsonl"):
        prepare(configure())


@pytest.mark.parametrize("finished", [True, False])
def test_shards_that_changed_are_not_taken_for_finished(configure: Configure, finished: bool) -> None:
    shards = prepare_shards(configure())
    first = next(shards)
    if finished:
        list(shards)
    shards.close()
    right = first.read_bytes()
    overwrite(first, lambda content: content[:2000] + bytes([content[2000] ^ 1]) + content[2001:])
    with pytest.raises(HeadwiseError, match=r"shard_00000\.npz has changed since it was written"):
        prepare(configure())
    first.unlink()
    with pytest.raises(HeadwiseError, match=r"shard_00000\.npz is missing"):
        prepare(configure())
    first.write_bytes(right)
    assert prepare(configure())["sequences"]


def test_a_manifest_that_knows_only_sizes_proves_nothing(configure: Configure, source: Path) -> None:
    manifest = prepare(configure())
    sizes = {name: (source / name).stat().st_size for name in manifest["settings"]["input"]["files"]}
    manifest["settings"]["input"]["files"] = sizes
    (Path(configure().out) / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(HeadwiseError, match="holds shards of an older version, which noted the sizes"):
        prepare(configure())
