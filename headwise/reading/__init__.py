"""Every file that headwise reads back goes through here: regular, bounded, and of the types it should have.

    opening   a regular file's bytes or text, its size known before anything is read
    values    JSON and YAML, bounded in depth, then held against a schema
    csvfile   rows of a CSV file with the columns they must have
    arrays    arrays of an .npz file, whose headers must agree with the archive before memory is taken
    tensors   what a safetensors file holds, by its header
    tables    what a Parquet file holds, by its footer

Whatever is wrong with a file is an `Unreadable`: one sentence with the path and the reason. A schema is a
TypedDict, a dataclass or a msgspec Struct beside the code that writes the file. Keys that a schema does not
name are left alone, so that a newer headwise may add some.
"""

from headwise.reading.arrays import Arrays
from headwise.reading.csvfile import read_csv
from headwise.reading.opening import Missing, Unreadable, must_be_regular, opened, read_bytes, read_text
from headwise.reading.panics import first_line, is_panic
from headwise.reading.tables import library_problems, parquet_columns
from headwise.reading.tensors import TensorHeader, read_tensor_headers
from headwise.reading.values import check, parse_json, parse_yaml, read_json, read_yaml, to_yaml

__all__ = [
    "Arrays", "Missing", "TensorHeader", "Unreadable", "check", "first_line", "is_panic",
    "library_problems", "must_be_regular", "opened", "parquet_columns", "parse_json",
    "parse_yaml", "read_bytes", "read_csv", "read_json", "read_tensor_headers", "read_text",
    "read_yaml", "to_yaml",
]  # fmt: skip
