"""Rehearse a run at its true size without its machines: start any rank of any layout on one CPU, in seconds.

    megagamma rehearse configs/model/70b.yaml --parallel.tensor 8 --parallel.pipeline 16 --world_size 8192
        --data.micro_batch_size 1 --data.global_batch_size 1024

Every option of a run works here. The ranks that hold different slices are built through the code of a real start, and
checked: their slices cover every matrix exactly once, drawing a slice takes the stated memory, and a rank that is started
holds what the memory plan says. What is rehearsed, and what is not: docs/rehearsal.md. Exit code 1: a check failed.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import jsonargparse

from megagamma.cli import source_tree
from megagamma.commands.inspect_init import config_of
from megagamma.config.io import build_parser, files_first, parse_namespace
from megagamma.config.schema import Config
from megagamma.errors import ConfigurationError
from megagamma.files import write_text
from megagamma.reporting.tables import aligned_table

if TYPE_CHECKING:
    from megagamma.rehearsal import Rehearsal

GIB = 2**30


def parser() -> jsonargparse.ArgumentParser:
    """All options of a run, and this program's own options."""
    found = build_parser(None, __doc__ or "")
    found.add_argument(
        "--world_size", type=int, default=0, help="Processes of the run. (default: tensor x pipeline x context)"
    )
    found.add_argument(
        "--ranks", type=str, default="", metavar="0,5,...",
        help="Ranks to start up to the first step. (default: the first of every pipeline stage)",
    )  # fmt: skip
    found.add_argument("--no_draw", action="store_true", help="Do not draw a slice of the largest matrix.")
    found.add_argument(
        "--scaling_out", type=str, default="", metavar="FILE",
        help="Rehearse nothing: write the page docs/scaling_out.md, from the planner and configs/model/.",
    )  # fmt: skip
    found.add_argument("--json", action="store_true", help="Print all of it as JSON instead.")
    return found


def ranks_of(text: str) -> list[int] | None:
    """`--ranks` as numbers; None when it is not given.

    Raises:
        ConfigurationError: it is no list of whole numbers.
    """
    words = [word.strip() for word in text.split(",")]
    if words == [""]:
        return None
    if not all(word.isascii() and word.isdigit() for word in words):
        raise ConfigurationError(f"ranks={text}: must be whole numbers with commas between them: use such as 0,5")
    return [int(word) for word in words]


def main(arguments: list[str] | None = None) -> int:
    """Parse, rehearse, print; returns 1 when a check failed."""
    namespace = parse_namespace(parser(), files_first(arguments))
    if namespace.scaling_out:
        from megagamma.planning.scaling_out import page

        write_text(namespace.scaling_out, page(source_tree()))
        print(f"written to {namespace.scaling_out}")
        return 0
    if not namespace.world_size:
        parallel = namespace.parallel
        namespace.world_size = parallel.tensor * parallel.pipeline * parallel.context
    ranks = ranks_of(namespace.ranks)
    config = config_of(namespace)
    # torch is imported only now, so that --help and a mistyped option are answered at once.
    from megagamma.distributed.compat.megatron import preload
    from megagamma.planning.memory import check_fits

    preload()
    from megagamma.rehearsal import as_json, rehearse

    found = rehearse(config, namespace.world_size, ranks, draws=not namespace.no_draw)
    if namespace.json:
        print(json.dumps(as_json(found), indent=2))
    else:
        print_rehearsal(config, found)
    check_fits(config, namespace.world_size)
    return 1 if found.problems else 0


def print_rehearsal(config: Config, found: Rehearsal) -> None:
    """A line of what was built, a table per started rank, what was drawn, and what is wrong."""
    slices = sum(len(tensor.parts) for held in found.tensors.values() for tensor in held)
    print(
        f"layout    {found.world_size:,} ranks = tensor {found.tensor} x pipeline {found.pipeline} x data {found.data}, "
        f"ZeRO {found.memory.zero_stage}, {found.dtype}, {config.model.num_layers} layers"
    )
    print(
        f"built     {len(found.tensors):,} ranks that hold different slices ({slices:,} slices); the others hold copies or "
        "ZeRO's shards of them"
    )
    print(f"started   {len(found.started)} ranks up to the first step, deepspeed.initialize included:\n")
    print(_table(found))
    drawing = found.drawing
    if drawing is None:
        print("\ndrawn     nothing (--no_draw): the memory that drawing takes is not checked")
    else:
        beyond = "how much beyond it is not checked, since this system does not tell"
        if drawing.beyond_bytes is not None:
            stated = f"(stated: at most {drawing.stated_bytes / 2**20:.1f})"
            beyond = f"{drawing.beyond_bytes / 2**20:.1f} MiB beyond it {stated}"
        print(
            f"\ndrawn     {drawing.name}, a slice {'x'.join(map(str, drawing.shape))} of "
            f"{drawing.slice_bytes / 2**20:.1f} MiB, in {drawing.seconds:.1f} s: {beyond}"
        )
    for problem in found.problems:
        print(f"WRONG     {problem}")
    if not found.problems:
        print(
            "OK        every matrix is covered exactly once; started ranks hold what the memory plan says, to the byte"
        )


def _table(found: Rehearsal) -> str:
    columns = ("stage", "rank", "parameters", "weights", "gradients", "optimizer", "padding", "plan + padding", "")
    widths = (7, 8, 17, 10, 11, 11, 9, 16, 10)
    rows: list[tuple[str, ...]] = []
    for one in found.started:
        planned: Any = found.memory.stages[one.pipeline_rank]
        wanted = planned.weights_bytes + planned.gradients_bytes + planned.optimizer_bytes + planned.offloaded_bytes
        start = (str(one.pipeline_rank), str(one.rank))
        if one.held is None:
            rows.append((*start, *["-"] * 5, f"{wanted / GIB:.3f}", "stopped"))
            continue
        held = one.held
        sizes = [f"{size / GIB:.3f}" for size in (held.weights, held.gradients, held.optimizer, held.padding)]
        total = held.weights + held.gradients + held.optimizer
        equal = round((wanted + held.padding) * found.data) == total * found.data
        row = (
            *start,
            f"{held.parameters:,}",
            *sizes,
            f"{(wanted + held.padding) / GIB:.3f}",
            "equal" if equal else "WRONG",
        )
        rows.append(row)
    return aligned_table(columns, widths, rows) + "\nUnit: GiB; between steps, gradients added"
