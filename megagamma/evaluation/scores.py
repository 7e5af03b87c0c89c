"""Scores: what they belong to, the file that keeps them, tables.

A model's folder of scores holds `scores.json` (everything that was scored, with what it depends on) and `scores.csv`
(one row per task and metric). A score is used again only when all of `KEYS` is the same: the weights, the task and its
version, the examples in the prompt, the limit, the seed, how the model was run, and the versions of the libraries.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagamma.errors import EvaluationError, MegagammaError
from megagamma.files import free_name, write_json, write_text
from megagamma.reading import read_json_value
from megagamma.reporting.tables import csv_table, format_score, markdown_table

FORMAT = 1
KEYS = ("identity", "task", "task_version", "fewshot", "limit", "seed", "settings", "versions")
_COLUMNS = (
    *("task", "kind", "metric", "filter", "value", "stderr", "higher_is_better", "smooth", "chance", "n", "n_total"),
    *("subsampled", "fewshot", "task_version", "limit", "seed", "identity"),
)

# The accuracy that stands for a task where there is room for one, in this order.
PRIMARY = ("acc_norm", "acc", "math_verify", "exact_match")
CONTINUOUS = ("choice_prob_norm", "answer_nats_per_byte", "choice_prob")


def plain(value: Any) -> Any:
    """A value of plain Python types as strict JSON takes it: numpy numbers unpacked, what is not finite as None."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
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
    for entry in record["metrics"]:
        if entry["metric"] == name and filter_name in (None, entry["filter"]):
            return dict(entry)
    return None


def leading(record: dict[str, Any], continuous: bool) -> dict[str, Any] | None:
    """The metric that stands for a task: its accuracy, or its continuous metric."""
    for name in CONTINUOUS if continuous else PRIMARY:
        entry = metric(record, name)
        if entry is not None:
            return entry
    return next((entry for entry in record["metrics"] if not entry["smooth"]), None) if not continuous else None


class ScoreFile:
    """`scores.json` and `scores.csv` of one model."""

    def __init__(self, folder: Path, say: Callable[[str], None] = print) -> None:
        """Read what is there. A corrupt file is set aside with a warning, and its tasks are scored again."""
        self.folder, self.path = folder, folder / "scores.json"
        self.records: list[dict[str, Any]] = []
        try:
            self.records = read_scores(self.path)
        except FileNotFoundError:
            pass
        except EvaluationError as error:
            aside = free_name(self.path.with_name(f"{self.path.name}.damaged"))
            os.replace(self.path, aside)
            say(f"WARNING {error}; set aside as {aside.name}, and scoring anew")

    def find(self, header: dict[str, Any]) -> dict[str, Any] | None:
        """The record with the same key, if it was scored already."""
        key = key_of(header)
        return next((record for record in self.records if key_of(record) == key), None)

    def add(self, record: dict[str, Any]) -> None:
        """Keep a record, in place of one with the same key, and write both files."""
        key = key_of(record)
        self.records = [other for other in self.records if key_of(other) != key] + [record]
        write_json(self.path, {"format": FORMAT, "records": self.records})
        write_text(self.folder / "scores.csv", as_csv(self.records))


def read_scores(path: Path) -> list[dict[str, Any]]:
    """The records of a `scores.json`.

    Raises:
        FileNotFoundError: there is none.
        EvaluationError: it is corrupt, or of another format.
    """
    try:
        value = read_json_value(path, finite=False)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise MegagammaError(f"{path}: cannot be read ({error.strerror}): choose another folder") from error
    except ValueError as error:
        raise EvaluationError(f"{path}: cannot be read ({error}): delete it to score anew") from error
    records = value.get("records") if isinstance(value, dict) and value.get("format") == FORMAT else None
    if not isinstance(records, list) or not all(
        isinstance(record, dict) and isinstance(record.get("metrics"), list) and all(key in record for key in KEYS)
        for record in records
    ):
        raise EvaluationError(f"{path}: is not a score file of format {FORMAT}: delete it to score anew")
    return records


@dataclass
class Scores:
    """Scores of one model for one request.

    Attributes:
        content_hash: of the weights.
        records: one per task, in the order of the request, then one per group.
        failures: reason by task, for tasks that could not be scored.
        new: tasks that were scored now; the others were scored before.
    """

    content_hash: str
    records: list[dict[str, Any]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)

    def record(self, task: str) -> dict[str, Any] | None:
        """The record of a task or group."""
        return next((record for record in self.records if record["task"] == task), None)

    def value(self, task: str, name: str, filter_name: str | None = None) -> float | None:
        """A score, or None where there is none."""
        record = self.record(task)
        entry = metric(record, name, filter_name) if record else None
        return entry["value"] if entry else None

    def flat(self) -> dict[str, float]:
        """`task/metric` -> value, and `task/metric@filter` for every filter but a task's first."""
        values: dict[str, float] = {}
        for record in self.records:
            for entry in record["metrics"]:
                name = f"{record['task']}/{entry['metric']}"
                name = f"{name}@{entry['filter']}" if name in values else name
                if entry["value"] is not None:
                    values[name] = entry["value"]
        return values

    def table(self) -> str:
        """Every score with its standard error, for the console."""
        return as_table(self.records, self.failures)


def as_csv(records: Iterable[dict[str, Any]]) -> str:
    """One row per task and metric."""
    return csv_table(_COLUMNS, ({**record, **entry} for record in records for entry in record["metrics"]))


def as_table(records: Iterable[dict[str, Any]], failures: dict[str, str] | None = None) -> str:
    """Scores as a Markdown table. Continuous metrics are marked ~, sets of which only a part was scored with *."""
    rows, subsampled = [], False
    for record in records:
        subsampled |= bool(record["subsampled"])
        star = "*" if record["subsampled"] else ""
        shots = "-" if record["fewshot"] is None else record["fewshot"]
        for entry in record["metrics"]:
            name = entry["metric"] + (f" ({entry['filter']})" if entry["filter"] != "none" else "")
            name += " ~" if entry["smooth"] else ""
            score, chance = format_score(entry["value"], entry["stderr"]), format_score(entry.get("chance"))
            better = {True: "higher", False: "lower", None: "-"}[entry["higher_is_better"]]
            rows.append((record["task"], shots, f"{record['n']}{star}", name, score, chance, better))
    lines = [markdown_table(("task", "shots", "n", "metric", "score", "chance", "better"), rows)]
    if subsampled:
        lines.append("* only a part of the set was scored")
    lines += [f"not scored: {task}: {reason}" for task, reason in (failures or {}).items()]
    return "\n".join(lines)


def reason(error: BaseException, length: int = 300) -> str:
    """An error in one line; of foreign ones the class too."""
    text = " ".join(str(error).split())
    text = text if isinstance(error, EvaluationError) else f"{type(error).__name__}: {text}"
    return text if len(text) <= length else text[:length] + "..."
