"""What is seen, in three sentences: none claims more than its seeds allow."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megagamma.dynamics.analysis import turning_point
from megagamma.report.answers import shares_of
from megagamma.report.figures import baseline_of, mean_over_seeds, roles_of
from megagamma.report.runs import Arm
from megagamma.scaling.paired import interval


def what_was_trained(arms: Sequence[Arm]) -> str:
    """Runs, arms, seeds, tokens."""
    runs = [run for arm in arms for run in arm.runs]
    tokens = sorted({run.metrics[-1]["tokens"] for run in runs})
    seeds = sorted({run.seed for run in runs})
    span = f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}"
    return (
        f"{len(runs)} run{'s' if len(runs) > 1 else ''} in {len(arms)} arm{'s' if len(arms) > 1 else ''}, "
        f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''} ({', '.join(map(str, seeds[:10]))}), {span} tokens each."
    )


def final_losses(arms: Sequence[Arm]) -> str:
    """The end of the validation loss: of one arm its value, of several their paired differences."""
    names = sorted({name for arm in arms for run in arm.runs for name in run.validation_names})
    if not names:
        return "No run was validated, so that nothing is said of held-out loss."
    key = f"val/{names[0]}/loss"
    ends = {arm.label: {run.seed: run.last(key) for run in arm.runs} for arm in arms}
    if len(arms) == 1:
        values = [value for value in ends[arms[0].label].values() if value is not None]
        mean, low, high = interval(values)
        spread = (
            f", 95 % interval over {len(values)} seeds {low:.4f} to {high:.4f}" if len(values) > 1 else " (one seed)"
        )
        return f"Validation loss on {names[0]} ends at {mean:.4f} nats per token{spread}."
    parts = []
    for arm in arms[1:]:
        pairs = [
            (first, second)
            for seed, first in ends[arms[0].label].items()
            if first is not None and (second := ends[arm.label].get(seed)) is not None
        ]
        if not pairs:
            parts.append(f"{arm.label} shares no finished seed with {arms[0].label}")
            continue
        mean, low, high = interval([second - first for first, second in pairs])
        if len(pairs) == 1:
            parts.append(f"{arm.label} ends {mean:+.4f} nats from {arms[0].label} (one seed: not a finding)")
        else:
            verdict = "the interval holds 0" if low <= 0 <= high else "ahead" if high < 0 else "behind"
            parts.append(
                f"{arm.label} ends {mean:+.4f} nats from {arms[0].label}, 95 % interval over {len(pairs)} seeds {low:+.4f} to "
                f"{high:+.4f}: {verdict}"
            )
    return f"On {names[0]}, at each run's end: {'; '.join(parts)}."


def condensation(arms: Sequence[Arm]) -> str:
    """Which role condensed most against a random matrix, and when it turned."""
    best: tuple[float, str, str, int | None, int] | None = None
    for arm in arms:
        for role in roles_of([arm]):
            steps, values = mean_over_seeds(arm, role, "condensation")
            random = baseline_of(arm, role, "condensation")
            if not values or not random:
                continue
            ratio = max(values) / random
            if best is None or ratio > best[0]:
                best = (ratio, role, arm.label, turning_point(steps, values), len(arm.seeds))
    if best is None or not math.isfinite(best[0]):
        return "Weights were not measured, so that nothing is said of condensation: python tools/analyze_run.py RUN."
    ratio, role, label, turn, seeds = best
    when = f", turning at step {turn}" if turn is not None else ", without turning back within the run"
    note = "" if seeds > 1 else " (one seed: not a finding)"
    return (
        f"The {role} matrices of {label} condensed most: up to {ratio:.1f} x the cosine of a random matrix{when}{note}."
    )


def final_answers(arms: Sequence[Arm]) -> str:
    """What runs on a toy answer at their end, on what was held out where the toy holds something out."""
    sets = arms[0].runs[0].validation_names
    name = "held_out" if "held_out" in sets else sets[0]
    parts = []
    for arm in arms:
        keys = [key for key in shares_of(arm.runs[0]) if key.startswith(f"val/{name}/")]
        texts = []
        for key in keys:
            mean, low, high = interval([value for run in arm.runs if (value := run.last(key)) is not None])
            spread = f" ({max(low, 0):.0%} to {min(high, 1):.0%})" if len(arm.runs) > 1 else ""
            texts.append(f"{mean:.0%}{spread} {key.split('/')[-1]}")
        parts.append(f"{arm.label}: {', '.join(texts)}")
    seeds = len(arms[0].seeds)
    over = f"95 % intervals over {seeds} seeds" if seeds > 1 else "one seed: not a finding"
    return f"Answers to {name.replace('_', ' ')} questions at the end: {'; '.join(parts)} ({over})."


def sentences(arms: Sequence[Arm]) -> list[str]:
    """The three that a report opens with."""
    is_toy = all(run.config.data.toy and run.validation_names for arm in arms for run in arm.runs)
    return [what_was_trained(arms), final_answers(arms) if is_toy else final_losses(arms), condensation(arms)]
