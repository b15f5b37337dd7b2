"""A configuration that cannot work is refused with one line that quotes it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from headwise.data.config import DataConfig
from headwise.errors import HeadwiseError


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"name": "enwik9"}, "did you mean 'enwik8'"),
        ({"seq_len": 1}, "data.seq_len is 1"),
        ({"batch_size": 0}, "data.batch_size is 0"),
        ({"num_workers": -1}, "data.num_workers is -1"),
        ({"bytes": 0}, "data.bytes is 0"),
        ({"eval_fraction": 0.0}, "data.eval_fraction=0.0"),
        ({"name": "wikitext103", "fraction": 1.5}, "data.fraction=1.5"),
        ({"fraction": 0.5}, "data.bytes limits"),
        ({"name": "text"}, "needs data.path"),
        ({"name": "shards"}, "needs data.path"),
        ({"path": "x"}, "no meaning for data.name=pystdlib"),
        ({"name": "copy", "bytes": 5}, "no meaning for data.name=copy"),
        ({"name": "copy", "tokenizer": "gpt2"}, "no meaning for data.name=copy"),
        ({"vocab_size": 12}, "no meaning for data.name=pystdlib"),
        ({"eval_seq_lens": [64, 1]}, "data.eval_seq_lens is 1"),
        ({"name": "copy", "vocab_size": 1}, "data.vocab_size is 1"),
        ({"name": "ngram", "ngram_order": 4}, "65536 contexts"),
        ({"name": "ngram", "ngram_branching": 300}, "data.ngram_branching=300"),
    ],
)
def test_nonsense_is_refused(values: dict, says: str) -> None:
    with pytest.raises(HeadwiseError, match=says.replace("(", r"\(")) as caught:
        DataConfig(**values).validate()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["pystdlib", "copy", "repeat", "ngram", "enwik8", "wikitext103"])
def test_each_name_is_enough(name: str) -> None:
    DataConfig(name=name).validate()


def test_reading_a_configuration_does_not_import_torch() -> None:
    code = "import sys, headwise.data.config, headwise.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(("length", "batch"), [(64, 8), (128, 4), (32, 16), (100, 5), (5000, 1)])
def test_a_batch_at_another_length_holds_as_many_tokens(length: int, batch: int) -> None:
    assert DataConfig(seq_len=64, batch_size=8).batch_size_at(length) == batch
