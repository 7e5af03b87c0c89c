"""Scores: what they belong to, the file that keeps them, tables.

A model's folder of scores holds `scores.json` (everything that was scored, with what it depends on) and `scores.csv`
(one row per task and metric). A score is used again only when all of `KEYS` is the same: the weights, the task and its
version, the examples in the prompt, the limit, the seed, how the model was run, and the versions of the libraries.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagamma.errors import EvaluationError, MegagammaError
from megagamma.files import write_json, write_text

FORMAT = 1
KEYS = ("identity", "task", "task_version", "fewshot", "limit", "seed", "settings", "versions")
_COLUMNS = (
    *("task", "kind", "metric", "filter", "value", "stderr", "higher_is_better", "smooth", "chance", "n", "n_total"),
    *("subsampled", "fewshot", "task_version", "limit", "seed", "identity"),
)

# The accuracy that stands for a task where there is room for one, in this order.
PRIMARY = ("acc_norm", "acc", "math_verify", "exact_match")
SMOOTH = ("choice_prob_norm", "answer_nats_per_byte", "choice_prob")


def plain(value: Any) -> Any:
    """A value of plain Python types as strict JSON takes it: numpy numbers unpacked, what is not finite as None."""
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if value is None or isinstance(value, (str, bool)):
        return value
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, (bool, int)):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return number if math.isfinite(number) else None


def key_of(record: dict[str, Any]) -> str:
    """What a score depends on, as text."""
    return json.dumps([record.get(key) for key in KEYS], sort_keys=True)


def metric(record: dict[str, Any], name: str, filter_name: str | None = None) -> dict[str, Any] | None:
    """A record's metric by name; with several filters the first, unless one is named."""
    for one in record["metrics"]:
        if one["metric"] == name and filter_name in (None, one["filter"]):
            found: dict[str, Any] = one
            return found
    return None


def leading(record: dict[str, Any], smooth: bool) -> dict[str, Any] | None:
    """The metric that stands for a task: its accuracy, or its smooth score."""
    for name in SMOOTH if smooth else PRIMARY:
        found = metric(record, name)
        if found is not None:
            return found
    return next((one for one in record["metrics"] if not one["smooth"]), None) if not smooth else None


class ScoreFile:
    """`scores.json` and `scores.csv` of one model."""

    def __init__(self, folder: Path, say: Callable[[str], None] = print) -> None:
        """Read what is there. A damaged file is set aside with a word, and its tasks are scored again."""
        self.folder, self.path = folder, folder / "scores.json"
        self.records: list[dict[str, Any]] = []
        try:
            self.records = read_scores(self.path)
        except FileNotFoundError:
            pass
        except EvaluationError as error:
            aside = self.path.with_name(f"{self.path.name}.damaged")
            os.replace(self.path, aside)
            say(f"WARNING {error}; set aside as {aside.name}, and scoring anew")

    def find(self, wanted: dict[str, Any]) -> dict[str, Any] | None:
        """The record with the same key, if it was scored already."""
        key = key_of(wanted)
        return next((record for record in self.records if key_of(record) == key), None)

    def add(self, record: dict[str, Any]) -> None:
        """Keep a record, in place of one with the same key, and write both files."""
        key = key_of(record)
        self.records = [one for one in self.records if key_of(one) != key] + [record]
        write_json(self.path, {"format": FORMAT, "records": self.records})
        write_text(self.folder / "scores.csv", as_csv(self.records))


def read_scores(path: Path) -> list[dict[str, Any]]:
    """The records of a `scores.json`.

    Raises:
        FileNotFoundError: there is none.
        EvaluationError: it is damaged, or of another format.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise MegagammaError(f"{path}: cannot be read ({error.strerror}): choose another folder") from error
    except ValueError as error:
        raise EvaluationError(f"{path}: cannot be read ({error}): delete it to score anew") from error
    records = value.get("records") if isinstance(value, dict) and value.get("format") == FORMAT else None
    if not isinstance(records, list) or not all(
        isinstance(one, dict) and isinstance(one.get("metrics"), list) and all(key in one for key in KEYS)
        for one in records
    ):
        raise EvaluationError(f"{path}: is not a score file of format {FORMAT}: delete it to score anew")
    return records


@dataclass
class Scores:
    """Scores of one model for one request.

    Attributes:
        identity: of the weights.
        records: one per task, in the order asked, then one per group.
        failures: reason by task, for tasks that could not be scored.
        fresh: tasks that were scored now; the others were scored before.
    """

    identity: str
    records: list[dict[str, Any]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)

    def record(self, task: str) -> dict[str, Any] | None:
        """The record of a task or group."""
        return next((one for one in self.records if one["task"] == task), None)

    def value(self, task: str, name: str, filter_name: str | None = None) -> float | None:
        """A score, or None where there is none."""
        record = self.record(task)
        found = metric(record, name, filter_name) if record else None
        return found["value"] if found else None

    def flat(self) -> dict[str, float]:
        """`task/metric` -> value, and `task/metric@filter` for every filter but a task's first."""
        found: dict[str, float] = {}
        for record in self.records:
            for one in record["metrics"]:
                name = f"{record['task']}/{one['metric']}"
                name = f"{name}@{one['filter']}" if name in found else name
                if one["value"] is not None:
                    found[name] = one["value"]
        return found

    def table(self) -> str:
        """Every score with its standard error, for the console."""
        return as_table(self.records, self.failures)


def as_csv(records: Iterable[dict[str, Any]]) -> str:
    """One row per task and metric."""
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for record in records:
        for one in record["metrics"]:
            row = {**record, **one}
            writer.writerow({name: "" if row.get(name) is None else row[name] for name in _COLUMNS})
    return text.getvalue()


def number(value: float | None, error: float | None = None, digits: int = 4) -> str:
    """`0.2534 +- 0.0121`, or a dash."""
    if value is None:
        return "-"
    return f"{value:.{digits}f}" + (f" +- {error:.{digits}f}" if error is not None else "")


def as_table(records: Iterable[dict[str, Any]], failures: dict[str, str] | None = None) -> str:
    """Scores as a Markdown table. Smooth scores are marked ~, sets of which only a part was scored with *."""
    lines = [
        "| task | shots | n | metric | score | chance | better |",
        "|---|---|---|---|---|---|---|",
    ]
    part = False
    for record in records:
        part |= bool(record["subsampled"])
        star = "*" if record["subsampled"] else ""
        shots = "-" if record["fewshot"] is None else record["fewshot"]
        for one in record["metrics"]:
            name = one["metric"] + (f" ({one['filter']})" if one["filter"] != "none" else "")
            name += " ~" if one["smooth"] else ""
            chance = number(one.get("chance"))
            better = {True: "higher", False: "lower", None: "-"}[one["higher_is_better"]]
            score = number(one["value"], one["stderr"])
            lines.append(
                f"| {record['task']} | {shots} | {record['n']}{star} | {name} | {score} | {chance} | {better} |"
            )
    if part:
        lines.append("* only a part of the set was scored")
    lines += [f"not scored: {task}: {reason}" for task, reason in (failures or {}).items()]
    return "\n".join(lines)


def reason(error: BaseException, length: int = 300) -> str:
    """An error in one line; of foreign ones the class too."""
    text = " ".join(str(error).split())
    text = text if isinstance(error, EvaluationError) else f"{type(error).__name__}: {text}"
    return text if len(text) <= length else text[:length] + "..."
