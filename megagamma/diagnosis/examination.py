"""The whole examination of one rank, in an order in which each step needs no more than the ones before have shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megagamma.config.schema import Config
from megagamma.diagnosis import network
from megagamma.diagnosis.findings import Finding, within, worst
from megagamma.diagnosis.machine import check_machine
from megagamma.diagnosis.storage import check_data, check_disk


@dataclass(frozen=True)
class Settings:
    """What is examined."""

    folder: Path
    """Where runs would be written."""
    config: Config | None = None
    """Of a run, whose data and checkpoints are looked at too."""
    mib: int = 64
    """Of the file that is written, and of the tensors that are sent. Unit: MiB."""
    seconds: float = 60.0
    """Deadline of every step but the checksums of data, which have ten times as much."""

    @property
    def patience(self) -> float:
        """The longest that a rank's own checks may take. Unit: seconds."""
        return self.seconds * (3 if self.config is None else 13)


def examine_alone(settings: Settings, size: int = 1, local_size: int = 1, local_rank: int = 0) -> list[Finding]:
    """What needs no other rank; disk and data by the first process of each node alone."""
    found = within(settings.seconds, "devices", "this machine", lambda: check_machine(size, local_size, local_rank))
    if local_rank:
        return found
    config = settings.config
    found += within(
        settings.seconds, "disk", str(settings.folder), lambda: check_disk(settings.folder, settings.mib, config)
    )
    if config is not None:
        found += within(10 * settings.seconds, "data", "the config's data", lambda: check_data(config))
    return found


def examine_together(
    meeting: network.Meeting,
    alone: list[Finding],
    device: torch.device,
    mib: int,
    form_group: Callable[[], Any],
    patience: float | None = None,
) -> list[Finding]:
    """What needs all ranks, after what each found alone; all ranks call it.

    Args:
        form_group: makes the process group, once all ranks are known to be there.
        patience: for the slowest rank's own checks; the meeting's deadline where it is not given. Unit: seconds.

    Returns:
        On rank 0 the findings of all ranks; elsewhere this rank's.
    """
    own = [meeting.own(one) for one in alone]
    meeting.enter("network")
    missing = meeting.missing("network", patience)
    if missing:
        network.report(meeting, own)
        if meeting.rank:
            return own
        named = meeting.late("ranks", missing, "did not come to the network's checks")
        others = [one for one in network.collect(meeting) if one.check != "ranks"]
        return [*others, *named]
    own += network.check_clock(meeting)
    try:
        group = form_group()
        data = torch.ones(mib * 2**20 // 4, dtype=torch.float32, device=device)
        meeting.enter("links")
        own += network.check_links(meeting, group, data)
        if worst(own[-1:]) == "OK":
            meeting.enter("collective")
            own += network.check_collective(meeting, group, data, dist.get_backend(group))
    except RuntimeError as error:
        own.append(meeting.own(Finding("collective", "FAIL", f"no process group: {network.first_sentence(error)}")))
    network.report(meeting, own)
    return network.collect(meeting) if meeting.rank == 0 else own
