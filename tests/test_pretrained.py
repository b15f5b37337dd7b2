"""No load of a checkpoint or a tokenizer runs code of its folder, whatever stands on standard input."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from headwise.cli.main import main
from headwise.data.tokenizer import load_tokenizer
from headwise.errors import HeadwiseError
from headwise.watch.effect import load_speaker
from headwise.watch.load import load

SIZES = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "vocab_size": 300, "pad_token_id": 0,
}  # fmt: skip
MODELLING = """
from pathlib import Path
Path({marker!r}).write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaModel):
    config_class = OwnConfig
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {
    "AutoConfig": "modeling_own.OwnConfig",
    "AutoModel": "modeling_own.OwnModel",
    "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
}
TOKENIZER_MAP = {"auto_map": {"AutoTokenizer": [None, "modeling_own.OwnTokenizer"]}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama whose folder has a module that leaves a file behind when it runs; "y" on standard input."""
    copied = tmp_path / "model"
    copied.mkdir()
    for file in saved.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    (copied / "modeling_own.py").write_text(MODELLING.format(marker=str(tmp_path / "marker")))
    (tmp_path / "text.txt").write_text("some text to read, " * 200)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 50))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return copied


def change(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


def own(folder: Path) -> Path:
    change(folder / "config.json", model_type="own", architectures=["OwnForCausalLM"], auto_map=AUTO_MAP)
    return folder


VERBS = ("profile", "intervene")


def arguments(verb: str, folder: Path, *more: str) -> list[str]:
    """A short call of a verb on bytes."""
    what = ["--target-layer", "0", "--target-head", "1"] if verb == "intervene" else ["--no-atlas"]
    out = ["--out", str(folder.parent / "out"), "--device", "cpu", "--n-samples", "2"]
    data = ["--data", str(folder.parent / "text.txt"), "--context-length", "16", "--tokenizer", "bytes"]
    return [verb, str(folder), *what, *out, *data, *more]


@pytest.mark.parametrize("verb", VERBS)
def test_a_model_with_code_of_its_own_is_refused_and_the_flag_takes_it(
    folder: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(verb, own(folder))) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert re.search(r"needs code of its own \(auto_map.*modeling_own.*--trust-remote-code", said)
    marker = folder.parent / "marker"
    assert not marker.exists()
    assert not (folder.parent / "out").exists()
    assert main(arguments(verb, folder, "--trust-remote-code")) == 0
    assert marker.exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "own", "auto_map": {"AutoConfig": "modeling_own.OwnConfig"}},
        {"model_type": "own", "auto_map": {"AutoConfig": "somebody/else--modeling_own.OwnConfig"}},
        {"model_type": None, "auto_map": AUTO_MAP},
        {"attn_implementation": "somebody/kernel"},
        {"text_config": {"attn_implementation": {"": "somebody/kernel"}}},
        {"model_type": "llava", "text_config": {"model_type": "own", "auto_map": AUTO_MAP}},
        # known as a configuration, but without an AutoModel: transformers would prompt from deep inside
        {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"],
         "text_config": {"model_type": "kosmos_2_text_model", "auto_map": AUTO_MAP},
         "vision_config": {"model_type": "clip_vision_model", **SIZES, "image_size": 4, "patch_size": 2}},
    ],
)  # fmt: skip
def test_code_is_refused_wherever_the_configuration_names_it(folder: Path, changes: dict[str, Any]) -> None:
    change(folder / "config.json", **changes)
    for read in (load, load_speaker):
        with pytest.raises(HeadwiseError, match=r"needs code of its own .*--trust-remote-code") as caught:
            read(str(folder))
        assert "\n" not in str(caught.value)
    assert not (folder.parent / "marker").exists()


def test_a_known_architecture_is_read_by_transformers_own_class_with_a_word(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(folder / "config.json", auto_map=AUTO_MAP)
    assert type(load(str(folder)).model) is transformers.LlamaModel
    assert "modeling_own.OwnConfig), which is not run" in capsys.readouterr().err
    assert not (folder.parent / "marker").exists()


@pytest.mark.parametrize("with_file", [True, False])
@pytest.mark.parametrize("auto_map", [TOKENIZER_MAP["auto_map"], ["modeling_own.OwnTokenizer", None]])
def test_a_tokenizer_with_code_of_its_own_is_refused(folder: Path, with_file: bool, auto_map: Any) -> None:
    """Also where a tokenizer.json lies beside it: what the code adds to it is not known."""
    from headwise.model.export import byte_tokenizer

    byte_tokenizer().save_pretrained(folder)
    change(folder / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="OwnTokenizer")
    if not with_file:
        (folder / "tokenizer.json").unlink()
    with pytest.raises(HeadwiseError, match=r"tokenizer_config\.json: modeling_own\.OwnTokenizer.*--trust"):
        load_tokenizer(str(folder))
    assert not (folder.parent / "marker").exists()


def test_data_prepare_takes_a_tokenizers_code_with_the_flag_alone(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from headwise.model.export import byte_tokenizer

    byte_tokenizer().save_pretrained(folder)
    change(folder / "tokenizer_config.json", **TOKENIZER_MAP, tokenizer_class="OwnTokenizer")
    out = folder.parent / "shards"
    call = ["data", "prepare", str(folder.parent / "text.txt"), "--tokenizer", str(folder), "--out", str(out)]
    call += ["--keep", "all", "--length", "8"]
    assert main(call) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    assert not (folder.parent / "marker").exists()
    assert not out.exists()
    assert main([*call, "--trust-remote-code"]) == 0
    assert (folder.parent / "marker").exists()


def test_a_chat_template_and_a_generate_of_its_own_are_not_run(folder: Path) -> None:
    from headwise.model.export import byte_tokenizer

    byte_tokenizer().save_pretrained(folder)
    evil = "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ raise_exception('ran') }}"
    change(folder / "tokenizer_config.json", chat_template=evil)
    (folder / "chat_template.jinja").write_text(evil)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text((folder / "modeling_own.py").read_text())
    load_speaker(str(folder))
    assert load_tokenizer(str(folder)).encode(["ab"]) == [[97, 98]]
    (folder / "tokenizer.json").rename(folder / "moved")
    assert not (folder.parent / "marker").exists()


@pytest.mark.parametrize("read", [load, load_speaker])
def test_pickled_weights_are_refused(folder: Path, read: Any) -> None:
    torch.save({"x": torch.ones(2)}, folder / "pytorch_model.bin")
    read(str(folder))  # safetensors lie beside it
    (folder / "model.safetensors").unlink()
    with pytest.raises(HeadwiseError, match=r"pytorch_model\.bin, which would have to be unpickled"):
        read(str(folder))
