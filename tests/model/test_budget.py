"""A model within a context budget: layers prune as they run, and nothing is left behind afterwards."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from headwise.attention.config import AttentionConfig
from headwise.attention.observation import Observation, Scores
from headwise.attention.selective.config import ProtectionConfig, SelectiveConfig
from headwise.errors import HeadwiseError
from headwise.functional.budget import GONE
from headwise.functional.sharing import mask_of_head
from headwise.model.budget import within_budget
from headwise.model.config import ModelConfig
from headwise.model.decoder import Decoder

TOKENS = 12


def make(kind: str = "selective", n_kv_heads: int = 4, **switches: Any) -> Decoder:
    """Two layers whose queries mask much."""
    torch.manual_seed(0)
    attention = AttentionConfig(kind, selective=SelectiveConfig(**switches))
    config = ModelConfig(
        d_model=32, n_layers=2, n_heads=4, n_kv_heads=n_kv_heads, vocab_size=20, init_std=0.4,
        attention=attention,
    )  # fmt: skip
    return Decoder(config, TOKENS).eval()


def tokens() -> Tensor:
    return torch.randint(20, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def held_by_heads(model: Decoder, tokens: Tensor) -> list[Tensor]:
    """Of each layer the keys that a query can see, `(H, T, T)` bool, of the first sequence."""
    found: list[Tensor] = []

    def look(observation: Observation) -> None:
        assert isinstance(observation, Scores)
        assert observation.bias is not None
        visible = (observation.bias[0] > -GONE).tril()
        found.append(visible.expand(observation.q.shape[1], -1, -1))

    for layer in model.attentions():
        layer.observer = look
    model(tokens)
    for layer in model.attentions():
        layer.observer = None
    return found


SWITCHES: dict[str, dict[str, Any]] = {
    "head_zero": {},
    "unprotected": {"protect_bos": False, "protect_self": False},
    "two masks": {"source": "dedicated", "n_masks": 2},
    "latent": {"source": "latent", "n_masks": 2, "latent_init": "ones"},
    "game": {"protection": ProtectionConfig("head_two")},
    "leaky": {"relu_leak": 0.3},
}


@pytest.mark.parametrize("n_kv_heads", [4, 2])
@pytest.mark.parametrize("switches", list(SWITCHES.values()), ids=list(SWITCHES))
@torch.no_grad()
def test_every_head_attends_to_the_keys_of_the_definition(switches: dict[str, Any], n_kv_heads: int) -> None:
    """Layer by layer from the F that the layer itself had, with a loop that knows only lists of keys."""
    model, share, keys = make(n_kv_heads=n_kv_heads, **switches), 0.34, 4
    first = {} if switches.get("protect_bos", True) is False else {0}
    seen: list[Tensor] = []
    handles = []
    for layer in model.attentions():

        def remember(module: Any, inputs: tuple[Tensor], options: dict[str, Any]) -> None:
            q, k, _ = module.heads(inputs[0])
            q, k = options["rope"](q, k)
            seen.append(module.taken(inputs[0], q, k, options["rope"], options["carry"]))

        handles.append(layer.register_forward_pre_hook(remember, with_kwargs=True))
    with within_budget(model, share):
        holds = held_by_heads(model, tokens()[:1])
    for layer, taken in enumerate(seen):
        of_head = mask_of_head(4, taken.shape[1])
        for kv_head in range(n_kv_heads):
            heads = range(kv_head * 4 // n_kv_heads, (kv_head + 1) * 4 // n_kv_heads)
            held: list[int] = []
            for query in range(TOKENS):
                held.append(query)
                if len(held) > keys:
                    f = {j: min(taken[0, of_head[h], query, j].item() for h in heads) for j in held}
                    held.remove(max(set(held) - {query} - set(first), key=lambda j: (f[j], -j)))
                for head in heads:
                    assert holds[layer][head, query].nonzero().flatten().tolist() == held
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("kind", ["selective", "flash", "mha"])
@torch.no_grad()
def test_the_whole_context_changes_nothing_and_nothing_stays_behind(kind: str) -> None:
    model = make(kind)
    before = model(tokens())
    with within_budget(model, 1.0):
        assert torch.equal(model(tokens()), before)
    with within_budget(model, [0.5, 0.25]):
        assert not torch.allclose(model(tokens()), before)
    assert torch.equal(model(tokens()), before)


@pytest.mark.parametrize("kind", ["selective", "flash"])
@torch.no_grad()
def test_a_copy_made_within_a_budget_has_its_whole_context(kind: str) -> None:
    model = make(kind)
    whole = model(tokens())
    with within_budget(model, 0.25):
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        held = model(tokens())
        for other in copies:
            assert torch.equal(other(tokens()), whole)
    assert not torch.allclose(held, whole)


@pytest.mark.parametrize("kind", ["selective", "flash"])
@torch.no_grad()
def test_a_budget_holds_in_compiled_code_that_ran_before(kind: str) -> None:
    model = make(kind)
    compiled = torch.compile(model, backend="eager")
    whole = compiled(tokens())
    with within_budget(model, 0.25):
        torch.testing.assert_close(compiled(tokens()), model(tokens()))
    torch.testing.assert_close(compiled(tokens()), whole)


@torch.no_grad()
def test_a_kind_without_f_keeps_a_window() -> None:
    model = make("flash")
    age = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    window = ((age >= 0) & (age < 3))[None]
    with within_budget(model, 0.25):
        torch.testing.assert_close(model(tokens()), model(tokens(), attn_mask=window))


@torch.no_grad()
def test_layers_have_budgets_of_their_own() -> None:
    model = make()
    with within_budget(model, [1.0, 0.25]):
        holds = held_by_heads(model, tokens())
    assert [int(layer.sum(-1).max()) for layer in holds] == [TOKENS, 3]


@torch.no_grad()
def test_readmitting_keys_differs_from_dropping_them_for_good() -> None:
    model = make()
    with within_budget(model, 0.34):
        dropped = model(tokens())
    with within_budget(model, 0.34, readmit=True):
        readmitted = model(tokens())
    assert not torch.allclose(dropped, readmitted)


def test_what_has_no_budget_is_refused() -> None:
    disabled = make(enabled=False)
    with (
        pytest.raises(HeadwiseError, match=r"layer 0 .* its selection is disabled"),
        within_budget(disabled, 0.5),
    ):
        pass
    with within_budget(disabled, 1.0):
        pass
    with pytest.raises(ValueError, match="above 0 and at most 1"), within_budget(make(), 1.5):
        pass
    with pytest.raises(ValueError, match="zip"), within_budget(make(), [0.5]):
        pass
