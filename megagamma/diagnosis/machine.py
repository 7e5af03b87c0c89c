"""One process on its machine: versions, devices, memory, threads, open files."""

from __future__ import annotations

import platform
import resource
from typing import Any

import torch

from megagamma.diagnosis.findings import Finding
from megagamma.environment import choose_threads, cores_of_this_process, cpu_quota
from megagamma.planning.drawing import available_bytes
from megagamma.runs.provenance import installed_versions

GIB = 2**30
_LEAST_MEMORY = 2 * GIB  # a process takes 0.4 GiB before it has a model
_FREE_SHARE = 0.9  # of a GPU's memory, that nobody else uses


def check_versions() -> Finding:
    """Python and the packages that a run depends on."""
    found = installed_versions()
    missing = [name for name, version in found.items() if version is None]
    text = ", ".join([f"python {platform.python_version()}", *(f"{name} {version}" for name, version in found.items())])
    values = {"python": platform.python_version(), **found}
    if missing:
        return Finding(
            "versions", "FAIL", f"not installed: {', '.join(missing)}", "install them (make env)", values=values
        )
    return Finding("versions", "OK", text, values=values)


def check_devices(local_size: int, local_rank: int = 0) -> Finding:
    """GPUs, or the memory of the host where there is none.

    Args:
        local_size: processes of the run on this node; 0: not known.
        local_rank: of this process, which looks at its own GPU alone where there are several processes.
    """
    if not torch.cuda.is_available():
        available = available_bytes()
        nothing = {"gpus": 0, "memory_available_bytes": available}
        if available is None:
            return Finding("devices", "OK", "no GPU; this system does not tell its memory", values=nothing)
        text = f"no GPU; {available / GIB:.1f} GiB of memory are free"
        if available < _LEAST_MEMORY * max(1, local_size):
            fix = "end what else runs here, or start fewer processes on this node"
            return Finding("devices", "WARN", f"{text} for {max(1, local_size)} processes", fix, values=nothing)
        return Finding("devices", "OK", text, values=nothing)
    count = torch.cuda.device_count()
    if max(local_size, local_rank + 1) > count:
        text, fix = (
            f"{count} GPUs for {max(local_size, local_rank + 1)} processes of this node",
            "start one process per GPU",
        )
        return Finding("devices", "FAIL", text, fix, values={"gpus": count})
    # Looking at a GPU takes some of its memory, so that all processes looking at all of them would see each other.
    indices = range(count) if local_size <= 1 else [local_rank]
    memory = {index: torch.cuda.mem_get_info(index) for index in indices}
    names = [torch.cuda.get_device_name(index) for index in indices]
    values: dict[str, Any] = {"gpus": count, "names": names, "free_bytes": [free for free, _ in memory.values()]}
    used = [index for index, (free, total) in memory.items() if free < _FREE_SHARE * total]
    if used:
        which = ", ".join(f"GPU {index} ({memory[index][0] / GIB:.1f} GiB free)" for index in used)
        fix = "look at nvidia-smi, and end what is left there"
        return Finding("devices", "WARN", f"in use by others: {which}", fix, values=values)
    least = min(free for free, _ in memory.values()) / GIB
    return Finding("devices", "OK", f"{count} x {names[0]}, at least {least:.1f} GiB free each", values=values)


def check_threads(local_size: int) -> Finding:
    """Threads of each process against the cores that this node leaves them."""
    cores, quota, processes = cores_of_this_process(), cpu_quota(), max(1, local_size)
    threads = choose_threads(0, processes)
    limit = "no quota" if quota is None else f"a quota of {quota:g}"
    text = f"{threads} threads per process, {processes} processes on {cores} cores ({limit})"
    values = {"threads": threads, "cores": cores, "quota": quota, "processes": processes}
    # Under srun each process sees its own cores alone.
    if threads > cores:
        fix = f"set OMP_NUM_THREADS to {max(1, cores // processes)} or unset it, or ask for more cores per task"
        return Finding("threads", "WARN", text, fix, values=values)
    return Finding("threads", "OK", text, values=values)


def check_open_files(size: int) -> Finding:
    """The limit of open files against what a rank needs: sockets to all others twice over, and its own files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 256 + 4 * size
    text = f"{soft:,} open files allowed, about {needed:,} needed for {size:,} ranks"
    values = {"soft": soft, "hard": hard, "needed": needed}
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return Finding("files", "OK", text, values=values)
    can = hard == resource.RLIM_INFINITY or hard >= needed
    fix = f"ulimit -n {needed} before the start" if can else f"ask for a higher hard limit than {hard:,}"
    return Finding("files", "FAIL", text, fix, values=values)


def check_machine(size: int, local_size: int, local_rank: int) -> list[Finding]:
    """All of the above, on this process. It opens no file and no socket."""
    return [check_versions(), check_devices(local_size, local_rank), check_threads(local_size), check_open_files(size)]
