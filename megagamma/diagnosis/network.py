"""All ranks together: who answers, clocks, links between neighbours, and the bandwidth of a collective.

Ranks report through the key-value store of the rendezvous, which works while a collective hangs, so that rank 0 can name
the rank and host that it waits for.
"""

from __future__ import annotations

import datetime
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from megagamma.diagnosis.findings import Finding
from megagamma.distributed.rendezvous import first_sentence

CLOCK_WARN_SECONDS, CLOCK_FAIL_SECONDS = 1.0, 60.0
_CLOCK_ROUNDS = 3
_SLOW_SHARE = 0.5  # of the median link
_POLL = 0.01


class Meeting:
    """One rank among all that are examined."""

    def __init__(self, store: dist.Store, rank: int, hosts: list[str], seconds: float) -> None:
        """Args: store: of all ranks; hosts: of every rank, by rank; seconds: deadline of every step."""
        self.store, self.rank, self.hosts, self.seconds = store, rank, hosts, seconds
        self.size = len(hosts)

    def enter(self, step: str) -> None:
        """Say where this rank is."""
        self.store.set(f"at{self.rank}", step)
        self.store.set(f"{step}:{self.rank}", "1")

    def missing(self, step: str, seconds: float | None = None) -> list[int]:
        """Ranks that have not entered a step by the deadline, or by another one."""
        end = time.monotonic() + (self.seconds if seconds is None else seconds)
        left = list(range(self.size))
        while left:
            left = [rank for rank in left if not self.store.check([f"{step}:{rank}"])]
            if not left or time.monotonic() > end:
                break
            time.sleep(_POLL)
        return left

    def where(self, rank: int) -> str:
        """What a rank entered last."""
        return self.store.get(f"at{rank}").decode() if self.store.check([f"at{rank}"]) else "the start"

    def late(self, check: str, ranks: list[int], what: str) -> list[Finding]:
        """Findings that name ranks which did not come."""
        return [
            Finding(
                check, "FAIL", f"{what} within {self.seconds:g} s; it is at: {self.where(rank)}",
                f"look at {self.hosts[rank]} (its log, dmesg, its network and file systems), or leave it out of the job",
                rank, self.hosts[rank],
            )
            for rank in ranks
        ]  # fmt: skip

    def agree(self, code: int) -> int:
        """Rank 0's exit code on every rank; a rank that hears none in time keeps its own."""
        end = time.monotonic() + self.seconds
        if self.rank == 0:
            self.store.set("code", str(code))
            end = min(end, time.monotonic() + 5)  # the store ends with this process
            while self.store.add("heard", 0) < self.size - 1 and time.monotonic() < end:
                time.sleep(_POLL)
            return code
        while not self.store.check(["code"]):
            if time.monotonic() > end:
                return code
            time.sleep(_POLL)
        code = int(self.store.get("code"))
        self.store.add("heard", 1)
        return code

    def own(self, finding: Finding) -> Finding:
        """A finding as this rank's."""
        return replace(finding, rank=self.rank, host=self.hosts[self.rank])


def check_clock(meeting: Meeting, now: Callable[[], float] = time.time) -> list[Finding]:
    """The clock of this rank against rank 0's, to some milliseconds.

    Rank 0 writes its time when all are waiting for it; a rank compares its own as soon as it reads it. The best of three.
    """
    offsets = []
    store, end = meeting.store, time.monotonic() + meeting.seconds
    for number in range(_CLOCK_ROUNDS):
        key = f"clock{number}"
        store.add(f"{key}:ready", 1)
        if meeting.rank == 0:
            while store.add(f"{key}:ready", 0) < meeting.size and time.monotonic() < end:
                time.sleep(_POLL)
            time.sleep(_POLL)
            store.set(key, repr(now()))
            continue
        while not store.check([key]):
            if time.monotonic() > end:
                return []  # rank 0 is late, and says so itself
        offsets.append(now() - float(store.get(key)))
    if meeting.rank == 0:
        return []
    offset = min(offsets, key=abs)
    text = f"clock {offset:+.3f} s against rank 0 on {meeting.hosts[0]}"
    status: Any = "OK" if abs(offset) < CLOCK_WARN_SECONDS else "WARN" if abs(offset) < CLOCK_FAIL_SECONDS else "FAIL"
    fix = "" if status == "OK" else "synchronize it (chrony or ntpd): times of logs, files and locks do not agree"
    return [meeting.own(Finding("clock", status, text, fix, values={"offset_seconds": offset}))]


def _timed(action: Callable[[], list[Any]], seconds: float) -> float:
    """Seconds that pending operations take; raises RuntimeError at the deadline."""
    begin = time.perf_counter()
    for work in action():
        if not work.wait(datetime.timedelta(seconds=seconds)):
            raise RuntimeError("not done in time")
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def check_links(meeting: Meeting, group: Any, data: torch.Tensor) -> list[Finding]:
    """Exchange `data` with the rank before and the one after this one; gloo and NCCL alike.

    Returns:
        A finding of this rank, with the bytes per second of each neighbour; FAIL names a neighbour that gave none.
    """
    rates: dict[str, float] = {}
    size, rank = meeting.size, meeting.rank
    for turn in range(2):
        # Pairs (0, 1), (2, 3), ... and then (1, 2), (3, 4), ..., so that a rank is in one pair at a time.
        other = rank + 1 if (rank + turn) % 2 == 0 else rank - 1
        if not 0 <= other < size:
            continue
        incoming = torch.empty_like(data)

        def exchange(other: int = other, incoming: torch.Tensor = incoming) -> list[Any]:
            peer = dist.get_global_rank(group, other) if group is not None else other
            first = [dist.P2POp(dist.isend, data, peer, group), dist.P2POp(dist.irecv, incoming, peer, group)]
            return list(dist.batch_isend_irecv(first))

        try:
            _timed(exchange, meeting.seconds)  # makes the connection
            rates[str(other)] = 2 * data.nbytes / _timed(exchange, meeting.seconds)
        except RuntimeError as error:
            text = f"no exchange with rank {other} on {meeting.hosts[other]} in {meeting.seconds:g} s: {first_sentence(error)}"
            fix = f"look at the network between {meeting.hosts[rank]} and {meeting.hosts[other]}"
            return [meeting.own(Finding("links", "FAIL", text, fix, values={"failed_with": other}))]
    text = ", ".join(f"{rate / 2**20:,.0f} MiB/s with rank {other}" for other, rate in rates.items())
    return [meeting.own(Finding("links", "OK", text, values={"bytes_per_second": rates}))]


def slow_links(findings: list[Finding], hosts: list[str]) -> list[Finding]:
    """Ranks all of whose links are far below the median; of a fast and a slow rank the fast one has another, fast link."""
    links = {
        one.rank: one.values["bytes_per_second"] for one in findings if one.check == "links" and one.status == "OK"
    }
    rates = [rate for own in links.values() for rate in own.values()]
    if len(rates) < 4:
        return []
    median = statistics.median(rates)
    slow = [rank for rank, own in links.items() if own and max(own.values()) < _SLOW_SHARE * median]
    return [
        Finding(
            "links", "WARN", f"every link is below half of the median, {median / 2**20:,.0f} MiB/s: the best is "
            f"{max(links[rank].values()) / 2**20:,.0f}", f"look at the network card of {hosts[rank]}, or leave it out",
            rank, hosts[rank],
        )
        for rank in slow
    ]  # fmt: skip


def check_collective(meeting: Meeting, group: Any, data: torch.Tensor, backend: str) -> list[Finding]:
    """An all-reduce over all ranks, twice. Bandwidth as NCCL's tests give it: 2 (n - 1) / n x bytes / seconds."""

    def reduce() -> list[Any]:
        return [dist.all_reduce(data, group=group, async_op=True)]

    try:
        _timed(reduce, meeting.seconds)
        seconds = _timed(reduce, meeting.seconds)
    except RuntimeError as error:
        text = f"an all-reduce by {backend} was not done in {meeting.seconds:g} s ({first_sentence(error)})"
        return [meeting.own(Finding("collective", "FAIL", text, "see which rank or link is named"))]
    meeting.enter("collective done")
    rate = 2 * (meeting.size - 1) / meeting.size * data.nbytes / seconds
    text = (
        f"all-reduce of {data.nbytes / 2**20:.0f} MiB by {backend}: {rate / 2**20:,.0f} MiB/s over {meeting.size} ranks"
    )
    return [meeting.own(Finding("collective", "OK", text, values={"bytes_per_second": rate, "seconds": seconds}))]


def report(meeting: Meeting, findings: list[Finding]) -> None:
    """Hand this rank's findings to rank 0."""
    meeting.store.set(f"findings{meeting.rank}", json.dumps([one.as_json() for one in findings]))
    meeting.enter("report")


def collect(meeting: Meeting) -> list[Finding]:
    """On rank 0: the findings of all ranks, and of each that gave none that it did not."""
    missing = meeting.missing("report")
    findings = [
        Finding(**one)
        for rank in range(meeting.size)
        if rank not in missing
        for one in json.loads(meeting.store.get(f"findings{rank}"))
    ]
    findings += meeting.late("ranks", missing, "no report")
    if any(one.check == "collective" and one.status == "FAIL" for one in findings):
        waited = {one.rank for one in findings if one.check in ("collective", "links") and one.status == "FAIL"}
        absent = [rank for rank in range(meeting.size) if rank not in waited and rank not in missing]
        absent = [rank for rank in absent if not meeting.store.check([f"collective done:{rank}"])]
        findings += meeting.late("collective", absent, "did not enter the all-reduce")
    return findings + slow_links(findings, meeting.hosts)
