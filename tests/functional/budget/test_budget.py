"""Which keys a budget holds: against a loop that follows the definition word for word."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from headwise.functional import budget
from headwise.functional.sharing import mask_of_head


def held_by_definition(taken: Tensor, keys: int, protect_bos: bool) -> Tensor:
    """Which of `(T, T)` a cache of `keys` keys still holds at each query, key by key."""
    length = taken.shape[-1]
    keep = torch.zeros(length, length, dtype=torch.bool)
    held: list[int] = []
    for query in range(length):
        held.append(query)
        if len(held) > keys:
            droppable = [j for j in held if j != query and not (protect_bos and j == 0)]
            held.remove(max(droppable, key=lambda j: (taken[query, j].item(), -j)))
        keep[query, held] = True
    return keep


def chosen_afresh(taken: Tensor, keys: int, protect_bos: bool) -> Tensor:
    length = taken.shape[-1]
    keep = torch.zeros(length, length, dtype=torch.bool)
    for query in range(length):
        forced = {query} | ({0} if protect_bos else set())
        others = sorted(set(range(query)) - forced, key=lambda j: (taken[query, j].item(), -j))
        keep[query, [*forced, *others][: max(keys, len(forced))]] = True
    return keep


masks = st.builds(
    lambda seed, length, levels: torch.randint(
        levels, (2, length, length), generator=torch.Generator().manual_seed(seed)
    ).float().cumsum(-2),
    st.integers(0, 2**31), st.integers(2, 12), st.sampled_from([1, 2, 3, 50]),
)  # fmt: skip
"""F that never decreases along queries, with and without many ties."""


@given(masks, st.integers(2, 12), st.booleans())
def test_the_keys_held_are_those_of_the_definition(taken: Tensor, keys: int, protect_bos: bool) -> None:
    visible = torch.ones_like(taken[0], dtype=torch.bool).tril()
    held = budget.kept(budget.turns(taken, keys, protect_bos=protect_bos)) & visible
    afresh = budget.kept_afresh(taken, keys, protect_bos=protect_bos) & visible
    for row in range(2):
        assert torch.equal(held[row], held_by_definition(taken[row], keys, protect_bos))
        assert torch.equal(afresh[row], chosen_afresh(taken[row], keys, protect_bos))
    assert held.sum(-1).max() <= keys
    assert not (held[:, 1:] & ~held[:, :-1]).tril(0).any(), "a dropped key returned"


def test_what_lies_above_the_diagonal_is_not_read() -> None:
    taken = torch.rand(3, 9, 9)
    garbage = taken.tril() + torch.full((9, 9), torch.nan).triu(1).nan_to_num(-7.0).triu(1)
    assert torch.equal(budget.turns(taken, 3), budget.turns(garbage, 3))
    assert torch.equal(budget.kept_afresh(taken, 3), budget.kept_afresh(garbage, 3))


def test_without_selection_a_budget_is_a_window() -> None:
    keep = budget.kept(budget.turns(torch.zeros(8, 8), 3, protect_bos=False)).tril()
    i, j = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    assert torch.equal(keep, (j <= i) & (j > i - 3))


def test_keys_return_where_every_query_chooses_afresh() -> None:
    taken = torch.zeros(5, 5)
    taken[3, 1] = 5.0  # query 3 drops key 1
    taken[4, 1:4] = torch.tensor([5.0, 9.0, 9.0])  # which query 4 would rather have than keys 2 and 3
    held, afresh = budget.kept(budget.turns(taken, 3)), budget.kept_afresh(taken, 3)
    assert held[4].tolist() == [True, False, False, True, True]
    assert afresh[4].tolist() == [True, True, False, False, True]


@pytest.mark.parametrize(("share", "keys"), [(1.0, 100), (0.29, 29), (0.125, 12), (0.019, 2), (1e-9, 2)])
def test_a_share_is_rounded_down_but_holds_the_protected_keys(share: float, keys: int) -> None:
    assert budget.keys_of_share(share, 100, protect_bos=True) == keys
    assert budget.keys_of_share(1e-9, 100, protect_bos=False) == 1


@pytest.mark.parametrize("share", [0.0, -0.5, 1.0001, float("nan")])
def test_a_share_outside_of_0_to_1_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        budget.keys_of_share(share, 100, protect_bos=True)


def test_a_key_value_head_drops_by_the_least_f_among_the_heads_it_serves() -> None:
    taken = torch.rand(1, 3, 4, 4)
    least = budget.least_taken(taken, n_heads=6, n_kv_heads=2)
    assert torch.equal(least[:, 0], taken[:, :2].amin(1))  # heads 0, 1 use mask 0 and head 2 mask 1
    assert torch.equal(least[:, 1], taken[:, 1:].amin(1))
    assert budget.least_taken(taken[:, :1], 6, 2).shape[1] == 1


@pytest.mark.parametrize("n_masks", [1, 2, 6])
def test_dropped_keys_have_no_weight_for_the_heads_that_dropped_them(n_masks: int) -> None:
    taken = torch.rand(2, n_masks, 5, 5)
    least = budget.least_taken(taken, 6, 2)
    keep = budget.kept(budget.turns(least, 2))
    pruned = budget.without_dropped(taken, keep, 6)
    heads = pruned.expand(2, 6, 5, 5) if n_masks == 1 else pruned
    for head, mask in enumerate(mask_of_head(6, n_masks)):
        holds = keep[:, 0 if n_masks == 1 else head // 3]
        assert torch.equal(heads[:, head] == budget.GONE, ~holds)
        assert torch.equal(heads[:, head][holds], taken[:, mask][holds])
    by_mask = budget.kept_by_mask(keep, 6, n_masks)
    if n_masks == 2:
        assert torch.equal(by_mask, keep)
