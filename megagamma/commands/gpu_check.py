"""Check one GPU in about ten minutes: the tests that need one, then the speed of a 1B model, as JSON and a table.

    megagamma gpu_check [--output gpu_check] [--micro_batch_size 4] [--model.attention_gate none ...]

It runs the tests marked `gpu`: random streams on the GPU against the CPU's bits, steps in bf16, ZeRO, recomputation and
offload, NCCL on one rank, flash attention, torch.compile, save and resume, export. Then it trains configs/model/1b.yaml
(vocabulary 32,000, sequences of 4,096 tokens, bf16, no Transformer Engine) on random tokens, and reports tokens/s, peak
memory and MFU with its formula. Further options are the model's. It needs the source tree and pytest.

Exit codes: 0; 1 when a test failed or none ran, or the benchmark failed; 2 for what must be fixed before, such as a machine
without a GPU.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

from megagamma.cli import source_tree
from megagamma.errors import ConfigurationError


def require_gpu(device: str) -> None:
    """Raise where the device is a GPU and there is none.

    Raises:
        ConfigurationError: one line.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError(
            "--device=cuda needs a GPU, and torch sees none here: run it on a machine with one (nvidia-smi must list it, and "
            "torch must be built for CUDA), or try the command itself with --device cpu"
        )


def run_tests(tree: Path, selection: list[str]) -> dict[str, str]:
    """passed, failed or skipped, by test.

    Args:
        tree: the source tree.
        selection: arguments of pytest.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-n",
            "0",
            "-p",
            "no:cacheprovider",
            f"--junitxml={report}",
            *selection,
        ]
        subprocess.run(command, cwd=tree, check=False)
        return outcomes(report.read_text(encoding="utf-8")) if report.exists() else {}


def outcomes(report: str) -> dict[str, str]:
    """Outcome of each test in a JUnit report of pytest."""
    found = {}
    for case in ElementTree.fromstring(report).iter("testcase"):
        kinds = {child.tag for child in case}
        bad = "failed" if kinds & {"failure", "error"} else ""
        found[f"{case.get('classname')}.{case.get('name')}"] = bad or ("skipped" if "skipped" in kinds else "passed")
    return found


def benchmark(tree: Path, arguments: list[str], steps: int) -> dict[str, Any]:
    """`measure_device` in a process of its own, whose allocator nothing else has used; or `error`, its last line."""
    code = (
        "import json, sys\nfrom megagamma.cli import ignore_library_warnings\nignore_library_warnings()\n"
        "from megagamma.benchmarks.device import measure_device\n"
        "print('RESULT' + json.dumps(measure_device(json.loads(sys.argv[1]), int(sys.argv[2]))))"
    )
    command = [sys.executable, "-c", code, json.dumps(arguments), str(steps)]
    found = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    for line in found.stdout.splitlines():
        if line.startswith("RESULT"):
            return dict(json.loads(line.removeprefix("RESULT")))
    return {"error": (found.stderr.strip().splitlines() or [f"exit code {found.returncode}"])[-1]}


def table(results: dict[str, Any]) -> str:
    """The results in markdown."""
    about, speed, tests = results["machine"], results["benchmark"], results["tests"]
    lines = [
        "# GPU check", "",
        f"{results['device']}; {', '.join(f'{name} {number}' for name, number in about['versions'].items())}; CUDA "
        f"{results['cuda']}; {results['seconds']:.0f} s in all.", "",
        "| training | value |", "|---|---:|",
    ]  # fmt: skip
    if "error" in speed:
        lines.append(f"| error | {speed['error']} |")
    else:
        known = speed["mfu"] is not None
        mfu, peak = (
            (f"{speed['mfu']:.1%}", f"{speed['peak_flops']:.4g} FLOP/s") if known else ("not known", "not known")
        )
        lines += [
            f"| model | {speed['parameters'] / 1e9:.3g}B, sequence {speed['sequence_length']:,}, micro-batch "
            f"{speed['micro_batch_size']}, {speed['dtype']}, ZeRO {speed['zero_stage']} |",
            f"| tokens/s | {speed['tokens_per_second']:,.0f} |",
            f"| peak memory | {speed['peak_gib']:.1f} GiB |",
            f"| MFU | {mfu} |",
            "", speed["formula"] + ".",
            f"FLOPs per token: {speed['flops_per_token']:.4g}; peak: {peak}.",
        ]  # fmt: skip
    lines += ["", "| test | outcome |", "|---|---|"]
    lines += [f"| {name} | {outcome} |" for name, outcome in tests.items()]
    return "\n".join([*lines, ""])


def main(arguments: list[str] | None = None) -> int:
    """Check the GPU; writes OUTPUT.json and OUTPUT.md."""
    parser = argparse.ArgumentParser(
        prog="megagamma gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="gpu_check", help="the two files without their ending (default gpu_check)")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: to try the command itself")
    parser.add_argument("--model", default="model/1b", help="of configs/ (default model/1b)")
    parser.add_argument("--sequence_length", type=int, default=4096, help="unit: tokens (default 4096)")
    parser.add_argument("--micro_batch_size", type=int, default=4, help="sequences of a step (default 4)")
    parser.add_argument("--steps", type=int, default=20, help="measured (default 20)")
    parser.add_argument("--tests", default="tests -m gpu", help="arguments of pytest (default: tests -m gpu)")
    args, rest = parser.parse_known_args(arguments)
    require_gpu(args.device)
    tree = source_tree()
    import torch

    from megagamma.benchmarks.page import machine
    from megagamma.benchmarks.training import preset
    from megagamma.files import write_json, write_text

    begin = time.perf_counter()
    options = [
        "--config", preset(args.model), f"--run.device={args.device}", "--precision.dtype=bf16",
        "--model.vocab_size=32000", f"--data.sequence_length={args.sequence_length}",
        f"--data.global_batch_size={args.micro_batch_size}", f"--data.micro_batch_size={args.micro_batch_size}", *rest,
    ]  # fmt: skip
    tests = run_tests(tree, shlex.split(args.tests))
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(0) if args.device == "cuda" else "cpu",
        "cuda": torch.version.cuda,
        "machine": machine(),
        "tests": tests,
        "benchmark": benchmark(tree, options, args.steps),
    }
    results["seconds"] = time.perf_counter() - begin
    write_json(f"{args.output}.json", results)
    write_text(f"{args.output}.md", table(results))
    print(table(results))
    ran = [outcome for outcome in tests.values() if outcome != "skipped"]
    return 0 if ran and "failed" not in ran and "error" not in results["benchmark"] else 1
