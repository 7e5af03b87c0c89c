"""What a run tells: metrics.jsonl, events.jsonl, the console, and wandb as a mirror."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from megagamma.config.schema import LoggingConfig
from megagamma.errors import MegagammaError
from megagamma.files import advice, write_text


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


class JsonLines:
    """A file of JSON objects, one a line, that survives a kill: each line is written whole and flushed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: TextIO | None = None

    def keep_until(self, step: int) -> None:
        """Drop lines of later steps, and a last line that a kill cut off, so that a resumed run repeats nothing."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(values, dict) and values.get("step", 0) <= step:
                kept.append(line)
        write_text(self.path, "".join(line + "\n" for line in kept))

    def write(self, values: dict[str, Any]) -> None:
        """Append one object. A number that is not finite becomes null, as JSON has no word for it."""
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in values.items()
        }
        try:
            if self._file is None:
                self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - kept open for the run
            self._file.write(json.dumps(clean) + "\n")
            self._file.flush()
        except OSError as error:
            raise MegagammaError(f"{self.path}: cannot be written ({error.strerror}): {advice(error)}") from error

    def close(self) -> None:
        if self._file is not None:
            # What could not be written was an error then; here it would hide that one.
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


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
                project=logging.wandb_project, name=name, dir=str(folder), config=config, mode=logging.wandb
            )
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
        self, folder: Path, logging: LoggingConfig, name: str, config: dict[str, Any], is_main: bool, start_step: int
    ) -> None:
        """Args: start_step: lines of later steps, from before a resume, are dropped."""
        self.is_main, self.logging = is_main, logging
        if not is_main:
            return
        self.metrics = JsonLines(folder / "metrics.jsonl")
        self.events = JsonLines(folder / "events.jsonl")
        self.samples = JsonLines(folder / "samples.jsonl")
        self.metrics.keep_until(start_step)
        self.samples.keep_until(start_step)
        self.wandb = WandbMirror(logging, name, folder, config)

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
