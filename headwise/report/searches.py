"""Searches in a report: every trial, the winner's value there and on fresh seeds, and what that shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.analysis.choice import HIGHEST, Bracket, bracket, noise_of_trials, separation
from headwise.analysis.honesty import Flag
from headwise.analysis.statistics import paired, simultaneous, summarize
from headwise.errors import HeadwiseError
from headwise.report.drawing import COLOURS, finish_axis, new_figure
from headwise.report.section import Drawn, Found, Section, Titled
from headwise.report.tables import METRICS, Metric, Table, plus_minus
from headwise.runs.values import Values, values_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def collect(among: Found) -> dict[str, Any]:
    """Every search of the study; empty where it has none.

    Returns:
        `by`, `best` (lowest or highest), `keys` (each `{log, low, high}`, or None for a list), and
        `variants`, each with its trials, its winner and what speaks for it.
    """
    study = among.study
    plan = study.plan.get("search") if study else None
    if study is None or not plan:
        return {}
    units = plan["units"]
    read = {
        name: [_read(study.path, trial["folder"], plan["seeds"], plan["by"]) for trial in unit["trials"]]
        for name, unit in units.items()
    }
    confirmed = {name: _read(study.path, name, plan["confirm_seeds"], plan["by"]) for name in units}
    defaults = {
        name: _read(study.path, unit["default"], plan["confirm_seeds"], plan["by"])
        for name, unit in units.items()
    }
    pairs = {name: paired(defaults[name].by_seed, confirmed[name].by_seed).difference for name in units}
    compared = max(1, sum(one.n >= 2 for one in pairs.values()))
    found = []
    for name, unit in units.items():
        same = list(units) if plan["each"] == "study" else [name]
        decisive = [_together([read[one][at] for one in same]) for at in range(len(unit["trials"]))]
        waits = str((study.variants.get(name) or {}).get("waits") or "")
        about = {
            "variant": name, "planned": unit["planned"], "winner": unit["winner"], "problem": waits,
            "trials": [
                {"values": trial["values"], "value": one.mean if _whole(one) else None, "n": len(one.by_seed),
                 "outcome": trial["reason"] or one.reason or "finished"}
                for trial, one in zip(unit["trials"], read[name], strict=True)
            ],
            "confirmed": asdict(summarize(confirmed[name].by_seed.values())),
            "default": asdict(summarize(defaults[name].by_seed.values())) if unit["default"] else None,
            "gain": asdict(simultaneous(pairs[name], compared)),
        }  # fmt: skip
        if unit["winner"] is not None and unit["winner"] < len(decisive):
            about |= _winner(plan, unit, decisive, confirmed[name])
        about["text"] = _sentences(plan, about)
        found.append(about)
    keys = {
        key: {"log": bool(one.get("log")), "low": one.get("low"), "high": one.get("high")}
        if isinstance(one, dict) else None
        for key, one in plan["keys"].items()
    }  # fmt: skip
    return {"by": plan["by"], "best": plan["best"], "sampler": plan["sampler"], "each": plan["each"],
            "seeds": plan["seeds"], "confirm_seeds": plan["confirm_seeds"], "keys": keys,
            "variants": found}  # fmt: skip


def _read(root: Path, folder: str | None, seeds: list[int], by: str) -> Values:
    if folder is None:
        return Values({}, {}, "", {})
    try:
        return values_of(root / folder, seeds, by)
    except HeadwiseError as error:
        return Values({}, {}, str(error), {})


def _whole(one: Values) -> bool:
    """Whether every seed of a trial has a value: a trial of which one has none counts as worst."""
    return bool(one.by_seed) and not one.reason


def _together(found: list[Values]) -> dict[int, float]:
    """Seed -> the mean over the variants that a trial serves; empty where one of their runs has no value."""
    if not all(_whole(one) for one in found):
        return {}
    return {seed: sum(one.by_seed[seed] for one in found) / len(found) for seed in found[0].by_seed}


def _winner(
    plan: Mapping[str, Any], unit: Mapping[str, Any], decisive: list[dict[int, float]], confirmed: Values
) -> dict[str, Any]:
    """What speaks for the winner: how far the others are away, and whether it lies at an end."""
    at = unit["winner"]
    sign = -1 if plan["best"] == HIGHEST else 1
    means = {n: sum(one.values()) / len(one) for n, one in enumerate(decisive) if one}
    others = sorted((n for n in means if n != at), key=lambda n: sign * means[n])
    values = [trial["values"] for trial in unit["trials"]]
    brackets: dict[str, str] = {}
    for key in values[at]:
        tried = [one[key] for one in values]
        if (found := bracket(tried, tried[at])) != Bracket.INSIDE:
            brackets[key] = found.value
    about: dict[str, Any] = {"ends": brackets, "runner_up": None, "close": [], "noise": None, "doubt": None}
    if at not in means or not others:
        return about
    about["runner_up"] = {"trial": others[0], "gap": abs(means[others[0]] - means[at])}
    if len(plan["seeds"]) > 1:
        named = {f"trial {n}": decisive[n] for n in (at, *others)}
        found_ = separation(f"trial {at}", named)
        return about | {
            "close": [int(name.removeprefix("trial ")) for name in found_.close],
            "doubt": found_.doubt,
        }
    noise = noise_of_trials(list(confirmed.by_seed.values()), len(plan["seeds"]))
    if noise is None:
        return about | {
            "close": others,
            "doubt": "one seed of each trial, and no two confirmed, show no noise",
        }
    close = [n for n in others if abs(means[n] - means[at]) <= noise]
    doubt = (
        f"two single runs of one setting differ by up to {noise:.4g} by their seed alone (95%, from the "
        f"spread over the fresh seeds), and the second best, trial {others[0]}, is "
        f"{about['runner_up']['gap']:.4g} away"
    )
    return about | {"noise": noise, "close": close, "doubt": doubt if close else None}


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def _sentences(plan: Mapping[str, Any], about: dict[str, Any]) -> list[str]:
    """What the search of a variant shows, a sentence each."""
    trials, at = about["trials"], about["winner"]
    if about["problem"]:
        return [f"{about['variant']} {about['problem']}."]
    if at is None:
        return ["None of the searched keys is one of this variant's: it runs unchanged."]
    without = sum(trial["value"] is None for trial in trials)
    failed = f" ({without} of them without a value, which counts as worst)" if without else ""
    over = " over all variants" if plan["each"] == "study" else ""
    chosen = f"{_shown(trials[at]['values'])} has the {plan['best']} {plan['by']}{over}"
    found = [f"Of the {len(trials)} trials that were looked at{failed}, {chosen}."]
    runner_up = about.get("runner_up")
    if runner_up and about["doubt"]:
        count = len(about["close"])
        found.append(
            f"Not separated from it {'is 1 other trial' if count == 1 else f'are {count} other trials'}: "
            f"{about['doubt']}."
        )
    elif runner_up:
        found.append(
            f"It is separated from every other trial beyond the noise of seeds; the second best is trial "
            f"{runner_up['trial']}, {runner_up['gap']:.4g} away."
        )
    found.append(_against_default(plan, about))
    found += [_end(key, where, trials[at]["values"][key], plan["keys"].get(key))
              for key, where in about.get("ends", {}).items()]  # fmt: skip
    return found


def _against_default(plan: Mapping[str, Any], about: dict[str, Any]) -> str:
    gain = about["gain"]
    if about["default"] is None:
        return "It was not compared with the configuration without a search."
    if gain["mean"] is None:
        return "Its difference to the configuration without a search is not known: no seed has both values."
    if gain["ci95"] is None:
        difference = f"{gain['mean']:+.4g} on one seed, which shows no noise"
        return f"Against the configuration without a search: {difference}."
    low, high = gain["mean"] - gain["ci95"], gain["mean"] + gain["ci95"]
    word = "within the noise of"
    if low > 0 or high < 0:
        word = "better than" if (gain["mean"] > 0) == (plan["best"] == HIGHEST) else "worse than"
    return (
        f"On the fresh seeds it is {word} the configuration without a search: {plan['by']} "
        f"{gain['mean']:+.4g} [{low:+.4g}, {high:+.4g}] ({gain['n']} seeds)."
    )


def _end(key: str, where: str, value: Any, given: Any) -> str:
    limit = given.get("low" if where == "below" else "high") if isinstance(given, dict) else None
    if limit is None or limit == value:
        return f"No trial lies {where} {key}={value}, so the best may lie beyond: widen the range."
    return f"No trial lies {where} {key}={value}, and the range goes on to {limit}: make more trials."


def flags(data: dict[str, Any]) -> list[Flag]:
    """Searches without a winner, winners at an end, and winners that the noise may have chosen."""
    found = []
    for one in data["variants"]:
        name = one["variant"]
        if one["problem"].startswith("has no winner"):
            found.append(Flag("error", "search_failed", f"{name} {one['problem']}.", name))
        for key, where in one.get("ends", {}).items():
            value = one["trials"][one["winner"]]["values"][key]
            text = f"{name}: {_end(key, where, value, data['keys'].get(key))}"
            found.append(Flag("warning", "search_end", text, name))
        if one.get("doubt"):
            text = f"{name}: its search chose within the noise: {one['doubt']}."
            found.append(Flag("note", "choice_in_noise", text, name))
    return found


def tables(data: dict[str, Any]) -> list[Titled]:
    """Winners, what they show, and all trials."""
    by, metric = data["by"], METRICS.get(data["by"], Metric(data["by"]))
    rows, texts, trials = [], [], []
    for one in data["variants"]:
        at, all_ = one["winner"], one["trials"]
        searched = None if at is None else all_[at]["value"]
        mean = one["confirmed"]["mean"]
        optimism = None if searched is None or mean is None else mean - searched
        rows.append([
            one["variant"], f"{len(all_)} of {one['planned']}",
            "" if at is None else _shown(all_[at]["values"]), _number(searched, metric),
            plus_minus(one["confirmed"], by), str(one["confirmed"]["n"]),
            "" if optimism is None else f"{optimism:+.4g}",
            plus_minus(one["default"], by) if one["default"] else "",
        ])  # fmt: skip
        texts += [[one["variant"], text] for text in one["text"]]
        for number, trial in enumerate(all_):
            cells = ["" if key not in trial["values"] else str(trial["values"][key]) for key in data["keys"]]
            best = "winner" if number == at else trial["outcome"]
            trials.append([one["variant"], str(number), *cells, _number(trial["value"], metric), best])
    unit = f" ({metric.unit})" if metric.unit else ""
    headers = ["variant", "trials", "found", f"{metric.label}{unit} in the search", "on fresh seeds", "n",
               "difference", "without a search"]  # fmt: skip
    seeds = ", ".join(map(str, data["confirm_seeds"]))
    note = (
        "The value in the search is the best of all trials, so it is too good on average. The value on fresh "
        f"seeds ({seeds}) is free of that, and only these runs are compared with the baseline."
    )
    every = Table(["variant", "trial", *data["keys"], f"{metric.label}{unit}", "outcome"], trials)
    return [
        Titled(Table(headers, rows, note)),
        Titled(Table(["variant", "what the search shows"], texts), "What was found"),
        Titled(every, "All trials", folded=len(trials) > 12),
    ]


def _number(value: float | None, metric: Metric) -> str:
    return "" if value is None else format(value, metric.style)


def figures(data: dict[str, Any], variants: list[str]) -> list[Drawn]:
    """The number that decides against every searched key."""
    if not any(trial["value"] is not None for one in data["variants"] for trial in one["trials"]):
        return []
    return [Drawn(_figure(data, variants), "Search: every trial", "search.png")]


def _figure(data: dict[str, Any], variants: list[str]) -> Figure:
    keys, metric = list(data["keys"]), METRICS.get(data["by"], Metric(data["by"]))
    figure, axes = new_figure(1, len(keys), 4.6 * len(keys), 3.4)
    for axis, key in zip(axes[0], keys, strict=True):
        every = [
            trial["values"][key]
            for one in data["variants"]
            for trial in one["trials"]
            if key in trial["values"]
        ]
        places = None if all(_is_number(value) for value in every) else list(dict.fromkeys(map(str, every)))
        for number, one in enumerate(data["variants"]):
            colour = COLOURS[variants.index(one["variant"]) % 8 if one["variant"] in variants else number % 8]
            mine = [t for t in one["trials"] if key in t["values"] and t["value"] is not None]
            at = [t["values"][key] if places is None else places.index(str(t["values"][key])) for t in mine]
            axis.plot(at, [t["value"] for t in mine], "o", color=colour, markersize=4, label=one["variant"])
            mean, best = one["confirmed"]["mean"], one["winner"]
            if best is not None and mean is not None and key in one["trials"][best]["values"]:
                x = one["trials"][best]["values"][key]
                x = x if places is None else places.index(str(x))
                axis.errorbar(
                    [x], [mean], yerr=[one["confirmed"]["ci95"] or 0], fmt="D", color=colour, markersize=7,
                    markerfacecolor="none", capsize=3,
                )  # fmt: skip
        if places is not None:
            axis.set_xticks(range(len(places)), places)
        elif is_log(data["keys"][key], every):
            axis.set_xscale("log")
        finish_axis(axis, f"{metric.label}; diamond: the winner on fresh seeds", key)
    axes[0][0].legend(frameon=False, fontsize=7)
    return figure


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_log(given: dict[str, Any] | None, values: list[Any]) -> bool:
    """Whether an axis of these values is logarithmic: so given, or a list over more than a power of ten."""
    return given["log"] if given is not None else min(values) > 0 and max(values) >= 10 * min(values)


SEARCHES = Section(
    name="search", title="Search", link="Search", collect=collect, tables=tables, figures=figures,
    flags=flags, script=Path(__file__).with_name("templates") / "search.js",
)  # fmt: skip
