"""The one reader: what it takes is what was written, and what it refuses is one sentence, soon."""

import contextlib
import io
import json
import math
import os
import socket
import struct
import time
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from headwise import reading
from headwise.reading.csvfile import parse_csv

TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"]), max_size=12)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=20,
)


@pytest.fixture
def soon():
    """Whatever is refused is refused soon."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 5


def refused(read, *arguments, **options) -> str:
    """The one sentence that `read` refuses with."""
    with pytest.raises(reading.Unreadable) as raised:
        read(*arguments, **options)
    message = str(raised.value)
    assert message.splitlines() == [message]
    assert len(message) < 600
    return message


@given(PLAIN)
def test_json_is_read_as_it_was_written(value):
    assert reading.parse_json(json.dumps(value)) == value


@given(PLAIN)
def test_yaml_is_read_as_it_was_written(value):
    shared = {"first": value, "second": [value, value]}
    assert reading.parse_yaml(reading.to_yaml(shared)) == shared


NUMBER_LIKE = r"[-+]?[0-9._]*(e[-+]?[0-9]+)?|0[xob]?[0-9a-f_]*|[0-9]+(:[0-9]+)+|(on|No|null|~|=|<<)"


@given(st.from_regex(NUMBER_LIKE, fullmatch=True))
def test_text_that_looks_like_something_else_stays_text(text):
    assert reading.parse_yaml(reading.to_yaml({text: text})) == {text: text}


@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda t: t.encode("utf-8", "surrogatepass")))
def test_no_bytes_end_in_a_traceback(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "file"
    path.write_bytes(content)

    def arrays(path):
        with reading.Arrays.open(path) as found:
            return [found.read(name) for name in found.headers]

    for read in (
        reading.read_json, reading.read_yaml, reading.read_csv, reading.read_tensor_headers,
        reading.parquet_columns, arrays,
    ):  # fmt: skip
        with contextlib.suppress(reading.Unreadable):
            read(path)


def test_only_regular_files_are_opened(tmp_path, soon):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as served:
        served.bind(str(tmp_path / "socket"))
        (tmp_path / "folder").mkdir()
        (tmp_path / "circle").symlink_to(tmp_path / "circle")
        names = ["pipe", "socket", "folder", "circle", "a" * 300, "nul\0"]
        for path in [*(tmp_path / name for name in names), "/dev/zero", "/dev/tty"]:
            refused(reading.read_bytes, path, limit=10)
            refused(reading.parquet_columns, path)
    with pytest.raises(reading.Missing):
        reading.read_json(tmp_path / "nothing")
    (tmp_path / "file").write_bytes(b"12345")
    with pytest.raises(reading.Missing):
        reading.read_json(tmp_path / "file" / "below")
    assert reading.read_bytes(tmp_path / "file", limit=5) == b"12345"
    assert "larger" in refused(reading.read_bytes, tmp_path / "file", limit=4)


@pytest.mark.parametrize(
    ("open_", "close"), [("[", "]"), ('{"a":', "}"), ("[" * 40 + "{'x': ", "}" + "]" * 40)]
)
@pytest.mark.parametrize("times", [100, 5_000, 100_000])
def test_depth_is_bounded(open_, close, times, soon):
    for text in (open_ * times + "1" + close * times, open_ * times):
        refused(reading.parse_yaml, text[: 1 << 20])
        if "'" not in text:
            refused(reading.parse_json, text)


@pytest.mark.parametrize("text", [
    '{"a": 1, "a": 2}', '{"b": {"a": 1, "c": 3, "a": 2}}', "1" * 5_000, '{"a": 1e999}', "[" * 3 + "]", "",
    '"\\ud800"', '{"\\udfff": 1}', "{'a': 1}", "[1,]", "nul", '{"a": ' + "9" * 41 + "}",
])  # fmt: skip
def test_json_that_is_refused(text):
    refused(reading.parse_json, text)


def test_what_python_writes_for_json_is_read_where_it_may_be():
    assert math.isnan(reading.parse_json("[NaN, -Infinity]")[0])
    assert "NaN" in refused(reading.parse_json, "[NaN]", finite=True)


LAUGH = ", ".join(["*{0}"] * 9)
LAUGHS = "\n".join(
    f"{b}: &{b} [{', '.join([a] * 9)}]" for a, b in zip("xabcdefghi", "abcdefghij", strict=True)
)
LAUGHS = LAUGHS.replace("[", "[*").replace(", ", ", *").replace("*x", "x")


@pytest.mark.parametrize("text", [
    LAUGHS, "&a [*a]", "a: &a {b: *a}", "a: &a b\n*a : 1", "*a",
    "x: !!python/object/apply:os.system [id]", "!foo 1", "a: !!set {b}",
    "a: 1\na: 2", "a:\n  b: 1\n  c: 2\n  b: 3", "1: 2", "off: 1", "null: 1", "[a]: 1", "{a: 1}: 2",
    "? [x]\n: 1",
    "a: 1\n---\nb: 2", "<<: {a: 1}", "a: " + "9" * 5_000, "a: [1", "\x07", "a: 0b_",
    "@", "- a\nb: 1", "a" * (1 << 21), "[" + "a," * 300_000 + "]", "%YAML 9.9\n---\na: 1" * 2,
])  # fmt: skip
def test_yaml_that_is_refused(text, soon):
    refused(reading.parse_yaml, text)


@pytest.mark.parametrize(("text", "value"), [
    ("1e-3", 1e-3), ("1.5e3", 1500.0), ("1E+2", 100.0), ("-.5", -0.5), (".inf", math.inf),
    ("2026-11-28", "2026-11-28"), ("'1'", "1"), ("on", True), ("~", None), ("", None), ("0x1f", 31),
    ("1_000", 1000), ("a: {b: [c, 1]}", {"a": {"b": ["c", 1]}}), ("--- x", "x"),
    ("a: &a [1]\nb: [*a, *a]", {"a": [1], "b": [[1], [1]]}), ("[&a x, &a y, *a]", ["x", "y", "y"]),
    (".", "."), ("1:30", "1:30"), ("1:30.5", "1:30.5"), ("._", "._"), ("=", "="), ("<<", "<<"),
])  # fmt: skip
def test_yaml_that_is_read(text, value):
    assert reading.parse_yaml(text) == value


@pytest.mark.parametrize(
    "text", ["a,a\n1,2\n", "a,b\n1\n", "a,b\n1,2,3\n", 'a,b\n"1,2\n', "b\n1\n", "", 'a,b\n1,"x"y\n']
)
def test_csv_that_is_refused(text):
    refused(parse_csv, text, ["a"])


def test_csv_cells_are_bounded():
    refused(parse_csv, "a\n" + "x" * 200_000)


def npz(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    raw = header.encode("latin-1")
    return (
        b"\x93NUMPY" + version + struct.pack("<H" if version == b"\x01\x00" else "<I", len(raw)) + raw + data
    )


def zipped(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file.getvalue()


HEADER = "{{'descr': {}, 'fortran_order': False, 'shape': {}, }}"


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("content", [
    zipped([("a.npy", npy(HEADER.format("'<i4'", (1 << 50, 2)), b"\0" * 8))]),
    zipped([("a.npy", npy(HEADER.format("'<i4'", (-1, 2)), b"\0" * 8))]),
    zipped([("a.npy", npy(HEADER.format("'<i4'", (True, 2)), b"\0" * 8))]),
    zipped([("a.npy", npy(HEADER.format("'|O'", (1,)), b"\0" * 8))]),
    zipped([("a.npy", npy(HEADER.format("[('x', '<i4')]", (1,)), b"\0" * 4))]),
    zipped([("a.npy", npy("(" * 5_000, b""))]),
    zipped([("a.npy", npy("x" * 60_000, b"", b"\x02\x00"))]),
    zipped([("a.npy", npy(HEADER.format("'<i4'", (2,)), b"\0" * 8, b"\x09\x09"))]),
    zipped([("a.npy", b"")]),
    zipped([("a.npy", npy(HEADER.format("'<i4'", (2,)), b"\0" * 8))] * 2),
    zipped([("a.npy", npy(HEADER.format("'<i4'", (2,)), b"\0" * 8))], zipfile.ZIP_LZMA),
    zipped([("a.npy", npy(HEADER.format("'|i1'", (300 << 20,)), bytes(300 << 20)))]),  # a bomb
    zipped([("a", b"x")] * 1 + [(str(n), b"") for n in range(10_001)]),
    npz(a=np.arange(2000))[:-30],
    npz(a=np.arange(2000))[40:],
], ids=lambda content: str(len(content)))  # fmt: skip
def test_archives_that_lie_are_refused(tmp_path, content, soon):
    path = tmp_path / "a.npz"
    path.write_bytes(content)

    def read(path):
        with reading.Arrays.open(path) as arrays:
            arrays.read("a")

    refused(read, path)


@given(st.data())
def test_a_changed_byte_of_an_archive_is_found_or_harmless(tmp_path_factory, data):
    rows = np.arange(300, dtype=np.int32).reshape(30, 10)
    content = bytearray(npz(a=rows, b=np.array(["x"])))
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    path.write_bytes(content)
    with contextlib.suppress(reading.Unreadable), reading.Arrays.open(path) as arrays:
        assert np.array_equal(arrays.read("a"), rows)


def test_arrays_are_read_as_they_were_written(tmp_path):
    arrays = {
        "a": np.arange(6).reshape(2, 3),
        "b": np.zeros(0),
        "c": np.float16(1.5),
        "s": np.array(["ä", "b"]),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    with reading.Arrays.open(tmp_path / "a.npz") as found:
        assert all(np.array_equal(found.read(name), value) for name, value in arrays.items())
        refused(found.read, "d")
        refused(found.read, "a", "f")
        refused(found.read, "a", "i", 3)


def test_headers_of_tensors_must_agree_with_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"x": np.zeros((2, 3), np.float32)}, path, {"k": "v"})
    assert reading.read_tensor_headers(path) == ({"x": ("F32", (2, 3))}, {"k": "v"})
    for header in (
        b"[]", b'{"x": 1}', b'{"x": {"dtype": "F32", "shape": [9, 9], "data_offsets": [0, 24]}}',
        b'{"x": {"dtype": "F32", "shape": [-2, -3], "data_offsets": [0, 24]}}',
        b'{"x": {"dtype": "F32", "shape": [2, 3], "data_offsets": [24, 48]}}',
        b'{"x": {"dtype": "F32", "shape": "23", "data_offsets": [0, 24]}}', b'{"__metadata__": {"a": 1}}',
        b"[" * 5_000,
    ):  # fmt: skip
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(24))
        refused(reading.read_tensor_headers, path)
    path.write_bytes((1 << 62).to_bytes(8, "little") + b"{}")
    refused(reading.read_tensor_headers, path)


def test_tables_must_have_their_columns(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"layer": [1], "x": [1.5], "t": ["a"]}), path)
    assert reading.parquet_columns(path) == {"layer": "integer", "x": "float", "t": "text"}
    assert "'head'" in refused(reading.parquet_columns, path, {"head": "integer"})
    assert "not float" in refused(reading.parquet_columns, path, {"layer": "float"})
    pq.write_table(pa.table([[1], [2]], ["a", "a"]), path)
    refused(reading.parquet_columns, path)
    pq.write_table(pa.table({"a": pa.repeat(pa.scalar(1), 30_000_000)}), path)
    assert "rows" in refused(reading.parquet_columns, path)
