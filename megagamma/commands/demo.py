"""The demo: pretrain a small GPT on real text twice, drawn small (gamma 1) and as usual (gamma 0.5).

    make demo        # or, in the source tree: megagamma demo

Everything but init.gamma is equal. Prints a table, a plot of the loss curves and a text sample of each, whatever the
result is; then converts the arm with the lower validation loss to a Hugging Face folder, proves that it is the same
model, and scores it by lm-eval on a task made of the held-out text. Further arguments go to both runs, such as
`--run.steps 600`. A demo that was stopped resumes when it is started again.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path

from megagamma.cli import source_tree
from megagamma.errors import MegagammaError
from megagamma.files import write_json, write_text
from megagamma.reporting.comparison import as_table, plot
from megagamma.reporting.log import duration
from megagamma.runs.compare import comparison, read_run

GAMMAS = (1.0, 0.5)
# Relative to the source tree, as all paths here.
OUTPUT = Path("runs/demo")


def _launcher_environment() -> dict[str, str]:
    """This process's environment, in which DeepSpeed's launcher need not warn that it sees no GPU."""
    import torch

    return dict(os.environ) if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu", **os.environ}


def train(gamma: float, arguments: list[str]) -> Path:
    """One arm, through the DeepSpeed launcher as a user would start it; returns its folder, relative to the source tree."""
    folder = Path("runs") / f"demo-gamma{gamma:g}"
    command = [
        *(str(Path(sys.executable).parent / "deepspeed"), "--log_level", "error", "--num_gpus", "1"),
        "megagamma/pretrain.py",
        *("--config", "configs/demo.yaml", "--init.gamma", str(gamma), "--run.folder", str(folder), *arguments),
    ]
    print(f"\n== gamma {gamma:g}: deepspeed {' '.join(command[3:])}", flush=True)
    code = subprocess.run(command, check=False, env=_launcher_environment()).returncode
    if code:
        raise MegagammaError(f"the run with gamma {gamma:g} ended with exit code {code}; see its messages above")
    return folder


def convert_and_score(run: Path) -> None:
    """Convert a run's last checkpoint and score it on continuations of held-out text, as a user would."""
    # Imported late: it brings in torch.
    from megagamma.config.io import load_config
    from megagamma.data.sources import prepared_folders
    from megagamma.evaluation.continuation import NAME, write_continuation

    (prepared, *_) = prepared_folders(load_config(run / "config.yaml"))
    tasks = write_continuation(Path(prepared), OUTPUT / "tasks")
    command = [
        *(sys.executable, "-m", "megagamma.commands", "convert_and_eval", str(run), "--overwrite"),
        *("--tasks", NAME, "--include_path", str(tasks)),
    ]
    print(f"\n== {' '.join(command[1:])}", flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        raise MegagammaError(f"the conversion of {run.name} ended with exit code {code}; see its messages above")


def _finite(loss: float | None) -> float:
    """A loss to compare by; one that is missing or no number is worse than any."""
    return loss if loss is not None and math.isfinite(loss) else math.inf


def main(arguments: list[str] | None = None) -> int:
    """Train both arms, compare them, convert and score the better one."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        return 0
    begin = time.perf_counter()
    os.chdir(source_tree())
    folders = [train(gamma, arguments) for gamma in GAMMAS]
    runs = [read_run(folder) for folder in folders]
    rows = comparison(runs)
    text = as_table(rows)
    write_text(OUTPUT / "table.md", text + "\n")
    write_json(OUTPUT / "table.json", rows)
    plot(runs, OUTPUT / "loss.png")
    print(f"\n{text}\n")
    for run in runs:
        if run.samples:
            last = run.samples[-1]
            print(f"gamma {run.gamma:g} writes: {last['prompt']}{last['text']}\n")
    held_out = [run.last(f"val/{run.validation_names[0]}/loss") if run.validation_names else None for run in runs]
    losses = [run.last("loss") if loss is None else loss for run, loss in zip(runs, held_out, strict=True)]
    better = min(range(len(runs)), key=lambda index: _finite(losses[index]))
    print(f"The better arm is gamma {runs[better].gamma:g}.")
    convert_and_score(folders[better])
    print(
        "\nA run this short need not show the published effect: earlier work of the paper's group saw small "
        "initialization fall behind at first and win later (docs/claims.md).\n"
        f"Curves: {OUTPUT / 'loss.png'}. Whole demo: {duration(time.perf_counter() - begin)}."
    )
    return 0
