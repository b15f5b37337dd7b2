"""What is data in a folder: not what headwise wrote there, nor what links lead to. Refusals leave nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headwise.config.run import from_dict, to_yaml
from headwise.data.config import DataConfig
from headwise.data.documents import Fields, open_documents
from headwise.data.open_text import open_path
from headwise.data.prepare import PrepareConfig, prepare
from headwise.data.shards import shard_files
from headwise.data.text import Text, split_90_5_5
from headwise.data.tokenizer import ByteTokenizer, tokenised
from headwise.data.wikitext import open_wikitext
from headwise.errors import HeadwiseError
from headwise.runs.folder import RunFolder
from headwise.training.run import train


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "more").mkdir(parents=True)
    (folder / "a.txt").write_text("first words of a text\n" * 40)
    (folder / "more" / "b.txt").write_text("second words\n" * 40)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def read(folder: Path, tmp_path: Path) -> list[bytes]:
    """The text of a folder, in the ways that it is read."""
    documents = open_documents(str(folder), Fields())
    config = DataConfig(name="wikitext103", path=str(folder), cache=str(tmp_path / "cache"))
    parts = open_wikitext(config).splits
    return [
        open_path(folder, tmp_path / "cache")[0].tobytes(),
        "".join(document.text for document in documents.read((0, 0))).encode(),
        b"".join(part.tobytes() for part in parts.values()),
    ]


def test_what_headwise_wrote_is_not_data(folder: Path, tmp_path: Path) -> None:
    before = read(folder, tmp_path)
    run = RunFolder(folder / "runs" / "study" / "flash" / "seed_0")
    run.start(to_yaml(from_dict({"training.max_steps": 1})))
    run.say("started")
    run.write_status("failed")
    (folder / "runs" / "study" / "study.yaml").write_text("name: study\nvariants:\n  flash: {}\nseeds: [0]\n")
    (folder / "runs" / "study" / "report.md").write_text("# a report\n")
    (folder / "beginning").mkdir()
    RunFolder(folder / "beginning").write_status("failed")
    prepare(PrepareConfig(str(folder / "a.txt"), "bytes", str(folder / "shards"), keep=("all",), length=8))
    assert read(folder, tmp_path) == before
    (folder / "config.yaml").write_text("training: of a dog\n")  # somebody else's
    assert all(len(now) > len(then) for now, then in zip(read(folder, tmp_path), before, strict=True))


def test_the_cache_in_a_folder_of_data_is_not_data(folder: Path) -> None:
    cache = folder / "cache"
    first = open_path(folder, cache)[0].tobytes()
    assert names(cache)
    assert open_path(folder, cache)[0].tobytes() == first


@pytest.mark.parametrize("out", ["run", "more/runs/a"])
def test_a_run_inside_its_own_data_is_resumed(folder: Path, tmp_path: Path, out: str) -> None:
    tiny = {
        "model.d_model": 16, "model.n_layers": 1, "model.n_heads": 2, "data.name": "text",
        "data.path": str(folder), "data.cache": str(tmp_path / "cache"), "data.seq_len": 8,
        "data.batch_size": 2, "training.max_steps": 2, "training.warmup_steps": 1, "measure.heads": False,
        "measure.maps": 0, "device": "cpu", "out": str(folder / out),
    }  # fmt: skip
    config = from_dict(tiny)
    train(config)
    RunFolder(folder / out).write_status("interrupted")
    assert train(config, resume=True)["state"] == "finished"


def test_shards_are_prepared_inside_their_own_source(folder: Path) -> None:
    config = PrepareConfig(str(folder), "bytes", str(folder / "shards"), keep=("all",), length=8)
    assert prepare(config) == prepare(config)


@pytest.mark.parametrize("link", ["secret.txt", "more/secret.txt", "secret.npz"])
def test_a_link_out_of_a_folder_of_data_is_refused_by_name(folder: Path, tmp_path: Path, link: str) -> None:
    (tmp_path / "secret").write_text("secret\n")
    (folder / link).symlink_to(tmp_path / "secret")
    with pytest.raises(HeadwiseError, match=rf"has a link '{link}' that leads out of it"):
        shard_files(folder) if link.endswith(".npz") else read(folder, tmp_path)


def test_a_link_inside_a_folder_of_data_is_read(folder: Path, tmp_path: Path) -> None:
    (folder / "c.txt").symlink_to("a.txt")
    assert all(text.count(b"first") == 80 for text in read(folder, tmp_path))


@pytest.mark.parametrize("pattern", ["", "/etc/*", "../*", "a/../../*"])
def test_a_pattern_stays_in_its_folder(folder: Path, pattern: str) -> None:
    with pytest.raises(HeadwiseError, match="--pattern"):
        open_documents(str(folder), Fields(), pattern=pattern)


def test_a_name_that_is_not_utf_8_is_read(folder: Path, tmp_path: Path) -> None:
    (folder / "r\udcff.txt").write_text("third\n")
    assert all(b"third" in text for text in read(folder, tmp_path))


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("fault", ["too short", "no such source", "half a character", "not JSON"])
def test_a_refused_preparation_leaves_nothing(tmp_path: Path, fault: str, exists: bool) -> None:
    record = {"text": "some words", "meta": {"redpajama_set_name": "C4"}}
    record["text"] = "\ud83d" if fault == "half a character" else record["text"]
    line = "{" if fault == "not JSON" else json.dumps(record)
    source, out = tmp_path / "a.jsonl", tmp_path / "new" / "out"
    source.write_text(f"{line}\n")
    if exists:
        out.mkdir(parents=True)
    keep = ("Wikipedia",) if fault == "no such source" else ("C4",)
    length = 512 if fault == "too short" else 2
    with pytest.raises(HeadwiseError):
        prepare(PrepareConfig(str(source), "bytes", str(out), keep=keep, length=length))
    assert names(tmp_path) == (["a.jsonl", "new", "new/out"] if exists else ["a.jsonl"])


@pytest.mark.parametrize("text", ["\ud800", "fine \udfff", "a\ud83d"])
def test_half_a_character_names_file_and_record(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": t}) for t in ("whole 😀", text)) + "\n")
    with pytest.raises(HeadwiseError, match=r"record 2 of .*a\.jsonl has half of a character"):
        list(open_documents(str(path), Fields(source=None)).read((0, 0)))


def test_each_way_of_splitting_a_text_has_tokens_of_its_own(tmp_path: Path, folder: Path) -> None:
    whole = open_path(folder, tmp_path)[0]
    ways = [{"all": whole}, split_90_5_5(whole), {"train": whole[:9], "val": whole[9:20], "test": whole[20:]}]
    for splits in [*ways, *ways]:
        tokens, sizes = tokenised(Text(splits), ByteTokenizer(), tmp_path / "cache")
        assert {name: part.tobytes() for name, part in tokens.items()} == {
            name: part.astype(tokens[name].dtype).tobytes() for name, part in splits.items()
        }
        assert sizes == {name: len(part) for name, part in splits.items()}
    assert [name for name in names(tmp_path / "cache") if "lock" in name or "draft" in name] == []
