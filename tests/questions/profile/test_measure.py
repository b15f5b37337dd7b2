"""A profile's table: right, resumable at any point, shared between processes, and never mixed."""

from __future__ import annotations

import errno
import filecmp
import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from scipy import stats

from headwise.config.run import Config
from headwise.errors import HeadwiseError
from headwise.measures import table as head_table
from headwise.measures.moments import Moments, gather, merge, spearman
from headwise.model.config import ModelConfig
from headwise.model.decoder import Decoder
from headwise.questions.profile.config import ProfileConfig
from headwise.questions.profile.measure import Profile, Share
from headwise.watch import watch
from headwise.watch.load import Loaded, load
from headwise.watch.samples import Samples, Source, open_samples

CONFIG = ProfileConfig(n_samples=7, context_length=12, samples_per_part=2)


@pytest.fixture(scope="module")
def loaded(hf_model) -> Loaded:
    model = hf_model("llama").model
    return Loaded("llama", model, None, lambda ids: model(input_ids=ids, use_cache=False))


@pytest.fixture(scope="module")
def samples() -> Samples:
    tokens = np.random.default_rng(0).integers(1, 64, (1, 100))
    return Samples(tokens, np.arange(7), 12, {"name": "random"})


@pytest.fixture(scope="module")
def finished(loaded, samples, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("profile") / "out"
    Profile(out, CONFIG).run(loaded, samples, batch_size=2)
    return out


def table(out: Path) -> dict[str, np.ndarray]:
    found = pq.read_table(out / "heads")
    return {name: found[name].to_numpy() for name in found.column_names if name not in ("run", "step")}


def test_the_table_is_what_a_watch_measures(finished, loaded, samples):
    with torch.no_grad(), watch(loaded.model, scores="pre_rope", per_token=True) as seen:
        for first in range(0, 7, 2):
            loaded.forward(samples.batch(first, first + 2))
    expected = seen.columns()
    got = table(finished)
    assert list(got) == list(expected)
    for name, column in expected.items():
        np.testing.assert_array_equal(got[name], column, err_msg=name)
    assert len(got["layer"]) == 7 * 2 * 4 * 12


def test_per_head_means_and_correlations(finished):
    got = table(finished)
    per_head = np.genfromtxt(finished / "per_head.csv", delimiter=",", names=True)
    assert len(per_head) == 8
    later = got["token"] >= 2
    for row in per_head:
        of_head = (got["layer"] == row["layer"]) & (got["head"] == row["head"])
        np.testing.assert_allclose(row["k_eff"], got["k_eff"][of_head].mean(dtype=float), rtol=1e-6)
        np.testing.assert_allclose(
            row["entropy"], np.nanmean(got["entropy"][of_head].astype(float)), rtol=1e-6
        )
        x = got["query_norm"][of_head & later]
        for name in ("entropy", "max_weight", "k_eff"):
            y = got[name][of_head & later]
            assert row[f"pearson_{name}"] == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-6)
            assert row[f"spearman_{name}"] == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-6)


@pytest.mark.parametrize("killed_after", [0, 1, 3])
def test_an_interrupted_profile_ends_as_an_uninterrupted_one(
    killed_after, finished, loaded, samples, tmp_path
):
    def stop(tokens: int) -> None:
        done.append(tokens)
        if len(done) > killed_after:
            raise KeyboardInterrupt

    done: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        Profile(tmp_path / "out", CONFIG).run(loaded, samples, batch_size=2, advance=stop)
    parts = [path.name for path in (tmp_path / "out" / "heads").glob("*")]
    assert parts == [f"part_{n:06d}.parquet" for n in range(killed_after)] or len(parts) <= killed_after
    assert not (tmp_path / "out" / "summary.json").exists()
    Profile(tmp_path / "out", CONFIG).run(loaded, samples, batch_size=2)
    same(finished, tmp_path / "out")


def test_parts_smaller_than_a_batch_are_measured_together(finished, loaded, samples, tmp_path):
    done: list[int] = []
    whole, resumed = Profile(tmp_path / "whole", CONFIG), Profile(tmp_path / "resumed", CONFIG)
    whole.run(loaded, samples, batch_size=5, advance=done.append)
    assert done == [4 * 12, 3 * 12]  # contexts of two parts at once
    got, expected = table(tmp_path / "whole"), table(finished)
    for name, column in expected.items():
        np.testing.assert_allclose(got[name], column, rtol=1e-5, atol=1e-6, err_msg=name)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    (tmp_path / "resumed" / "heads" / "part_000001.parquet").unlink()
    (tmp_path / "resumed" / "heads" / "part_000003.parquet").unlink()
    done.clear()
    summary = resumed.run(loaded, samples, batch_size=5, advance=done.append)
    assert (summary["parts_measured"], done) == (2, [2 * 12, 12])
    same(tmp_path / "whole", tmp_path / "resumed")


def test_what_is_lost_is_made_again(finished, loaded, samples, tmp_path):
    for lost in ("heads/part_000001.parquet", "heads", "per_head.csv"):
        out = tmp_path / lost.replace("/", "_")
        shutil.copytree(finished, out)
        (shutil.rmtree if (out / lost).is_dir() else Path.unlink)(out / lost)
        Profile(out, CONFIG).run(loaded, samples, batch_size=2)
        same(finished, out)


def test_processes_share_the_parts(finished, loaded, samples, tmp_path):
    class Done(Exception):
        pass

    def wait() -> None:
        waits.append(profile.missing())
        if len(waits) == 3:  # claimed, counted, measured: now the others are waited for
            raise Done

    waits: list[list[int]] = []
    profile = Profile(tmp_path / "out", CONFIG)
    profile._claim(loaded, samples, Share())
    with pytest.raises(Done):
        profile.run(loaded, samples, batch_size=2, share=Share(1, 2, wait))
    assert waits == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 2]]
    profile.run(loaded, samples, batch_size=2)
    same(finished, tmp_path / "out")


def same(one: Path, other: Path) -> None:
    names = sorted(path.relative_to(one).as_posix() for path in one.rglob("*.parquet"))
    assert names == sorted(path.relative_to(other).as_posix() for path in other.rglob("*.parquet"))
    for name in [*names, "per_head.csv", "profile.json"]:
        assert filecmp.cmp(one / name, other / name, shallow=False), name


def test_another_configuration_is_refused(finished, loaded, samples, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished, out)
    other = ProfileConfig(n_samples=7, context_length=12, samples_per_part=2, scores="post_rope")
    with pytest.raises(HeadwiseError, match="holds a profile with scores 'pre_rope', not 'post_rope'"):
        Profile(out, other).run(loaded, samples)
    elsewhere = Samples(samples.tokens, samples.chosen, 12, {"name": "other"})
    with pytest.raises(HeadwiseError, match=r"holds a profile with data\.name 'random', not 'other'"):
        Profile(out, CONFIG).run(loaded, elsewhere)
    (out / "profile.json").unlink()
    with pytest.raises(HeadwiseError, match="head table of something else"):
        Profile(out, CONFIG).run(loaded, samples)


def test_aggregated_rows_are_the_means_over_tokens(finished, loaded, samples, tmp_path):
    config = ProfileConfig(n_samples=7, context_length=12, samples_per_part=2, aggregate=True)
    Profile(tmp_path / "out", config).run(loaded, samples, batch_size=2)
    rows, every = table(tmp_path / "out"), table(finished)
    assert len(rows["layer"]) == 7 * 2 * 4
    assert all(token is None or np.isnan(token) for token in rows["token"])
    for name in ("entropy", "k_eff", "mean_distance"):
        values = every[name].reshape(-1, 12).astype(float)
        np.testing.assert_allclose(rows[name], np.nanmean(values, axis=1), rtol=1e-5)
    header = (tmp_path / "out" / "per_head.csv").read_text().splitlines()[0]
    assert "pearson_entropy" in header
    assert "spearman" not in header


def test_float16_measures_on_request(finished, loaded, samples, tmp_path):
    config = ProfileConfig(n_samples=7, context_length=12, samples_per_part=2, table_dtype="float16")
    Profile(tmp_path / "out", config).run(loaded, samples, batch_size=2)
    half, whole = table(tmp_path / "out"), table(finished)
    assert half["entropy"].dtype == np.float16
    np.testing.assert_allclose(half["max_weight"], whole["max_weight"], rtol=2**-10)
    np.testing.assert_array_equal(half["k_eff"], whole["k_eff"])


def test_raw_queries_keys_and_values_of_chosen_layers(loaded, samples, tmp_path):
    from safetensors.torch import load_file

    config = ProfileConfig(n_samples=3, context_length=12, samples_per_part=2, raw_layers=(1,))
    few = Samples(samples.tokens, samples.chosen[:3], 12, samples.identity)
    projected = []
    hook = loaded.model.layers[1].self_attn.q_proj.register_forward_hook(lambda m, a, y: projected.append(y))
    Profile(tmp_path / "out", config).run(loaded, few, batch_size=1)
    hook.remove()
    kept = [load_file(path) for path in sorted((tmp_path / "out" / "raw").glob("*"))]
    Profile(tmp_path / "at_once", config).run(loaded, few, batch_size=4)
    for path, part in zip(sorted((tmp_path / "at_once" / "raw").glob("*")), kept, strict=True):
        torch.testing.assert_close(load_file(path), part, rtol=1e-5, atol=1e-5)
    assert [sorted(part) for part in kept] == [["layer_01.k", "layer_01.q", "layer_01.v"]] * 2
    assert kept[0]["layer_01.k"].shape == (2, 2, 12, 8)
    q = torch.cat([part["layer_01.q"] for part in kept])
    expected = torch.cat(projected).view(3, 12, 4, 8).transpose(1, 2)
    torch.testing.assert_close(q, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(HeadwiseError, match="--raw-layers 9 is not there: layers go from 0 to 1"):
        Profile(tmp_path / "other", ProfileConfig(raw_layers=(9,))).run(loaded, samples)
    assert not (tmp_path / "other" / "profile.json").exists()


def test_nan_weights_are_measured_and_said_once(hf_model, samples, tmp_path):
    import copy

    model = copy.deepcopy(hf_model("llama").model)
    model.layers[1].self_attn.k_proj.weight.data.fill_(torch.nan)
    model.head = torch.nn.MultiheadAttention(8, 2)
    broken = Loaded("broken", model, None, lambda ids: model(input_ids=ids, use_cache=False))
    summary = Profile(tmp_path / "out", CONFIG).run(broken, samples)
    assert summary["layers_with_nan"] == [1]
    assert (
        summary["unmeasured"] == head_table.unmeasured(tmp_path / "out/heads") == {"head": "it has not run"}
    )
    got = table(tmp_path / "out")
    assert np.isfinite(got["max_weight"][got["layer"] == 0]).all()
    assert np.isnan(got["max_weight"][got["layer"] == 1]).all()


def test_out_of_memory_says_which_batch_size_to_try(loaded, samples, tmp_path):
    def forward(ids):
        raise torch.OutOfMemoryError("CUDA out of memory")

    starved = Loaded("llama", loaded.model, None, forward)
    with pytest.raises(HeadwiseError, match="out of memory with --batch-size 8; try --batch-size 4"):
        Profile(tmp_path / "out", CONFIG).run(starved, samples, batch_size=8)


def test_a_full_disk_stops_the_profile_and_keeps_finished_parts(
    finished, loaded, samples, tmp_path, monkeypatch
):
    write, written = pq.write_table, []

    def write_until_full(*args, **options):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(1)
        write(*args, **options)

    monkeypatch.setattr(pq, "write_table", write_until_full)
    with pytest.raises(HeadwiseError, match="disk is full"):
        Profile(tmp_path / "out", CONFIG).run(loaded, samples, batch_size=2)
    monkeypatch.undo()
    kept = sorted((tmp_path / "out" / "heads").glob("*.parquet"))
    assert 1 <= len(kept) <= 2
    before = [path.stat().st_mtime_ns for path in kept]
    Profile(tmp_path / "out", CONFIG).run(loaded, samples, batch_size=2)
    assert [path.stat().st_mtime_ns for path in kept] == before
    same(finished, tmp_path / "out")


def test_a_headwise_model_with_its_raw_values(samples, tmp_path):
    from safetensors.torch import load_file

    torch.manual_seed(0)
    shape = ModelConfig(n_layers=2, n_heads=4, n_kv_heads=2, d_model=32, vocab_size=64, init_std=0.4)
    decoder = Decoder(shape, seq_len=12).eval()
    own = Loaded("run", decoder, Config(model=shape), decoder.hidden)
    assert (own.vocab_size, own.n_layers, own.longest) == (64, 2, None)
    config = ProfileConfig(n_samples=2, context_length=12, scores="post_rope", raw_layers=(0,))
    Profile(tmp_path / "out", config).run(own, samples)
    kept = load_file(tmp_path / "out" / "raw" / "part_000000.safetensors")
    with torch.no_grad():
        x = decoder.blocks[0].attention_norm(decoder.tokens(samples.batch(0, 2)))
        q, k, v = decoder.attentions()[0].heads(x)
        q, k = decoder.rope(q, k)
    for name, expected in (("q", q), ("k", k), ("v", v)):
        torch.testing.assert_close(kept[f"layer_00.{name}"], expected, msg=name)
    assert "heads" not in vars(decoder.attentions()[0])


def test_values_out_of_range_are_refused():
    for wrong, message in (
        ({"n_samples": 0}, "--n-samples is 0; it must be at least 1"),
        ({"ignore_first": 12, "context_length": 12}, "--ignore-first is 12"),
        ({"table_dtype": "int8"}, "--table-dtype 'int8' is not known"),
        ({"measures": ("entrpy",)}, "did you mean 'entropy'"),
    ):
        with pytest.raises(HeadwiseError, match=message):
            ProfileConfig(**wrong).validate()


def test_merged_moments_equal_those_of_the_whole():
    values = torch.randn(3, 9, 4, 10, generator=torch.Generator().manual_seed(0)) + 5
    names = ["entropy", "k_eff", "query_norm"]

    def moments(some: torch.Tensor) -> Moments:
        return Moments(**{k: v.numpy() for k, v in gather(some, names, 2).items()})

    whole = moments(values)
    parts = merge([moments(part) for part in values.split([2, 3, 1, 3], dim=1)])
    for name in Moments.__dataclass_fields__:
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-12, err_msg=name)
    later = values[..., 2:].double().flatten(3).movedim(1, 2).flatten(2)
    expected = np.cov(later[:, 0].numpy(), ddof=0) * later.shape[-1]
    np.testing.assert_allclose(whole.products[0], expected, rtol=1e-10)


def test_spearman_shares_ranks_between_ties():
    draw = np.random.default_rng(0)
    values = np.stack([draw.normal(size=(5, 40)), draw.integers(0, 4, (5, 40)), np.ones((5, 40))])
    got = spearman(torch.from_numpy(values)).numpy()
    expected = [stats.spearmanr(x, y).statistic for x, y in zip(values[0], values[1], strict=True)]
    np.testing.assert_allclose(got[0], expected, atol=1e-12)
    assert np.isnan(got[1]).all()


def test_contexts_are_cut_in_order_or_shuffled_by_a_seed(loaded, tmp_path):
    shard = tmp_path / "shard.npz"
    np.savez(shard, input_ids=np.arange(60, dtype=np.int32).reshape(2, 30))
    source = Source(str(shard), cache=str(tmp_path / "cache"))
    samples = open_samples(source, loaded, n_samples=4, context_length=14)
    assert samples.batch(0, 4)[:, 0].tolist() == [0, 14, 30, 44]
    one, same_, other = (
        open_samples(source, loaded, n_samples=4, context_length=14, seed=s).chosen.tolist()
        for s in (1, 1, 2)
    )
    assert one == same_ != other


def test_what_cannot_be_read_is_one_clear_line(loaded, tmp_path):
    shard = tmp_path / "shard.npz"
    np.savez(shard, input_ids=np.full((2, 30), 99, dtype=np.int32))
    text = tmp_path / "short.txt"
    text.write_text("to be or not")
    tokenizer = tmp_path / "tokenizer.json"
    _write_tokenizer(tokenizer)
    options = {"tokenizer": str(tokenizer), "cache": str(tmp_path / "cache")}
    for data, size, message in (
        (str(shard), 8, "id 99, outside a vocabulary of 64"),
        (str(text), 12, "4 tokens, less than one context of 12; pass --context-length 4"),
        (str(text), 2, "has 2 contexts of 2 tokens; pass --n-samples 2 or less"),
        (str(tmp_path / "absent.txt"), 8, "does not exist"),
        (None, 8, "--data is missing"),
    ):
        with pytest.raises(HeadwiseError, match=message):
            open_samples(Source(data, **options), loaded, n_samples=3, context_length=size)


def test_records_are_cut_document_by_document(loaded, tmp_path):
    file, tokenizer = tmp_path / "docs.jsonl", tmp_path / "tokenizer.json"
    _write_tokenizer(tokenizer)
    texts = ["to be or not to", "be", "not or be to or to"]
    file.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    (tmp_path / "folder").mkdir()
    packed = tmp_path / "folder" / "docs.jsonl.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    for place in (file, packed, packed.parent):
        source = Source(str(place), str(tokenizer), text_field="body")
        samples = open_samples(source, loaded, n_samples=4, context_length=2)
        assert samples.batch(0, 4).tolist() == [[1, 2], [3, 4], [4, 3], [2, 1]]
    with pytest.raises(HeadwiseError, match="shuffles data of known size"):
        open_samples(source, loaded, n_samples=4, context_length=2, seed=0)


def _write_tokenizer(path: Path) -> None:
    import tokenizers

    words = {"[UNK]": 0, "to": 1, "be": 2, "or": 3, "not": 4}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(path))


def test_a_folder_is_loaded_without_its_output_layer(hf_model, tmp_path):
    hf_model("llama").save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    assert type(loaded.model).__name__ == "LlamaModel"
    assert (loaded.vocab_size, loaded.n_layers, loaded.longest) == (64, 2, None)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = hf_model("llama").model(input_ids=ids).last_hidden_state
        assert torch.equal(loaded.forward(ids).last_hidden_state, expected)
    assert load(str(tmp_path), dtype="bfloat16").fingerprint() != loaded.fingerprint()


def test_models_that_cannot_be_loaded_are_one_clear_line(hf_model, tmp_path):
    hf_model("gpt2").save_pretrained(tmp_path)
    assert load(str(tmp_path)).longest == 64
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(HeadwiseError, match=r"pytorch_model\.bin, which would have to be unpickled"):
        load(str(tmp_path))
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(HeadwiseError, match="holds no weights"):
        load(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(HeadwiseError, match=r"neither config\.json nor config\.yaml"):
        load(str(tmp_path))
    with pytest.raises(HeadwiseError, match="no folder 'no name!' here, and it could not be had"):
        load("no name!")


PLACES = ("first", "middle", "last")


@pytest.mark.parametrize("place", PLACES)
def test_one_value_of_one_head_makes_another_profile(samples, tmp_path, place):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    model = transformers.LlamaModel(config).eval().requires_grad_(False)
    loaded = Loaded("llama", model, None, lambda ids: model(input_ids=ids, use_cache=False))
    before = loaded.fingerprint()
    Profile(tmp_path / "out", CONFIG).run(loaded, samples, batch_size=2)
    weight = model.layers[1].self_attn.q_proj.weight.view(-1)
    weight[{"first": 0, "middle": 100, "last": -1}[place]] += 1e-3
    assert loaded.fingerprint() != before
    with pytest.raises(HeadwiseError, match="holds a profile with weights"):
        Profile(tmp_path / "out", CONFIG).run(loaded, samples, batch_size=2)


def test_configuration_and_buffers_count_and_where_a_model_is_from_does_not(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}

    def build(**options) -> Loaded:
        torch.manual_seed(0)
        model = transformers.LlamaModel(transformers.LlamaConfig(**sizes, vocab_size=8, **options))
        return Loaded("x", model, None, model)

    first = build()
    assert build().fingerprint() == first.fingerprint()
    assert build(rms_norm_eps=1e-3).fingerprint() != first.fingerprint()
    assert (
        build(rope_parameters={"rope_type": "default", "rope_theta": 5.0}).fingerprint()
        != first.fingerprint()
    )
    moved = build()
    moved.model.rotary_emb.inv_freq[-1] *= 2  # not in the state that a checkpoint keeps
    assert moved.fingerprint() != first.fingerprint()
    for name in "ab":
        first.model.save_pretrained(tmp_path / name)
    prints = {load(str(tmp_path / name)).fingerprint() for name in "ab"}
    assert len(prints) == 1
    settings = json.loads((tmp_path / "b" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 1e-3}))
    assert load(str(tmp_path / "b")).fingerprint() not in prints
