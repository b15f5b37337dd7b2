"""Each flag is raised where it should be, with its numbers, and not where it should not."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from headwise.analysis.honesty import RunFacts, check

SOUND = [
    RunFacts(
        variant, seed, "finished", loss=2.0 + 0.01 * seed + shift, chance_loss=math.log(256),
        engine="sdpa", expected_engine="sdpa", data_checksum="abc", params_total=100_000,
        step=400, data_wait=0.01, nonfinite_share=0.0, spike_share=0.0, device="cpu",
    )
    for variant, shift in (("flash", 0.0), ("mha", 0.003))
    for seed in (0, 1, 2)
]  # fmt: skip


def flags(runs: list[RunFacts]) -> dict[str, str]:
    return {flag.code: flag.text for flag in check(runs, baseline="flash")}


def changed(which: int, **change: object) -> list[RunFacts]:
    return [replace(run, **change) if i == which else run for i, run in enumerate(SOUND)]


def test_sound_runs_raise_nothing() -> None:
    assert flags(SOUND) == {}


def test_the_per_head_metrics_study_is_at_chance_and_identical() -> None:
    runs = [
        RunFacts("standard", s, "finished", loss=10.82583999633789, chance_loss=math.log(50304))
        for s in range(3)
    ]
    found = flags(runs)
    assert "at chance: nothing was learned" in found["at_chance"]
    assert "10.8258" in found["at_chance"]
    assert "seeds 0, 1, 2" in found["at_chance"]
    assert "identical loss 10.82584" in found["identical_losses"]


def test_runs_beside_each_other_are_said() -> None:
    one_by_one = [replace(run, host="lab", time=(10.0 * i, 10.0 * i + 10)) for i, run in enumerate(SOUND)]
    assert flags(one_by_one) == {}
    assert flags([replace(run, host=f"lab{i}", time=(0.0, 10.0)) for i, run in enumerate(SOUND)]) == {}
    pairs = [
        replace(run, host="lab", time=(10.0 * (i // 2), 10.0 * (i // 2) + 10)) for i, run in enumerate(SOUND)
    ]
    assert "Up to 2 runs ran at a time" in flags(pairs)["at_a_time"]


def test_averages_over_other_seeds_than_the_baselines_are_said() -> None:
    text = flags(SOUND[:2] + SOUND[3:])["other_seeds"]
    assert text.startswith("mha and flash were not averaged over the same seeds")
    assert "other_seeds" not in flags(SOUND[:3])


@pytest.mark.parametrize(("ratio", "flagged"), [(0.985, False), (0.995, True), (1.5, True)])
def test_chance_margin(ratio: float, flagged: bool) -> None:
    assert ("at_chance" in flags(changed(0, loss=ratio * math.log(256)))) == flagged


def test_no_better_than_before_training() -> None:
    assert (
        "2.0000 is no more than 1% below the untrained model's 2.0100"
        in flags(changed(0, start_loss=2.01))["untrained"]
    )
    assert flags(changed(0, start_loss=2.1)) == {}


def test_what_a_few_steps_did_is_said() -> None:
    found = flags(changed(0, step=1, start_loss=5.2))
    assert "1 step only, from loss 5.2000 untrained to 2.0000" in found["few_steps"]


@pytest.mark.parametrize("state", ["failed", "diverged", "timed_out", "interrupted", "skipped"])
def test_runs_cut_short_are_named_and_left_out(state: str) -> None:
    runs = changed(0, state=state, reason="step 12 was not finite")
    assert not runs[0].usable
    assert "step 12 was not finite; not in any average" in flags(runs)[state]


def test_another_engine_is_left_out() -> None:
    runs = changed(3, engine="eager")
    assert not runs[3].usable
    assert "'eager' where 'sdpa' was expected" in flags(runs)["other_engine"]


def test_an_engine_may_name_its_own_choice_behind_a_dash() -> None:
    assert changed(0, engine="sdpa-math")[0].usable
    assert not changed(0, engine="sdpamath")[0].usable


def test_an_infinite_loss_is_left_out() -> None:
    runs = changed(0, loss=math.inf)
    assert not runs[0].usable
    assert "nonfinite_loss" in flags(runs)


def test_one_seed() -> None:
    assert "no interval" in flags(SOUND[:1])["one_seed"]


@pytest.mark.parametrize(
    ("change", "code", "number"),
    [
        ({"data_wait": 0.08}, "data_wait", "8.0%"),
        ({"spike_share": 0.02}, "spikes", "2.0%"),
        ({"nonfinite_share": 0.005}, "nonfinite", "0.5%"),
        ({"step": 7}, "few_steps", "7 steps"),
        ({"data_checksum": "other"}, "different_data", "2 different data sets"),
        ({"device": "cuda"}, "different_devices", "cpu, cuda"),
    ],
)
def test_numbers_are_in_the_sentence(change: dict, code: str, number: str) -> None:
    found = flags(changed(1, **change))
    assert list(found) == [code]
    assert number in found[code]


def test_parameters_beyond_two_percent() -> None:
    runs = [replace(r, params_total=103_000) if r.variant == "mha" else r for r in SOUND]
    assert "+3.0% against flash" in flags(runs)["parameters"]
    runs = [replace(r, params_total=101_900) if r.variant == "mha" else r for r in SOUND]
    assert flags(runs) == {}


def test_two_variants_with_the_same_losses() -> None:
    runs = [replace(r, loss=2.0 + 0.01 * r.seed) for r in SOUND]
    assert "flash and mha" in flags(runs)["identical_variants"]


def test_gravest_first() -> None:
    runs = changed(0, step=7, loss=math.log(256))
    assert [flag.severity for flag in check(runs)] == ["error", "warning"]
