"""Who this process is, as its launcher says, and how many threads it may use.

The only reader of the variables of launchers (torchrun, deepspeed, accelerate, srun) and of OpenMP. Standard library
only, so that `--help` answers at once, and so that OpenMP can be set up before torch is imported.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path

from megagamma.errors import ConfigurationError

FAST_BF16 = ("amx_bf16", "avx512_bf16", "bf16")
"""Flags of CPUs, of x86 and Arm, with instructions for products of bf16 numbers."""


@dataclass(frozen=True)
class World:
    """Who this process is among the processes of the run, as the launcher says."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    """Processes of the run on this node; 0 when the launcher does not say."""

    @property
    def is_one_host(self) -> bool:
        """Whether the launcher says that all processes of the run are on this host."""
        # SLURM's tasks per node are a limit, so that a step of few tasks may still have several hosts.
        hosts = os.environ.get("SLURM_STEP_NUM_NODES", "1") if "SLURM_STEP_ID" in os.environ else "1"
        return self.local_size == self.size and hosts == "1"


def _whole_number(name: str, default: int, minimum: int = 0) -> int:
    """A variable as a whole number; `default` when it is not set or empty.

    Raises:
        ConfigurationError: it is something else, or below `minimum`.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdigit()) or int(text) < minimum:
        error = ConfigurationError(
            f"{name}={text}: must be a whole number of {minimum} or more: unset it, or start the run through its launcher"
        )
        error.on_one_rank = True  # other processes may have other values
        raise error
    return int(text)


def launcher_rank() -> int:
    """Rank of this process: torchrun's, deepspeed's or accelerate's, else that of srun, else 0.

    Raises:
        ConfigurationError: the variable is not a whole number.
    """
    return _whole_number("RANK", _whole_number("SLURM_PROCID", 0))


def world_size() -> int:
    """Processes of the run, known before torch is imported.

    Inside a SLURM allocation, but not started by srun, a program is one process.

    Raises:
        ConfigurationError: the variable is not a whole number of 1 or more.
    """
    if os.environ.get("WORLD_SIZE"):
        return _whole_number("WORLD_SIZE", 1, minimum=1)
    return _whole_number("SLURM_NTASKS", 1, minimum=1) if "SLURM_STEP_ID" in os.environ else 1


def is_first_of_node() -> bool:
    """Whether this process is the first of the run on its node, as the launcher says."""
    return _whole_number("LOCAL_RANK", _whole_number("SLURM_LOCALID", 0)) == 0


def accelerate_rank() -> int:
    """Rank among processes that accelerate shares work over. It does not know srun: each of its tasks works alone."""
    return _whole_number("RANK", 0)


def accelerate_world_size() -> int:
    """Number of processes that accelerate shares work over; see `accelerate_rank`."""
    return _whole_number("WORLD_SIZE", 1, minimum=1)


def slurm_job_id() -> str | None:
    """Number of the SLURM job that this process is part of. A requeued job keeps it."""
    return os.environ.get("SLURM_JOB_ID") or None


@dataclass(frozen=True)
class SlurmJob:
    """The SLURM job that a batch script runs for."""

    id: str
    """Of an array's task its own, by which scontrol finds it."""
    restarts: int
    """How often it was requeued."""
    nodes: str
    """Its node list, as SLURM writes it, such as n[1-2]."""
    node_count: int


def slurm_job() -> SlurmJob | None:
    """The SLURM job that this process is part of; None outside.

    Raises:
        ConfigurationError: a variable is not a whole number.
    """
    number = slurm_job_id()
    if number is None:
        return None
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    return SlurmJob(
        number, _whole_number("SLURM_RESTART_COUNT", 0), nodes, _whole_number("SLURM_JOB_NUM_NODES", 1, minimum=1)
    )


def logs_folder() -> Path | None:
    """Where a supervisor wants what each rank writes beside the run's files; None without one."""
    text = os.environ.get("MEGAGAMMA_LOGS", "")
    return Path(text) if text and os.path.isdir(text) else None


def restart_count() -> int:
    """How often torchrun has restarted this run's processes."""
    return _whole_number("TORCHELASTIC_RESTART_COUNT", 0)


def launcher_serves_store() -> bool:
    """Whether torchrun itself serves the key-value store at the rendezvous address."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def world_from_environment() -> World:
    """Read the launcher's variables: torchrun's and deepspeed's, or SLURM's under srun, else a single process.

    Under srun the rendezvous is set from the job: first host of the node list, port from the job number, so that two
    jobs on one node do not meet.

    Raises:
        ConfigurationError: a variable is not a whole number, or the node list of the job cannot be read.
    """
    env = os.environ
    if env.get("RANK") and env.get("WORLD_SIZE"):
        # deepspeed's launcher calls it LOCAL_SIZE.
        local_size = _whole_number("LOCAL_WORLD_SIZE", _whole_number("LOCAL_SIZE", 0))
        return World(launcher_rank(), world_size(), _whole_number("LOCAL_RANK", 0), local_size)
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and _whole_number("SLURM_NTASKS", 1) > 1:
        _set_rendezvous_from_slurm()
        return World(
            _whole_number("SLURM_PROCID", 0),
            _whole_number("SLURM_NTASKS", 1),
            _whole_number("SLURM_LOCALID", 0),
            _slurm_tasks_per_node(),
        )
    return World(0, 1, 0, 1)


def _slurm_tasks_per_node() -> int:
    """SLURM_NTASKS_PER_NODE, such as 4 or 4(x2); 0 when it is not set."""
    first = os.environ.get("SLURM_NTASKS_PER_NODE", "0").split("(")[0]
    return int(first) if first.isascii() and first.isdigit() else 0


def _set_rendezvous_from_slurm() -> None:
    env = os.environ
    if "MASTER_ADDR" not in env:
        nodes = env.get("SLURM_JOB_NODELIST", "")
        try:
            listing = subprocess.run(
                ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
            )
            env["MASTER_ADDR"] = listing.stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError) as error:
            raise ConfigurationError(
                f"SLURM_JOB_NODELIST={nodes}: scontrol must list the job's hosts, and did not ({error}): set MASTER_ADDR "
                "to the host of rank 0"
            ) from error
    if "MASTER_PORT" not in env:
        env["MASTER_PORT"] = str(20000 + _whole_number("SLURM_JOB_ID", 0) % 10000)


def rendezvous_address() -> tuple[str, int]:
    """Host and port where the processes of the run come together; 127.0.0.1:29500 when no launcher set them.

    The two variables are set too, since libraries read them.

    Raises:
        ConfigurationError: MASTER_PORT is not a port.
    """
    address = os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    text = os.environ.setdefault("MASTER_PORT", "29500")
    if not (text.isascii() and text.isdigit()) or not 0 < int(text) < 65536:
        error = ConfigurationError(
            f"MASTER_PORT={text}: must be a whole number from 1 to 65535: give a free port (deepspeed --master_port N, "
            "torchrun --master-port N)"
        )
        error.on_one_rank = True
        raise error
    return address, int(text)


def keep_gloo_on_this_host() -> None:
    """Let gloo listen on the loopback interface alone; call where all ranks are on this host, before groups are formed.

    It would listen on the interface that the host's name resolves to. A value that the user has set stays.
    """
    names = [name for _, name in socket.if_nameindex()]
    for name in ("lo", "lo0"):
        if name in names:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def export_local_rank(local_rank: int) -> None:
    """Set LOCAL_RANK where no launcher did: DeepSpeed insists on it, for a single process too."""
    os.environ.setdefault("LOCAL_RANK", str(local_rank))


# -- threads ---------------------------------------------------------------------------------------------------


def let_waiting_threads_sleep() -> None:
    """Make OpenMP threads without work sleep after a short spin. Call before torch is imported; it is too late after.

    By default a waiting thread of GNU OpenMP spins for milliseconds. Where processes share cores, threads that spin
    keep those with work off the cores, and training gets slower by factors of ten and more. To sleep at once costs a wake-up
    per parallel region, half of a small model's step. A spin of a fraction of a millisecond bridges what lies between two
    regions, and is over soon. A value that the user has set stays.
    """
    # Read when the OpenMP library is loaded: the first by GNU's, in rounds; the second by that of LLVM and Intel, in ms.
    if not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
        os.environ["GOMP_SPINCOUNT"], os.environ["KMP_BLOCKTIME"] = "5000", "1"


def keep_freed_memory() -> bool:
    """Let this process use memory again that it has freed, in place of handing it back to the kernel; for runs on a CPU.

    The C library returns large blocks at once. The next step asks for them again, and the kernel clears them page by page:
    on two cores a sixth of a step of configs/demo.yaml. What a process holds is then its peak, which is what it needs in
    every step. Settings of the user, or another allocator of theirs, stay.

    Returns:
        Whether it is set; only the GNU C library has the setting.
    """
    if any(name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    trim_threshold, mmap_threshold, most = -1, -3, 2**31 - 1  # malloc.h
    return bool(mallopt(mmap_threshold, 2**30) and mallopt(trim_threshold, most))


def cpu_quota(groups: Path = Path("/proc/self/cgroup"), mount: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores' worth of time that control groups (version 1 or 2) leave this process; None without a limit.

    Args:
        groups: file that names the groups of the process.
        mount: where their file system is.

    Source: cpu.max in the kernel's Documentation/admin-guide/cgroup-v2.rst, and cpu.cfs_quota_us in
    Documentation/scheduler/sched-bwc.rst. A limit of a parent group holds for its children.
    """
    try:
        entries = [line.split(":", 2) for line in groups.read_text().splitlines()]
    except OSError:
        return None
    limits = []
    for entry in entries:
        if len(entry) != 3 or not (entry[1] == "" or "cpu" in entry[1].split(",")):
            continue
        root = mount / entry[1]
        # Inside a container the path may be that of the host; the group is then the root that is mounted there.
        folder = root / entry[2].strip("/")
        for level in (folder, *folder.parents):
            limits += [limit for limit in (_quota_in(level),) if limit is not None]
            if level == root:
                break
    return min(limits, default=None)


def _quota_in(folder: Path) -> float | None:
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text().strip()
            period = (folder / "cpu.cfs_period_us").read_text().strip()
        return int(quota) / int(period) if quota not in ("max", "-1") else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Instruction sets of this CPU, as Linux names them on x86 (flags) and Arm (Features); empty where it does not say."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return set()
    words = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return set(next(words, []))


def has_fast_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16 numbers."""
    return not cpu_flags().isdisjoint(FAST_BF16)


def cores_of_this_process() -> int:
    """Cores that this process may use: those it may be scheduled on, within its control group's quota; at least 1."""
    cores = len(os.sched_getaffinity(0))
    quota = cpu_quota()
    return max(1, cores if quota is None else min(cores, int(quota)))


def visible_gpus() -> list[str]:
    """GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; no driver is loaded to find out."""
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    present = [path.name.removeprefix("nvidia") for path in sorted(Path("/dev").glob("nvidia[0-9]*"))]
    if text is None:
        return [str(number) for number in range(len(present))]
    return [word.strip() for word in text.split(",") if word.strip() not in ("", "-1")] if present else []


def choose_threads(requested: int, processes_on_this_node: int) -> int:
    """CPU threads for this process.

    Args:
        requested: `run.threads`; above 0 it wins.
        processes_on_this_node: which share the cores, where neither `requested` nor OMP_NUM_THREADS says a number.

    Raises:
        ConfigurationError: OMP_NUM_THREADS is not a whole number of 1 or more, or a list of them.
    """
    if requested > 0:
        return requested
    text = os.environ.get("OMP_NUM_THREADS", "").strip()
    if not text:
        return max(1, cores_of_this_process() // max(1, processes_on_this_node))
    # A list has one number per level of nesting.
    first = text.split(",")[0].strip()
    if not (first.isascii() and first.isdigit()) or int(first) < 1:
        error = ConfigurationError(
            f"OMP_NUM_THREADS={text}: must be a whole number of 1 or more: set one, unset it, or use --run.threads N"
        )
        error.on_one_rank = True
        raise error
    return int(first)
