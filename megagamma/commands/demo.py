"""The demo: what the scale of initialization decides, in minutes, on a task whose answer is known and on real text.

    make demo        # or, in the source tree: megagamma demo

First a small model learns to apply two functions one after the other (docs/toys.md), drawn as usual (gamma 0.5) and small
(gamma 1), and is asked for a pair of functions that it never saw. Then a small GPT is pretrained on real text three times: as
usual, small but for embedding and head, and small everywhere, each at the learning rate that did best for it. The best one is
converted to a Hugging Face folder, proved to be the same model, and scored by lm-eval on a task made of held-out text. Two
pages show it all. Whatever the result is, it is printed.

Further arguments go to every run on text, such as `--run.steps 600`; `--output FOLDER` writes elsewhere than to runs/demo, and
`--toy_steps N` shortens the toy. A demo that was stopped resumes when it is started again.
`make demo-long` is the study with seeds and tuned learning rates.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from megagamma.cli import source_tree
from megagamma.commands.report import write_report
from megagamma.errors import MegagammaError
from megagamma.files import write_json, write_text
from megagamma.reporting.comparison import as_table, plot
from megagamma.reporting.log import duration
from megagamma.runs.compare import RunRecord, comparison, read_run

# Relative to the source tree, as all paths here.
OUTPUT = Path("runs/demo")


@dataclass(frozen=True)
class Arm:
    """One run of the demo."""

    name: str
    """What it is called in sentences; its folder's name follows."""
    config: str
    options: tuple[str, ...]

    def folder(self, output: Path) -> Path:
        """Of its run."""
        return output / self.name.replace(" ", "_").replace(",", "")


TOY = tuple(
    Arm(f"toy, gamma {gamma}", "configs/toys/composite_anchors_short.yaml", ("--init.gamma", gamma))
    for gamma in ("0.5", "1.0")
)
# Enough to see weights condense, within the minutes that a demo may take.
_SHORT = ("--run.steps", "200", "--dynamics.log_spaced", "true")
# Learning rates: the best of each arm in configs/sweeps/learning_rate_short.yaml.
TEXT = (
    Arm("gamma 0.5", "configs/demo.yaml", ("--init.gamma", "0.5", "--optimizer.lr", "0.008", *_SHORT)),
    Arm(
        "inner gamma 1", "configs/demo.yaml",
        ("--init.gamma", "1.0", "--init.embedding", "0.5", "--init.head", "0.5", "--optimizer.lr", "0.004", *_SHORT),
    ),
    Arm("gamma 1", "configs/demo.yaml", ("--init.gamma", "1.0", "--optimizer.lr", "0.004", *_SHORT)),
)  # fmt: skip


STUDY = "configs/sweeps/learning_rate_fresh.yaml"
RECORDED = Path("docs/findings/learning_rate_fresh.csv")
"""The table of STUDY."""


def _launcher_environment() -> dict[str, str]:
    """This process's environment, in which DeepSpeed's launcher need not warn that it sees no GPU."""
    import torch

    return dict(os.environ) if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu", **os.environ}


def train(arm: Arm, output: Path, arguments: list[str]) -> RunRecord:
    """One arm, through the DeepSpeed launcher as a user would start it."""
    command = [
        *(str(Path(sys.executable).parent / "deepspeed"), "--log_level", "error", "--num_gpus", "1"),
        "megagamma/pretrain.py",
        *("--config", arm.config, *arm.options, "--run.folder", str(arm.folder(output)), *arguments),
    ]
    print(f"\n== {arm.name}: deepspeed {' '.join(command[3:])}", flush=True)
    code = subprocess.run(command, check=False, env=_launcher_environment()).returncode
    if code:
        raise MegagammaError(f"the run {arm.name} ended with exit code {code}; see its messages above")
    return read_run(arm.folder(output))


def convert_and_score(run: Path, output: Path) -> None:
    """Convert a run's last checkpoint and score it on continuations of held-out text, as a user would."""
    # Imported late: it brings in torch.
    from megagamma.config.io import load_config
    from megagamma.data.sources import prepared_folders
    from megagamma.evaluation.continuation import NAME, write_continuation

    (prepared, *_) = prepared_folders(load_config(run / "config.yaml"))
    tasks = write_continuation(Path(prepared), output / "tasks")
    command = [
        *(sys.executable, "-m", "megagamma.commands", "convert_and_eval", str(run), "--overwrite"),
        *("--tasks", NAME, "--include_path", str(tasks)),
    ]
    print(f"\n== {' '.join(command[1:])}", flush=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        raise MegagammaError(f"the conversion of {run.name} ended with exit code {code}; see its messages above")


def toy_sentence(runs: list[RunRecord]) -> str:
    """What was answered to the pair that was never seen."""
    parts = []
    for arm, run in zip(TOY, runs, strict=True):
        composed, memorized = (run.last(f"val/held_out/{key}") or 0.0 for key in ("composed", "memorized"))
        parts.append(f"{arm.name.split(', ')[1]} composes {composed:.0%} of its answers and memorized {memorized:.0%}")
    seen = min(run.last("val/seen/right") or 0.0 for run in runs)
    return (
        f"Asked for a pair of functions that no model saw, {'; '.join(parts)}; both know the pairs that they saw "
        f"(at least {seen:.0%} right). One seed each; five are in docs/findings.md."
    )


def _loss(run: RunRecord) -> float:
    """Held-out loss at the end, or that of training; one that is missing or no number is worse than any."""
    key = f"val/{run.validation_names[0]}/loss" if run.validation_names else "loss"
    loss = run.last(key)
    return loss if loss is not None and math.isfinite(loss) else math.inf


def text_sentence(losses: list[float], steps: int) -> str:
    """Where the arms ended, and what that says."""
    order = sorted(range(len(losses)), key=losses.__getitem__)
    ends = ", ".join(f"{TEXT[index].name} {losses[index]:.3f}" for index in order)
    return (
        f"On text, {steps} steps end at, in nats per token: {ends}. Seeds and rounding move such ends, so that one run of "
        "each is undecided; earlier work saw small initialization fall behind at first and lead later (docs/claims.md), and "
        "docs/findings.md has longer runs with seeds."
    )


def main(arguments: list[str] | None = None) -> int:
    """Train all arms, compare them, convert and score the best one on text, write the pages."""
    parser = argparse.ArgumentParser(
        prog="megagamma demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder (default: %(default)s of the source tree)")
    parser.add_argument("--toy_steps", type=int, help="steps of the toy (default: those of its config)")
    given, of_text = parser.parse_known_args(arguments)
    # Imported late: it brings in numpy.
    from megagamma.report.outcomes import recorded

    begin = time.perf_counter()
    os.chdir(source_tree())
    output: Path = given.output
    of_toys = [] if given.toy_steps is None else ["--run.steps", str(given.toy_steps)]
    toys = [train(arm, output, of_toys) for arm in TOY]
    texts = [train(arm, output, of_text) for arm in TEXT]
    rows = comparison(texts)
    table = as_table(rows)
    write_text(output / "table.md", table + "\n")
    write_json(output / "table.json", rows)
    plot(texts, output / "loss.png")
    print(f"\n{table}\n")
    for arm, run in zip(TEXT, texts, strict=True):
        if run.samples:
            last = run.samples[-1]
            print(f"{arm.name} writes: {last['prompt']}{last['text']}\n")
    losses = [_loss(run) for run in texts]
    convert_and_score(TEXT[min(range(len(losses)), key=losses.__getitem__)].folder(output), output)
    pages = (output / "toy.html", output / "report.html")
    print()
    write_report([arm.folder(output) for arm in TOY], pages[0], "Composing or memorizing: what initialization decides")
    longer = recorded(
        RECORDED,
        "Held-out loss of longer runs, each arm at its best learning rate",
        f"Six times as long, three seeds, as recorded in docs/findings.md; the band is the 95 % interval over seeds. Made by "
        f"`python tools/sweep.py run {STUDY}`.",
    )
    write_report(
        [arm.folder(output) for arm in TEXT], pages[1], "A small GPT on text, drawn in three ways", recorded=[longer]
    )
    print(
        f"\n1. {toy_sentence(toys)}\n2. {text_sentence(losses, texts[0].metrics[-1]['step'])}\n"
        f"3. Open {pages[0]} and {pages[1]} in a browser: answers, losses, and how weights condense; `make demo-long` is the "
        f"study.\nWhole demo: {duration(time.perf_counter() - begin)}."
    )
    return 0
