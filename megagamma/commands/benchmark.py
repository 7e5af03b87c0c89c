"""Measure speed as ratios: ours and what a user would pick instead, taken in turns on one machine.

    megagamma benchmark [BENCHMARK ...] [--quick] [--page docs/performance.md] [--json FILE] [--model.hidden_size 512 ...]

train       steps of several shapes against the class of transformers that the model exports to, under torch's AdamW,
            eager and compiled, fp32 and bf16; each in a process of its own, same tokens, same threads. A shape's name may
            end in -gated: with gate and q/k-norm, against Qwen3_5ForCausalLM; else without, against LlamaForCausalLM
ranks       steps on two data-parallel processes of one thread: ours in fp32 and bf16, and the peer in fp32 under torch's
            DistributedDataParallel
overhead    of a run of configs/demo.yaml on two ranks, the share of a step that is metrics, guard, replica check and the other
            standard callbacks
curves      what ours costs over parameters, sequence length, micro-batch and ranks: tokens/s and peak memory
memory      peak memory of ours, of the peer, and what the memory plan says
init        the counter-based streams against `torch.normal_`
loss        the loss and its gradient against torch's cross-entropy
checkpoint  saving and loading against plain files of the same bytes
convert     writing Hugging Face weights against copying the checkpoint's

Further options are for ours: in the first six, and for the model in checkpoint and convert. It needs the source tree.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from megagamma.benchmarks.comparisons import measure_overhead, measure_ranks
from megagamma.benchmarks.costs import measure_curves, measure_memory
from megagamma.benchmarks.training import PEERS, build, measure, preset, random_batch, shape_arguments
from megagamma.environment import has_fast_bf16

PRESETS = ["1m", "3m", "10m", "17m", "30m", "60m"]
"""Shapes of the curve over parameters."""
QUICK_PEERS = [name for name in PEERS if "fp32" in name]


def in_turns(first: Callable[[], object], second: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of two functions called alternately, after one unmeasured call of each."""
    times: tuple[list[float], list[float]] = ([], [])
    for round_number in range(repeats + 1):
        for function, found in zip((first, second), times, strict=True):
            begin = time.perf_counter()
            function()
            if round_number:
                found.append(time.perf_counter() - begin)
    return statistics.median(times[0]), statistics.median(times[1])


def benchmark_init(repeats: int) -> dict[str, Any]:
    """Normal numbers per second on one thread, ours and torch's."""
    import torch

    from megagamma.initialization.streams import normal_

    torch.set_num_threads(1)
    out = torch.empty(4096, 4096)
    ours, theirs = in_turns(
        lambda: normal_(out, seed=1, name="benchmark", global_shape=tuple(out.shape)), lambda: out.normal_(), repeats
    )
    return {
        "ours_million_per_second": out.numel() / ours / 1e6,
        "torch_million_per_second": out.numel() / theirs / 1e6,
        "ratio": theirs / ours,
    }


def benchmark_loss(repeats: int) -> dict[str, Any]:
    """Milliseconds of the loss and its gradient on logits of two sizes, ours and torch's."""
    import torch

    from megagamma.environment import keep_freed_memory
    from megagamma.model.cross_entropy import cross_entropy

    found: dict[str, Any] = {}
    for kept in (False, True):
        # First as the C library does it by itself, then as a run sets it.
        name = "with_freed_memory_kept" if kept and keep_freed_memory() else "as_the_system_is"
        for rows, vocabulary in ((4096, 4096), (1024, 50_000)):
            logits = torch.randn(rows, vocabulary, requires_grad=True)
            labels = torch.randint(vocabulary, (rows,))

            def differentiate(
                loss: Callable[..., torch.Tensor], x: torch.Tensor = logits, y: torch.Tensor = labels
            ) -> None:
                torch.autograd.grad(loss(x * 1, y).sum(), x)

            def piecewise(x: torch.Tensor, y: torch.Tensor, size: int = vocabulary) -> torch.Tensor:
                return cross_entropy(x, y, size)

            def whole(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
                return torch.nn.functional.cross_entropy(x, y, reduction="none")

            ours, theirs = in_turns(partial(differentiate, piecewise), partial(differentiate, whole), repeats)
            found[f"{rows}x{vocabulary}_{name}_ratio"] = theirs / ours
            found[f"{rows}x{vocabulary}_{name}_milliseconds"] = ours * 1e3
    return found


def benchmark_checkpoint(repeats: int, arguments: list[str]) -> dict[str, Any]:
    """Rates of saving and loading against plain files of the same bytes; the stall of an asynchronous save."""
    import os
    import tempfile
    from pathlib import Path

    import torch

    from megagamma.checkpoint.saver import Saver, load
    from megagamma.config.io import as_dict
    from megagamma.distributed.replicas import fingerprint

    config, engine = build(["--config", preset("model/30m"), *arguments])
    batch = random_batch(config)
    state = {"config": as_dict(config), "consumed_samples": 4, "seconds": 0.0, "tokenizer": "", "progress": {}}
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        saver = Saver(engine, folder / "checkpoints")
        path = saver.save(1, state)
        assert path is not None
        size = sum(file.stat().st_size for file in path.iterdir())
        block = os.urandom(1 << 24)

        def write() -> None:
            with open(folder / "plain", "wb") as file:
                for _ in range(size // len(block)):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())

        def read() -> None:
            with open(folder / "plain", "rb") as file:
                while file.read(1 << 24):
                    pass

        def forget() -> None:
            """Drop the file cache of both, so that they are read from the disk."""
            for file in (*path.iterdir(), folder / "plain"):
                with open(file, "rb") as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        save_seconds, write_seconds = in_turns(lambda: saver.save(1, state), write, repeats)

        def load_from_disk() -> None:
            forget()
            load(engine, path)

        def read_from_disk() -> None:
            forget()
            read()

        load_seconds, read_seconds = in_turns(load_from_disk, read_from_disk, repeats)
        stalls = []
        for _ in range(repeats):
            begin = time.perf_counter()
            saver.save(1, state, asynchronous=True)
            stalls.append(time.perf_counter() - begin)
            # As in a run: it is copied while the next step's passes run, and its update waits.
            engine.forward_backward([batch])
            begin = time.perf_counter()
            saver.wait_for_copy()
            stalls[-1] += time.perf_counter() - begin
            engine.discard()
            saver.finish()

    def step() -> None:
        engine.forward_backward([batch])
        engine.step()

    check_seconds, step_seconds = in_turns(
        lambda: [fingerprint(tensor.parameter.data) for tensor in engine.map], step, max(3, repeats // 2)
    )
    engine.close()
    torch.set_num_threads(1)
    return {
        "megabytes": size / 1e6,
        "save_rate_over_plain_write": write_seconds / save_seconds,
        "load_rate_over_plain_read": read_seconds / load_seconds,
        "asynchronous_stall_over_save": statistics.median(stalls) / save_seconds,
        "replica_check_over_step": check_seconds / step_seconds,
    }


def benchmark_convert(repeats: int, arguments: list[str]) -> dict[str, Any]:
    """Seconds to check a random model's checkpoint and write its Hugging Face weights, beside copying its file of weights.

    bf16 writes half of what is copied.
    """
    import os
    import tempfile
    from pathlib import Path

    import torch

    from megagamma.config.io import parse_config
    from megagamma.huggingface.export import ExportOptions, read_checkpoint, verify_weights, write_weights
    from megagamma.huggingface.formats import choose_format
    from megagamma.huggingface.importing import write_run
    from megagamma.initialization.streams import normal_
    from megagamma.model.parameters import LogicalParameter, logical_parameters
    from megagamma.planning.flops import parameter_counts

    common = ["--data.corpus", "tiny", "--model.vocab_size", "32000", "--config", preset("model/30m")]
    config = parse_config([*common, *arguments])

    def draw(logical: LogicalParameter) -> torch.Tensor:
        out = torch.ones(logical.shape)
        return (
            out
            if logical.role == "norm"
            else normal_(out, seed=1, name=logical.name, global_shape=logical.shape, std=0.02)
        )

    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        drawn = ((one, draw(one)) for one in logical_parameters(config.model))
        checkpoint = write_run(folder / "run", config, drawn, quiet=True)
        reader, config = read_checkpoint(checkpoint)
        target = choose_format(config.model)
        weights = checkpoint / "weight-00000.safetensors"
        found: dict[str, Any] = {"parameters": parameter_counts(config.model).total}

        def copy() -> None:
            with open(weights, "rb") as source, open(folder / "copy", "wb") as file:
                while block := source.read(1 << 24):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())

        for dtype in (torch.float32, torch.bfloat16):
            options = ExportOptions(dtype=dtype)

            def write(options: ExportOptions = options) -> None:
                verify_weights(reader)
                write_weights(folder, reader, config, target, options, quiet=True)

            ours, plain = in_turns(write, copy, repeats)
            kind = str(dtype).removeprefix("torch.")
            size = sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
            found[f"{kind}_seconds"] = ours
            found[f"{kind}_time_of_copying_over_ours"] = plain / ours
            found[f"{kind}_megabytes"] = size / 1e6
    return found


def _measures(args: argparse.Namespace, rest: list[str]) -> dict[str, Callable[[], Any]]:
    """Every benchmark by its name, in the order of a call without names."""
    quick, repeats = args.quick, args.repeats
    few = max(3, repeats // 3)
    shape = args.shape
    dtypes = ("fp32", "bf16") if has_fast_bf16() else ("fp32",)
    return {
        "init": lambda: benchmark_init(repeats),
        "loss": lambda: benchmark_loss(repeats),
        "train": lambda: [measure(shape, repeats, args.peers, rest, dtypes) for shape in args.shapes],
        "ranks": lambda: measure_ranks(shape, repeats, rest),
        "overhead": lambda: measure_overhead(20 if quick else 200, rest),
        "curves": lambda: measure_curves(shape, PRESETS[:2] if quick else PRESETS, 1 if quick else 5, quick, rest),
        "memory": lambda: [measure_memory(name, rest) for name in ([shape] if quick else [shape, "60m"])],
        "checkpoint": lambda: benchmark_checkpoint(few, rest),
        "convert": lambda: benchmark_convert(few, rest),
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the requested benchmarks and print one line each."""
    parser = argparse.ArgumentParser(
        prog="megagamma benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("which", nargs="*", metavar="BENCHMARK", help="names of the list above; default: all")
    parser.add_argument("--repeats", type=int, default=12, help="measured calls or turns of each side (default 12)")
    parser.add_argument(
        "--shapes",
        nargs="+",
        default=["toy", "demo", "17m", "17m-gated"],
        help="of train: toy, demo, or presets; -gated",
    )
    parser.add_argument("--shape", default="17m", help="of ranks, curves and memory, which adds 60m (default 17m)")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="of train; default: all")
    parser.add_argument(
        "--quick", action="store_true",
        help="under three minutes: fewer turns, steps and points, small shapes, peers in fp32 alone",
    )  # fmt: skip
    parser.add_argument("--page", help="write the numbers as a page of docs")
    parser.add_argument("--json", help="write the numbers to this file too")
    parser.add_argument(
        "--add", nargs="+", default=[], metavar="FILE", help="numbers of earlier calls, written by --json, for the page"
    )
    args, rest = parser.parse_known_args(arguments)
    if args.quick:
        args.repeats, args.shapes, args.shape = min(args.repeats, 3), args.shapes[:2], "1m"
        args.peers = [name for name in args.peers if name in QUICK_PEERS]
    measures = _measures(args, rest)
    for which in args.which:
        if which not in measures:
            parser.error(f"{which} is not a benchmark: use {', '.join(measures)}")
    if args.repeats < 1:
        parser.error(f"--repeats {args.repeats} must be at least 1")
    from megagamma.benchmarks.page import machine, merged, page
    from megagamma.files import read_json, write_json, write_text

    earlier = [read_json(file) for file in args.add]
    for shape in args.shapes:
        shape_arguments(shape)  # refuses where the source tree is missing, before anything is measured
    words = sys.argv[1:] if arguments is None else arguments
    results: dict[str, Any] = {"command": shlex.join(["python", "tools/benchmark.py", *words]), "machine": machine()}
    for which in args.which or measures:
        results[which] = measures[which]()
        print(which, json.dumps(results[which]), flush=True)
    if args.json:
        write_json(args.json, results)
    if args.page:
        write_text(args.page, page(*merged([*earlier, results])))
    return 0
