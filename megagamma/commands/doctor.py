"""Examine machines, disks, data and network before a run: by hand, or as the first step of a job on all of its ranks.

    megagamma doctor
    srun megagamma doctor mine.yaml --folder /scratch/runs

Versions, devices and memory, threads and cores, open files; speed and space of the folder of runs; with --config the
checksums of its data and its tokenizer; between ranks the clocks, links, and the bandwidth of an all-reduce, each with a
deadline that names the rank and host. Each line is OK, WARN or FAIL, with the fix. Exit code 1: something failed.
See docs/doctor.md.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonargparse

from megagamma.config.io import build_parser, files_first, parse_namespace, to_config
from megagamma.config.resolve import resolve, validate
from megagamma.config.schema import Config
from megagamma.environment import (
    World,
    keep_gloo_on_this_host,
    launcher_rank,
    world_from_environment,
    world_size,
)
from megagamma.errors import ConfigurationError, DistributedError

if TYPE_CHECKING:
    from megagamma.diagnosis.examination import Settings
    from megagamma.diagnosis.findings import Finding
    from megagamma.diagnosis.network import Meeting


def parser() -> jsonargparse.ArgumentParser:
    """All options of a run, and this program's own options."""
    found = build_parser(None, __doc__ or "")
    found.add_argument(
        "--folder", type=str, default="", help="Where runs are written. (default: run.folder with --config, else runs)"
    )
    found.add_argument(
        "--mib", type=int, default=64, help="Size of the file and tensors of the measurements. Unit: MiB."
    )
    found.add_argument("--deadline", type=float, default=60.0, help="Of every step, for all ranks. Unit: seconds.")
    found.add_argument("--json", action="store_true", help="Print JSON instead.")
    return found


def settings_of(namespace: Any, size: int) -> Settings:
    """What to examine.

    Raises:
        ConfigurationError: an option, or the config for this number of processes.
    """
    for name, least in (("mib", 1), ("deadline", 0.1)):
        if not getattr(namespace, name) >= least:
            raise ConfigurationError(f"{name}={getattr(namespace, name)} must be at least {least}")
    config: Config | None = to_config(namespace)
    assert config is not None
    folder = namespace.folder or config.run.folder.replace("{name}", config.run.name)
    if config.data.paths or config.data.corpus or config.data.toy:
        validate(resolve(config), size)
    else:
        config, folder = None, namespace.folder or "runs"
    from megagamma.diagnosis.examination import Settings

    return Settings(Path(folder), config, namespace.mib, namespace.deadline)


def main(arguments: list[str] | None = None) -> int:
    """Examine and print; returns 1 when something failed. Of several ranks, rank 0 prints; the process then ends at once."""
    size = world_size()
    namespace = parse_namespace(parser(), files_first(arguments))
    settings = settings_of(namespace, size)
    from megagamma.diagnosis.examination import examine_alone
    from megagamma.diagnosis.findings import Finding

    if size == 1:
        return show(examine_alone(settings), namespace.json, size)
    meeting: Meeting | None = None
    try:
        world = world_from_environment()
        meeting = _meet(world, settings)
    except DistributedError as error:
        text = str(error).replace(f"run.start_minutes={settings.seconds / 60:g}", f"--deadline {settings.seconds:g} s")
        found = [Finding("ranks", "FAIL", text, rank=launcher_rank())]
        code = show(found, namespace.json, size) if launcher_rank() == 0 else 1
    else:
        code = _examine(world, meeting, settings, namespace.json)
    # Threads and groups that hang must not keep this process.
    sys.stdout.flush()
    os._exit(code)


def _meet(world: World, settings: Settings) -> Meeting:
    """Come together with all ranks.

    Raises:
        DistributedError: ranks that did not come, by number; or versions that differ, by host.
    """
    from megagamma.diagnosis.network import Meeting
    from megagamma.distributed.rendezvous import rendezvous
    from megagamma.distributed.runtime import choose_device

    device = choose_device("auto", world.local_rank)
    store, about = rendezvous(world.rank, world.size, device, settings.seconds / 60, world.is_one_host)
    return Meeting(store, world.rank, [one["host"] for one in about], settings.seconds)


def _examine(world: World, meeting: Meeting, settings: Settings, as_json: bool) -> int:
    import torch
    import torch.distributed as dist

    from megagamma.diagnosis.examination import examine_alone, examine_together
    from megagamma.distributed.runtime import choose_device

    device = choose_device("auto", world.local_rank)
    if world.is_one_host:
        keep_gloo_on_this_host()
    if device.type == "cuda":
        torch.cuda.set_device(device)

    def form_group() -> Any:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.PrefixStore("doctor", meeting.store),
            rank=world.rank,
            world_size=world.size,
            timeout=datetime.timedelta(seconds=settings.seconds),
        )
        return dist.group.WORLD

    meeting.enter("its own checks")
    alone = examine_alone(settings, world.size, world.local_size, world.local_rank)
    found = examine_together(meeting, alone, device, settings.mib, form_group, settings.patience)
    code = show(found, as_json, world.size) if world.rank == 0 else 0
    return meeting.agree(code)


def show(findings: list[Finding], as_json: bool, size: int) -> int:
    """Print findings; returns the exit code."""
    from megagamma.diagnosis.findings import lines, worst

    status = worst(findings)
    if as_json:
        print(
            json.dumps(
                {"status": status, "world_size": size, "findings": [one.as_json() for one in findings]}, indent=2
            )
        )
    else:
        print("\n".join(lines(findings)))
        number = {name: sum(one.status == name for one in findings) for name in ("FAIL", "WARN")}
        print(f"\n{status}: {number['FAIL']} failed, {number['WARN']} warnings, {size} ranks")
    return 1 if status == "FAIL" else 0
