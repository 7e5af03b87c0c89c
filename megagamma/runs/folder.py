"""The folder of a run. The one place that knows its file names; it reads and writes all of them.

    config.yaml        the config as given, reloadable; config.before-1.yaml: one that was written by hand, as it was
    resolved.json      what it became: device, dtype, ZeRO stage, parallel sizes, DeepSpeed's values
    provenance.json    versions, source, command, hosts
    init_report.json   target and measured std of every matrix
    metrics.jsonl      numbers of the steps; metrics.before-1.jsonl: of an earlier start, whose checkpoints are gone;
                       metrics.unreadable.jsonl: lines that could not be read at a resume
    events.jsonl       what happened: starts, warnings, checkpoints
    attempts.jsonl     starts and ends of its processes, where a supervisor looks after them
    logs/              attempt-3/rank-0.log ...: what the ranks of each attempt printed
    samples.jsonl      texts that the model wrote
    tokenizer.model    the tokenizer of the data
    checkpoints/       step_00001000/ ...
    hf/                exported models, one per checkpoint
    eval/              benchmark scores
    .lock              who trains in it now, see `megagamma.runs.lock`

Readers never take the lock: each file is complete whenever it is there, and lines are appended whole.
"""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path
from typing import Any, Literal

from megagamma.config.schema import Config, RunConfig
from megagamma.errors import CheckpointError, ConfigurationError, DataError, MegagammaError
from megagamma.files import JsonLines, copy_file, first_free, read_json, require_writable, write_json
from megagamma.owned import require_place
from megagamma.reading import Unreadable

_STEP_NAME = re.compile(r"step_(\d{8})")


def folder_name(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"step_{step:08d}"


def is_step_name(name: str) -> bool:
    """Whether a name is one that `folder_name` gives."""
    return _STEP_NAME.fullmatch(name) is not None


def steps_saved(root: Path) -> list[int]:
    """Steps of the finished checkpoints in a folder of checkpoints, ascending. Links are not counted, see `step_links`."""
    if not root.is_dir():
        return []
    names = (_STEP_NAME.fullmatch(entry.name) for entry in root.iterdir() if entry.is_dir() and not entry.is_symlink())
    return sorted(int(name.group(1)) for name in names if name)


def step_links(root: Path) -> list[Path]:
    """Links in a folder of checkpoints that are named as checkpoints.

    A run never writes them, so they are none of its checkpoints: it neither resumes from nor deletes them.
    """
    if not root.is_dir():
        return []
    return sorted(entry for entry in root.iterdir() if entry.is_symlink() and is_step_name(entry.name))


def is_checkpoint(path: Path) -> bool:
    """Whether a path is a checkpoint's folder, wherever it lies and whatever its name is now."""
    return (path / "checkpoint.json").is_file()


def is_run(path: Path) -> bool:
    """Whether a path is a run's folder: every run writes its config."""
    return (path / "config.yaml").is_file()


def _is_saved_config(path: Path) -> bool:
    """Whether a config file has the form that a run gives it: no comments, every section in a row."""
    from megagamma.config.yaml_reader import read_yaml, write_yaml

    with contextlib.suppress(OSError, Unreadable):
        return write_yaml(read_yaml(path)) == path.read_text(encoding="utf-8")
    return False


def kind_of_folder(path: Path) -> Literal["run", "checkpoint", "checkpoints"] | None:
    """What a path is: a run, a checkpoint, a folder of checkpoints, or None of these.

    A folder that is named as a checkpoint but lacks checkpoint.json is one too, so that a reader can say that it is
    corrupt; unless it is a Hugging Face folder, as those in `hf/`, which have the same names. A folder that holds
    `checkpoints/` is a run even without its config, as after a copy of the checkpoints alone.
    """
    path = path.resolve()
    if not path.is_dir():
        return None
    if is_checkpoint(path):
        return "checkpoint"
    if is_run(path) or (path / "checkpoints").is_dir():
        return "run"
    if _STEP_NAME.fullmatch(path.name) and not (path / "config.json").is_file():
        return "checkpoint"
    return "checkpoints" if steps_saved(path) else None


def check_resume(run: RunConfig) -> None:
    """Check run.resume against what the run's folder holds.

    Raises:
        ConfigurationError, CheckpointError: there is a run where none may be, or no checkpoint where one must be.
    """
    folder, mode = RunFolder(run.folder), run.resume
    if mode == "never" and folder.holds_steps:
        raise ConfigurationError(
            f"run.folder={folder.path} holds a run already, and run.resume=never: choose another folder, or "
            "--run.resume auto"
        )
    if mode == "must" and not folder.steps():
        raise CheckpointError(
            f"run.folder={folder.path} holds no finished checkpoint, and run.resume=must: check the folder's name, or use "
            "--run.resume auto"
        )


def check_folder(run: RunConfig) -> None:
    """Check that the run's folder can be used as asked, and create it.

    Raises:
        ConfigurationError, CheckpointError, MegagammaError: it cannot.
    """
    require_place(Path(run.folder), f"run.folder={run.folder}", itself=("run",), around=("run",))
    check_resume(run)
    require_writable(run.folder, "run.folder")


class RunFolder:
    """The files of one run."""

    def __init__(self, path: str | Path) -> None:
        """Args: path: the folder. It need not be there yet: `require_run` checks it, and writers create it."""
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.resolved_file = self.path / "resolved.json"
        self.provenance_file = self.path / "provenance.json"
        self.init_report_file = self.path / "init_report.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.events_file = self.path / "events.jsonl"
        self.attempts_file = self.path / "attempts.jsonl"
        self.samples_file = self.path / "samples.jsonl"
        self.dynamics_file = self.path / "dynamics.jsonl"
        self.analysis_file = self.path / "analysis.jsonl"
        self.tokenizer_file = self.path / "tokenizer.model"
        self.checkpoints = self.path / "checkpoints"
        self.exports = self.path / "hf"
        self.evaluations = self.path / "eval"
        self.logs = self.path / "logs"
        self.lock_file = self.path / ".lock"
        self._place: tuple[int, int] | None = None

    @classmethod
    def of_checkpoint(cls, checkpoint: Path) -> RunFolder | None:
        """The run that a checkpoint or an exported model lies in; None when it lies elsewhere."""
        path = checkpoint.resolve()
        in_run = path.parent.name in ("checkpoints", "hf") and is_run(path.parent.parent)
        return cls(path.parent.parent) if in_run else None

    def has_moved(self) -> bool:
        """Whether the name leads to another folder, or to none, than when this was asked first."""
        try:
            state = os.stat(self.path)
        except FileNotFoundError:
            return True
        except OSError:
            return False  # a file system that does not answer for a moment
        self._place = self._place or (state.st_dev, state.st_ino)
        return self._place != (state.st_dev, state.st_ino)

    @property
    def name(self) -> str:
        """Name of the folder, by which tables and plots call the run."""
        return self.path.name

    def require_run(self) -> RunFolder:
        """This folder.

        Raises:
            DataError: it is not the folder of a run.
        """
        if not is_run(self.path):
            raise DataError(f"{self.path}: not the folder of a run: config.yaml is missing")
        return self

    # -- checkpoints and what is made of them --------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending."""
        return steps_saved(self.checkpoints)

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.checkpoints / folder_name(step)

    def newest_checkpoint(self) -> Path | None:
        """Folder of the last finished checkpoint."""
        steps = self.steps()
        return self.checkpoint(steps[-1]) if steps else None

    def export(self, step: int) -> Path:
        """Folder of the Hugging Face model made of the checkpoint of a step."""
        return self.exports / folder_name(step)

    @property
    def holds_steps(self) -> bool:
        """Whether a run has trained here: another one must not start over it."""
        return bool(self.steps()) or self.metrics_file.exists()

    # -- files written once per start ----------------------------------------------------------------------------

    def read_config(self) -> Config:
        """The run's config, resolved.

        Raises:
            ConfigurationError: it is missing, or not a config.
        """
        from megagamma.config.io import load_config  # a reader that wants no config needs the standard library only

        return load_config(self.config_file)

    def write_config(self, config: Config) -> Path | None:
        """Write the run's config, so that `read_config` gives the same.

        Returns:
            Where a config.yaml that somebody wrote by hand is kept, with its comments; None where there was none.
        """
        from megagamma.config.io import save_config

        kept = None
        if self.config_file.exists() and not _is_saved_config(self.config_file):
            kept = first_free(self.path, "config.before-", ".yaml")
            copy_file(self.config_file, kept)
        save_config(config, self.config_file)
        return kept

    def read_resolved(self) -> dict[str, Any]:
        """What the config became when the run was started last.

        Raises:
            MegagammaError: it is missing, as in runs of earlier versions, or cannot be read.
        """
        return read_json(self.resolved_file)

    def chosen(self) -> dict[str, Any]:
        """What the run chose where an option is `auto`; what it does not say is left out."""
        try:
            values = self.read_resolved()
        except MegagammaError:
            return {}
        return {key: values[key] for key in ("device", "dtype", "compiled") if key in values}

    def write_resolved(self, values: dict[str, Any]) -> None:
        """Write what the config became: plain JSON values."""
        write_json(self.resolved_file, values)

    def read_provenance(self) -> dict[str, Any]:
        """Where the run comes from: see `megagamma.runs.provenance`.

        Raises:
            MegagammaError: it is missing, as in an imported run, or cannot be read.
        """
        return read_json(self.provenance_file)

    def write_provenance(self, values: dict[str, Any]) -> None:
        """Write where the run comes from."""
        write_json(self.provenance_file, values)

    def read_init_report(self) -> dict[str, Any]:
        """Target and measured std: see `megagamma.initialization.report.as_json`.

        Raises:
            MegagammaError: it is missing, as in an imported run, or cannot be read.
        """
        return read_json(self.init_report_file)

    def write_init_report(self, values: dict[str, Any]) -> None:
        """Write the report of the initial weights."""
        write_json(self.init_report_file, values)

    def write_tokenizer(self, source: str | Path) -> None:
        """Copy the tokenizer of the data, so that the folder has all that an export needs."""
        copy_file(source, self.tokenizer_file)

    # -- files of lines ------------------------------------------------------------------------------------------

    def metrics(self) -> JsonLines:
        """Numbers of the steps, by ascending step."""
        return JsonLines(self.metrics_file)

    def events(self) -> JsonLines:
        """What happened, by time."""
        return JsonLines(self.events_file)

    def attempts(self) -> JsonLines:
        """Starts and ends of its processes, by time: see `megagamma.launching.attempts`."""
        return JsonLines(self.attempts_file)

    def attempt_logs(self, attempt: int) -> Path:
        """Folder of the logs of an attempt."""
        return self.logs / f"attempt-{attempt}"

    def samples(self) -> JsonLines:
        """Texts that the model wrote, by ascending step."""
        return JsonLines(self.samples_file)

    def dynamics(self) -> JsonLines:
        """Numbers of its matrices that the run measured, by ascending step: see `megagamma.dynamics`."""
        return JsonLines(self.dynamics_file)

    def analysis(self) -> JsonLines:
        """The same, measured from its checkpoints afterwards; a step may come again, and its last line holds."""
        return JsonLines(self.analysis_file)


def checkpoint_folders(path: Path, step: int | None = None) -> list[Path]:
    """The finished checkpoints that a path means, oldest first.

    Args:
        path: a checkpoint's folder, a run's, or a run's `checkpoints`.
        step: of a run's checkpoints only this one.

    Raises:
        CheckpointError: there is none.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such folder: give a checkpoint's, or a run's")
    kind = kind_of_folder(path)
    if kind == "checkpoint":
        if step is not None and path.resolve().name != folder_name(step):
            raise CheckpointError(f"--step {step}: {path} is one checkpoint: give the run's folder")
        return [path]
    root = RunFolder(path).checkpoints if kind == "run" else path
    steps = steps_saved(root)
    if not steps:
        raise CheckpointError(f"{path}: holds no finished checkpoint: give a checkpoint's folder, or a run's")
    if step is not None and step not in steps:
        raise CheckpointError(f"--step {step}: {path} has checkpoints of steps {', '.join(map(str, steps))}")
    return [root / folder_name(one) for one in (steps if step is None else [step])]
