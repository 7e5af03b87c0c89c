"""Plan, run, submit and collect a sweep: sizes x gamma x seeds, compared fairly.

    megagamma sweep plan configs/sweeps/smoke.yaml           # points, FLOPs, time, memory, what arms differ in
    megagamma sweep run configs/sweeps/smoke.yaml            # here, several points at a time; again: resumes
    megagamma sweep submit configs/sweeps/scale.yaml         # under SLURM; again: only what is missing
    megagamma sweep status configs/sweeps/smoke.yaml
    megagamma sweep collect configs/sweeps/smoke.yaml        # table.csv and table.parquet of every validation
    megagamma sweep evaluate configs/sweeps/smoke.yaml -- --tasks reasoning       # options of convert_and_eval
    megagamma sweep report configs/sweeps/smoke.yaml                              # report.html in the sweep's folder
    megagamma sweep retry configs/sweeps/smoke.yaml [POINT]  # lets points that were given up run again
    megagamma sweep cancel configs/sweeps/smoke.yaml         # ends the runner or the jobs; points save first

The state lies in runs/sweeps/NAME. A point is known by the content of its config and data: finished ones are skipped, also
after the file was extended. Exit codes: 0; 1 when points were given up; 2 for what must be fixed before; 75 when stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

from megagamma.commands.report import add_tokens_option, write_report
from megagamma.config.schema import Config
from megagamma.environment import visible_gpus
from megagamma.errors import CheckpointError, ConfigurationError, DataError
from megagamma.files import write_text
from megagamma.launching.slurm import SlurmError
from megagamma.reporting.tables import csv_table, fitted_table
from megagamma.runs.lock import read_lock
from megagamma.scaling import collect as results
from megagamma.scaling import submit as slurm
from megagamma.scaling.effects import effect_lines, effects, parameter_note
from megagamma.scaling.folder import PointState, SweepFolder, code_hash, forgive
from megagamma.scaling.paired import paired_differences, paired_lines, score_differences
from megagamma.scaling.plan import Speed, make_plan, plan_text, speed_of
from megagamma.scaling.points import Point, embedded_folder, expand, vocabulary_of
from megagamma.scaling.registration import notice_other_code, register
from megagamma.scaling.spec import Sweep, read_sweep
from megagamma.scaling.tuning import best_values, last_loss, learning_rate_line


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    summaries = {
        "plan": "what the sweep is and costs; starts nothing",
        "run": "run the points on this machine",
        "submit": "run the points as SLURM jobs",
        "status": "what has become of every point",
        "collect": "write the table of every validation",
        "evaluate": "convert the finished points and score them on benchmarks",
        "report": "write a page about the points: losses, and how weights condense and expand",
        "retry": "let points that were given up run again",
        "cancel": "end the runner, or the jobs",
    }
    for name, text in summaries.items():
        action = actions.add_parser(name, help=text, description=text)
        action.add_argument("sweep", type=Path, help="the sweep's YAML file")
        action.add_argument("--state", type=Path, help="folder of the sweep (default runs/sweeps/NAME)")
        action.add_argument("--budget", type=float, nargs="+", metavar="FLOPS", help="FLOPs per point; tokens follow")
        action.add_argument("--json", action="store_true", help="print JSON in place of text")
        action.add_argument(
            "--tree", type=Path, help=argparse.SUPPRESS
        )  # where the sweep's config files are looked up first
        if name in ("plan", "submit"):
            action.add_argument(
                "--device", default="", help="GPU to plan for, such as H100, or cpu (default: what is here)"
            )
            action.add_argument(
                "--mfu", type=float, help="share of the device's peak to plan with (default: measured, or 0.4)"
            )
        if name in ("run", "submit"):
            action.add_argument(
                "--strict_code", action="store_true", help="redo points that another version of the code finished"
            )
        if name == "run":
            action.add_argument("--at_once", type=int, help="points at a time (default: by GPUs or cores)")
        if name == "submit":
            slurm.add_arguments(action)
        if name == "evaluate":
            action.add_argument("options", nargs="*", metavar="-- OPTION", help="options of megagamma convert_and_eval")
        if name == "report":
            add_tokens_option(action)
        if name == "retry":
            action.add_argument("points", nargs="*", help="names of points (default: all that were given up)")
    return parser


def _folder(args: argparse.Namespace, sweep: Sweep) -> SweepFolder:
    return SweepFolder(args.state or Path("runs") / "sweeps" / sweep.name)


def _load(args: argparse.Namespace, any_budget: bool = False) -> tuple[Sweep, SweepFolder, list[Point]]:
    sweep = read_sweep(args.sweep, None if args.budget is None else tuple(args.budget), args.tree)
    folder = _folder(args, sweep)
    folder.check(sweep, any_budget)
    points = expand(sweep, folder.points)
    for point in points if args.tree else ():
        slurm.freeze(point, args.tree)
    return sweep, folder, points


def prepare_data(points: list[Point]) -> None:
    """Prepare embedded texts once, before points start, and check that folders are there.

    Raises:
        DataError: a folder that is missing or corrupt.
    """
    from megagamma.data.preparation.prepare import embedded_settings, prepare

    seen = set()
    for point in points:
        data, size = point.config.data, point.config.tokenizer.vocab_size
        key = (data.corpus, data.cache, size, tuple(data.paths))
        if data.corpus and key not in seen:
            prepare(embedded_settings(data.corpus, data.cache, vocab_size=size))
        seen.add(key)


def _states(folder: SweepFolder, points: list[Point], sweep: Sweep) -> tuple[list[PointState], list[str]]:
    """States of all points; none, and a warning, where their data or the trunk that they branch from is not there.

    An embedded text that is not prepared yet is no surprise: `run` prepares it.
    """
    try:
        return folder.states(points, sweep.retries), []
    except (CheckpointError, DataError) as error:
        texts = [Path(embedded_folder(point.config)) for point in points if point.config.data.corpus]
        if isinstance(error, DataError) and not all(text.is_dir() for text in texts) and not folder.known():
            return [], []
        return [], [f"{error}; until then no point can run, and none is known to be finished"]


def _assumes_vocabulary(points: list[Point]) -> bool:
    return any(vocabulary_of(point.config) is None for point in points)


def plan(args: argparse.Namespace) -> int:
    """Print the plan."""
    sweep, folder, points = _load(args, any_budget=True)
    states, warnings = _states(folder, points, sweep)
    speed = speed_of(states, args.device, args.mfu, bool(visible_gpus()))
    values = make_plan(sweep, points, states, speed, _assumes_vocabulary(points))
    values["warnings"] = warnings + values["warnings"]
    if args.json:
        print(json.dumps(values, indent=2))
    else:
        print(plan_text(values))
    return 0


def run(args: argparse.Namespace) -> int:
    """Run the points here."""
    sweep, folder, points = _load(args)
    from megagamma.scaling.runner import Runner, divide

    on_gpus = bool(visible_gpus()) and any(point.config.run.device != "cpu" for point in points)
    if not on_gpus:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read by DeepSpeed on its import, in the server
    resources = divide(args.at_once, max(point.launch.processes for point in points), on_gpus)

    def say(text: str) -> None:
        print(text, file=sys.stderr if args.json else sys.stdout, flush=True)

    folder.path.mkdir(parents=True, exist_ok=True)
    with folder.lock():
        folder.claim(sweep)
        prepare_data(points)
        points = expand(sweep, folder.points)  # again, now that vocabularies are known
        states = folder.states(points, sweep.retries)
        slurm.mark_queued(folder, states)
        # What cannot work is refused by its name, before anything runs.
        make_plan(sweep, points, states, Speed(1.0, "", "cuda" if on_gpus else "cpu"), assumed=False)
        code = code_hash()
        for state in notice_other_code(states, args.strict_code, code, say):
            folder.set_aside(state)
        register(folder, states, code, not on_gpus, _choose)
        say(
            f"sweep {sweep.name} in {folder.path}: {len(states)} points, {sum(s.is_final for s in states)} finished; "
            f"{resources.at_once} at a time, {resources.threads} threads each"
        )
        runner = Runner(folder, states, resources, sweep.retries, sweep.stop_lost, say)
        result = runner.run()
        if overhead := runner.overhead():
            say(overhead)
        _write_results(sweep, folder, states, args.json)
    return result


def _choose(config: Config, processes: int) -> dict[str, str]:
    # Imported late: it brings in torch.
    from megagamma.training.choices import choose_for_sweep

    return choose_for_sweep(config, processes)


def _write_results(sweep: Sweep, folder: SweepFolder, states: list[PointState], as_json: bool) -> None:
    rows = results.rows_of(sweep, states)
    results.write_table(folder, rows)
    results.draw(folder, sweep, states)
    summary = results.summary(sweep, states)
    warnings = best_values(sweep, states)[1] + results.machine_warnings(states)
    paired, factorial = paired_differences(sweep, states), effects(sweep, states)
    note = parameter_note(sweep, states) if factorial else ""
    warnings += [note] if note else []
    if as_json:
        values = {"rows": rows, "summary": summary, "warnings": warnings, "paired": paired}
        print(json.dumps({**values, "effects": [asdict(one) for one in factorial]}, indent=2))
        return
    cells = [
        (
            row["point"] + (" *" if row["best"] else ""), row["seeds"], f"{row['lr']:.3g}",
            "-" if row["loss"] is None else f"{row['loss']:.4f}",
            "-" if row["deviation"] is None else f"{row['deviation']:.4f}",
        )
        for row in summary
    ]  # fmt: skip
    titles = ("point", "seeds", "lr", "val loss", "std dev.")
    print("\n" + fitted_table(titles, cells))
    if any(row["best"] for row in summary):
        print("* best of its tuned axes")
    for line in (*paired_lines(paired), *effect_lines(factorial)):
        print(line)
    print(learning_rate_line(sweep, [state.point for state in states]))
    for warning in warnings:
        print(f"WARNING {warning}")
    print(f"wrote {folder.csv_file} and {folder.parquet_file}: {len(rows)} rows; {folder.figure_file.name} beside them")


def collect(args: argparse.Namespace) -> int:
    """Write the table."""
    sweep, folder, points = _load(args)
    states = _require_states(folder, points, sweep)
    _write_results(sweep, folder, states, args.json)
    return 0


def _require_states(folder: SweepFolder, points: list[Point], sweep: Sweep) -> list[PointState]:
    if not folder.identity_file.exists():
        raise ConfigurationError(f"{folder.path}: this sweep was not run yet: megagamma sweep run {sweep.file}")
    states = folder.states(points, sweep.retries)
    slurm.mark_queued(folder, states)
    return states


def status(args: argparse.Namespace) -> int:
    """Print the state of every point."""
    sweep, folder, points = _load(args)
    states = _require_states(folder, points, sweep)
    if args.json:
        keys = ("hash", "status", "step", "attempts", "failures", "problem", "codes", "seconds")
        print(
            json.dumps(
                [
                    {"point": s.point.name, "steps": s.point.steps, **{key: getattr(s, key) for key in keys}}
                    for s in states
                ],
                indent=2,
            )
        )
        return 0
    counts: dict[str, int] = {}
    for state in states:
        counts[state.status] = counts.get(state.status, 0) + 1
    holder = read_lock(folder.path)
    if holder is not None and not holder.is_stale():
        print(f"run by {holder}")
    print(f"{len(states)} points: " + ", ".join(f"{number} {name}" for name, number in counts.items()))
    width = shutil.get_terminal_size((100, 24)).columns
    cells = [
        (s.point.name, s.status, f"{s.step}/{s.point.steps}", _loss_cell(s), str(s.attempts), _one_line(s.problem))
        for s in states
    ]
    titles = ("point", "status", "step", "loss", "attempts", "problem")
    for line in fitted_table(titles, cells).splitlines():
        print(line if len(line) <= width else line[: width - 3] + "...")
    return 0


def _one_line(text: str) -> str:
    return " ".join(text.split())[:60]


def _loss_cell(state: PointState) -> str:
    value = last_loss(state.metrics)
    return "-" if value is None else f"{value:.4f}"


def retry(args: argparse.Namespace) -> int:
    """Let points that were given up run again."""
    sweep, folder, points = _load(args)
    states = _require_states(folder, points, sweep)
    names = {state.point.name: state for state in states}
    retryable = ("given up", "failed", "diverged", "behind")
    for name in args.points:
        if name not in names:
            raise ConfigurationError(f"{name}: is not a point of {sweep.file}: see megagamma sweep status")
        if names[name].status not in retryable:
            raise ConfigurationError(
                f"{name}: is {names[name].status}: retry is for points that are {', '.join(retryable)}: leave it out"
            )
    chosen = [names[name] for name in args.points] or [s for s in states if s.status == "given up"]
    with folder.lock():
        for state in chosen:
            forgive(state)
    print(f"{len(chosen)} points may run again: megagamma sweep run {sweep.file}")
    return 0


def cancel(args: argparse.Namespace) -> int:
    """End the runner or the jobs."""
    sweep, folder, _ = _load(args)
    jobs, problem = [], None
    try:
        jobs = slurm.cancel_jobs(folder)
    except SlurmError as error:
        problem = error  # a runner here is ended all the same
    if jobs:
        print(f"cancelled jobs {', '.join(jobs)}; running points save first")
    holder = read_lock(folder.path)
    if holder is not None and not holder.is_stale():
        if holder.host != socket.gethostname():
            raise ConfigurationError(f"{folder.path}: is run by {holder}: cancel it on that host")
        os.kill(holder.pid, signal.SIGTERM)
        print(f"asked {holder} to stop; its points save first")
    elif not jobs:
        print(f"nothing of {sweep.name} is running" + (" here" if problem else ""))
    if problem is not None:
        raise problem
    return 0


def submit(args: argparse.Namespace) -> int:
    """Submit the points as SLURM jobs."""
    sweep, folder, points = _load(args)

    def say(text: str) -> None:
        print(text, file=sys.stderr if args.json else sys.stdout, flush=True)

    code = code_hash()
    redone: list[PointState] = []

    def check_points(on_gpus: bool) -> None:
        states, warnings = _states(folder, points, sweep)
        wants_speed = args.plan or args.device or args.mfu is not None
        lacks_torch = args.device in ("", "cpu") and find_spec("torch") is None
        if wants_speed and lacks_torch:
            say(
                "WARNING no plan: this Python has no torch to measure its speed with: name the GPU, such as --device H100"
            )
        if wants_speed and not lacks_torch:
            speed = speed_of(states, args.device, args.mfu, bool(visible_gpus()))
            if on_gpus and speed.device == "cpu":
                say("WARNING the plan is for this machine's CPU: --device names the GPU of the jobs, such as H100")
        else:  # what a point costs is not asked, and whether it can work depends on no speed
            speed = Speed(1.0, "", "cuda" if on_gpus else "cpu")
        values = make_plan(sweep, points, states, speed, _assumes_vocabulary(points))
        if speed.source:
            values["warnings"] = warnings + values["warnings"]
            say(plan_text(values))

    def prepared_states() -> list[PointState]:
        prepare_data(points)
        states = folder.states(expand(sweep, folder.points), sweep.retries)
        slurm.mark_queued(folder, states)
        redone.extend(notice_other_code(states, args.strict_code, code, say))
        for state in redone:
            state.forget()  # their folders stay where they are until SLURM has agreed
        return states

    def register_frozen(states: list[PointState], tree: Path) -> None:
        for state in redone:
            folder.set_aside(state)
        for state in states:
            slurm.freeze(state.point, tree)
        register(folder, states, code, all(point.config.run.device == "cpu" for point in points))

    result, values = slurm.submit_sweep(
        args, sweep, folder, points, check_points, prepared_states, register_frozen, say
    )
    if args.json:
        print(json.dumps(values, indent=2))
    return result


def evaluate(args: argparse.Namespace) -> int:
    """Convert the finished points and score them."""
    sweep, folder, points = _load(args)
    states = _require_states(folder, points, sweep)
    finished = [str(state.folder) for state in states if state.status == "done"]
    if not finished:
        raise ConfigurationError(f"{folder.path}: no point is finished: see megagamma sweep status {sweep.file}")
    from megagamma.commands.convert_and_eval import convert_and_score

    # First, so that options of the user come after it and win.
    result, scores = convert_and_score([*finished, "--eval_out", str(folder.path / "scores"), *args.options])
    rows = score_differences(sweep, states, scores)
    if rows:
        write_text(folder.path / "scores" / "differences.csv", csv_table(list(rows[0]), rows))
        print("\ndifferences between arms:")
    for row in rows:
        print(f"{row['task']}: {paired_lines([row], row['metric'])[0]}")
    return result


def report(args: argparse.Namespace) -> int:
    """Write a page about the points that have steps."""
    sweep, folder, points = _load(args)
    states = _require_states(folder, points, sweep)
    begun = [state.folder for state in states if (state.folder / "metrics.jsonl").is_file()]
    if not begun:
        raise ConfigurationError(f"{folder.path}: no point has steps yet: see megagamma sweep status {sweep.file}")
    write_report(begun, folder.path / "report.html", f"Sweep {sweep.name}", tokens=args.tokens)
    return 0


ACTIONS = {
    "plan": plan, "run": run, "submit": submit, "status": status, "collect": collect,
    "evaluate": evaluate, "report": report, "retry": retry, "cancel": cancel,
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Do one action; returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    # argparse would give a list of options its end at the sweep's file already.
    split = words.index("--") if words[:1] == ["evaluate"] and "--" in words else len(words)
    args = build_parser().parse_args(words[:split])
    if words[split + 1 :]:
        args.options = words[split + 1 :]
    return ACTIONS[args.action](args)
