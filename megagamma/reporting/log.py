"""What a run reports: metrics.jsonl, events.jsonl, the console, and wandb as a mirror."""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from megagamma.config.schema import LoggingConfig
from megagamma.files import JsonLines
from megagamma.runs.folder import RunFolder


def _cell(value: float, form: str) -> str:
    return "n/a" if value is None or not math.isfinite(value) else format(value, form)


def duration(seconds: float) -> str:
    """Seconds as 45s, 3m20s or 2h05m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


class WandbMirror:
    """wandb, offline unless asked. Whatever goes wrong with it is warned about once and never stops the run."""

    def __init__(self, logging: LoggingConfig, name: str, folder: Path, config: dict[str, Any]) -> None:
        self._run: Any = None
        if logging.wandb == "disabled":
            return
        try:
            os.environ.setdefault("WANDB_SILENT", "true")
            import wandb

            self._run = wandb.init(
                project=logging.wandb_project, name=name, group=logging.wandb_group or None, dir=str(folder),
                config=config, mode=logging.wandb,
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001 - a mirror must not break what it mirrors
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        self._run = None
        print(f"WARNING wandb failed and is left out from here on: {error}", file=sys.stderr, flush=True)

    def write(self, values: dict[str, Any]) -> None:
        if self._run is None:
            return
        try:
            self._run.log({key: value for key, value in values.items() if key != "step"}, step=values["step"])
        except Exception as error:  # noqa: BLE001
            self._warn(error)

    def close(self) -> None:
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:  # noqa: BLE001
            self._warn(error)


class Reporter:
    """Writes a run's numbers from rank 0; on other ranks it does nothing."""

    def __init__(
        self,
        folder: Path,
        logging: LoggingConfig,
        name: str,
        config: dict[str, Any],
        is_main: bool,
        start_step: int | None,
    ) -> None:
        """Args: start_step: of the checkpoint that is resumed: lines of later steps are dropped. None: there is none."""
        self.is_main, self.logging = is_main, logging
        if not is_main:
            return
        run = RunFolder(folder)
        self.folder = run
        run.has_moved()  # from here on
        self.metrics, self.events, self.samples = run.metrics(), run.events(), run.samples()
        for file in (self.metrics, self.samples):
            self._trim(file, start_step)
        self.wandb = WandbMirror(logging, name, folder, config)

    def _trim(self, file: JsonLines, start_step: int | None) -> None:
        """Drop a file's lines of later steps, which will be written again. Nothing goes without a word."""
        archive = file.archive() if start_step is None else None
        if archive is not None:
            self.warn(
                f"{file.path} has steps, and there is no checkpoint to resume from: the run starts at step 0, and they are "
                f"kept in {archive.name}"
            )
        unreadable = file.keep_until(start_step or 0)
        if unreadable:
            self.warn(
                f"{file.path}: lines that cannot be read: {unreadable}; kept as they are in {file.unreadable_file.name}"
            )

    def lost(self) -> str:
        """What has become of the run's folder or of a file in it that is written now, as text; empty if nothing.

        Somebody may delete or rename them while the run trains: what is written then has no name, or lies elsewhere.
        """
        if not self.is_main:
            return ""
        if self.folder.has_moved():
            return f"run.folder={self.folder.path}: the folder was deleted or renamed while the run trained in it"
        for file in (self.metrics, self.events, self.samples):
            if file.is_lost():
                return f"run.folder={self.folder.path}: {file.path.name} was deleted or replaced while the run wrote it"
        return ""

    def print(self, text: str) -> None:
        """Print on the console."""
        if self.is_main:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """Print a warning on the console and note it as an event."""
        if self.is_main:
            print(f"WARNING {text}", file=sys.stderr, flush=True)
            self.event("warning", text=text)

    def event(self, kind: str, **values: Any) -> None:
        """Note something that happened in events.jsonl."""
        if self.is_main:
            self.events.write({"time": time.time(), "event": kind, **values})

    def step(self, values: dict[str, Any], steps: int, console: bool, record: bool) -> None:
        """One step's metrics: to metrics.jsonl and wandb when `record`, and to the console when `console`."""
        if not self.is_main:
            return
        if record:
            self.metrics.write(values)
            self.wandb.write(values)
        if console:
            self.print(console_line(values, steps))

    def sample(self, step: int, prompt: str, text: str) -> None:
        """A text sample."""
        if self.is_main:
            self.samples.write({"step": step, "prompt": prompt, "text": text})
            self.print(f"  sample at step {step}: {prompt + text!r}")

    def close(self) -> None:
        if self.is_main:
            self.metrics.close()
            self.events.close()
            self.samples.close()
            self.wandb.close()


def console_line(values: dict[str, Any], steps: int) -> str:
    """One line: step, loss, gradient norm, learning rate, speed, utilization, memory, time left."""
    step = values["step"]
    slow = ""
    if "slowest_rank" in values:
        slow = f"  slowest rank {values['slowest_rank']} x{values['slowest_ratio']:.2f}"
    return (
        f"step {step:>{len(str(steps))}}/{steps}  loss {_cell(values['loss'], '.4f')}  "
        f"grad {_cell(values['grad_norm'], '.3f')}  lr {values['lr']:.2e}  "
        f"{_cell(values['tokens_per_second'], ',.0f')} tok/s  {_cell(values['tflops'], '.3g')} TFLOP/s  "
        f"MFU {_cell(values['mfu'], '.1%')}  {values['memory_gib']:.2f} GiB  eta {duration(values['eta_seconds'])}{slow}"
    )
