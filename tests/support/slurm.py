"""A real SLURM of several nodes on this machine: each node has its own network, processes, host name and shared memory.

It needs root with the right to make namespaces, and Debian's packages slurmctld, slurmd and slurm-client. Nothing in /etc
is touched, no service is started, and nothing outlives `stop`.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
GPUS = 8
PORT = 18317
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

# Without control groups, accounting and authentication; quick to notice and to requeue. cred_expire is also how long a
# requeued job waits, and 5 s the least that is allowed.
CONFIG = """\
ClusterName=tests
SlurmctldHost=localhost({gateway})
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd.%n.pid
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
PropagateResourceLimits=NONE
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
GresTypes=gpu
SlurmctldTimeout=10
SlurmdTimeout=6
KillWait={kill_wait}
MessageTimeout=5
TCPTimeout=2
BatchStartTimeout=10
UnkillableStepTimeout=20
InactiveLimit=0
MinJobAge=86400
JobRequeue=1
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=2,bf_continue
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=60 DefaultTime=10 State=UP PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str:
    """Why there can be no cluster here; empty when there can."""
    for program in ("slurmctld", "slurmd", "sbatch", "srun", "unshare", "ip"):
        if shutil.which(program) is None:
            return f"{program} is not installed (apt-get install slurmctld slurmd slurm-client)"
    if os.geteuid() != 0:
        return "a cluster of namespaces needs root"
    probe = "ip link set lo up && ip link add test0 type veth peer name test1 && mount -t tmpfs none /mnt"
    if subprocess.run(["unshare", "-muipnf", "bash", "-c", probe], capture_output=True, check=False).returncode:
        return "this machine gives root no namespaces with a network of their own"
    return ""


def until(condition: Callable[[], Any], seconds: float = 120, what: str = "") -> Any:
    """Wait for a condition; returns its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {seconds} s in vain for {what or condition}"
        time.sleep(0.05)
    return value


def _free_place() -> tuple[TextIO, int]:
    """A lock that is held as long as the file is open, and the number of the ports and the subnet that are ours with it."""
    for number in range(20):
        place = open(Path(tempfile.gettempdir()) / f"megagamma-slurm-{number}.lock", "w")  # noqa: SIM115
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.create_server(("", PORT + 200 * number)):  # nor one that knows of no lock
                return place, number
        except OSError:
            place.close()
    raise AssertionError("20 clusters at once")


class Cluster:
    """A SLURM of its own."""

    def __init__(self, folder: Path, nodes: int = 4) -> None:
        """Start it, beside those that other test runs on this machine have."""
        self.folder = folder
        self._place, number = _free_place()
        self.port, self.subnet = PORT + 200 * number, f"10.{84 + number}.0"
        self.names = [f"n{number}" for number in range(1, nodes + 1)]
        self.bridge = f"mg{self.port}"
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("SLURM_", "SBATCH_", "MEGAGAMMA_"))
        }
        self.env = {**kept, "SLURM_CONF": str(folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}
        # The tree and the Python under test, wherever the package is installed.
        self.env |= {"MEGAGAMMA_PYTHON": sys.executable, "MEGAGAMMA_HOME": str(ROOT), "XDG_CONFIG_HOME": str(folder)}
        self.env["MEGAGAMMA_CODE_ROOT"] = str(folder / "code")
        self._write()
        self._start()

    def _write(self) -> None:
        for name in ("log", "state", "run", "dev"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(GPUS):
            (self.folder / "dev" / f"nvidia{number}").symlink_to("/dev/null")
        gateway = f"{self.subnet}.254"
        lines = [
            f"NodeName={name} NodeHostname={name} NodeAddr={self._address(name)} Port={self.port + 100 + number} CPUs=8 "
            f"RealMemory=64000 Gres=gpu:{GPUS} State=UNKNOWN"
            for number, name in enumerate(self.names)
        ]
        text = CONFIG.format(
            gateway=gateway,
            port=self.port,
            user=getpass.getuser(),
            folder=self.folder,
            nodes="\n".join(lines),
            kill_wait=5,
        )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "plugstack.conf").write_text("")
        (self.folder / "gres.conf").write_text(
            f"AutoDetect=off\nNodeName=n[1-{len(self.names)}] Name=gpu File={self.folder}/dev/nvidia[0-{GPUS - 1}]\n"
        )
        hosts = [("127.0.0.1", "localhost"), (gateway, os.uname().nodename)]
        hosts += [(self._address(name), name) for name in self.names]
        (self.folder / "hosts").write_text("".join(f"{address} {name}\n" for address, name in hosts))
        (self.folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")
        switch = Path("/etc/nsswitch.conf")
        text = switch.read_text() if switch.exists() else "hosts: files\n"
        (self.folder / "nsswitch.conf").write_text(re.sub(r"^hosts:.*", "hosts: files", text, flags=re.MULTILINE))

    def _address(self, name: str) -> str:
        return f"{self.subnet}.{name[1:]}"

    def _start(self) -> None:
        self._ip(f"link del {self.bridge}", check=False)
        self._ip(f"link add {self.bridge} type bridge")
        self._ip(f"addr add {self.subnet}.254/24 dev {self.bridge}")
        self._ip(f"link set {self.bridge} up")
        self._controller = self._spawn(["slurmctld", "-D", "-s"])
        for name in self.names:
            self.start_node(name, wait=False)
        self.wait_idle()
        # Nodes that look idle may still be unable to run a step.
        self.call("srun", "--quiet", f"--nodes={len(self.names)}", "--ntasks-per-node=1", "true", timeout=30)

    def _spawn(self, words: list[str]) -> subprocess.Popen[bytes]:
        with open(self.folder / "log" / "console", "ab") as console:
            return subprocess.Popen(
                words, cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL, stdout=console, stderr=console,
                start_new_session=True,
            )  # fmt: skip

    @staticmethod
    def _ip(words: str, check: bool = True) -> None:
        subprocess.run(["ip", *words.split()], check=check, capture_output=True)

    def stop(self) -> None:
        """End everything."""
        for name in self.names:
            self.kill_node(name)
        self._controller.terminate()
        try:
            self._controller.wait(10)
        except subprocess.TimeoutExpired:
            self._controller.kill()
        self._ip(f"link del {self.bridge}", check=False)
        self._place.close()

    # -- nodes ---------------------------------------------------------------------------------------------------

    def start_node(self, name: str, wait: bool = True) -> None:
        """Switch a node on."""
        if name in self._nodes:
            return
        (self.folder / "spool" / name).mkdir(parents=True, exist_ok=True)
        node = self._spawn(
            ["unshare", "-muipnf", "--kill-child", "--mount-proc", "bash", str(HERE / "slurm_node.sh"), name,
             self._address(name), f"{self.subnet}.254", str(self.folder)]
        )  # fmt: skip
        here = os.readlink("/proc/self/ns/net")
        until(lambda: os.readlink(f"/proc/{node.pid}/ns/net") != here, 10, "the node's network")
        link = f"{self.bridge}{name}"
        self._ip(f"link del {link}", check=False)
        self._ip(f"link add {link} type veth peer name eth0 netns {node.pid}")
        self._ip(f"link set {link} master {self.bridge} up")
        self._nodes[name] = node
        if wait:
            self.wait_idle()

    def kill_node(self, name: str) -> None:
        """Cut a node's power: every process on it is gone at once. SLURM is told nothing."""
        node = self._nodes.pop(name, None)
        if node is not None:
            node.kill()
            node.wait()

    def wait_idle(self) -> None:
        """Wait until SLURM has every node."""

        def ready() -> bool:
            states = self.call("sinfo", "--noheader", "--Node", "--partition=main", "--format=%t", check=False).split()
            return len(states) == len(self.names) and set(states) <= {"idle", "mix", "alloc", "comp"}

        until(ready, 60, "all nodes")

    # -- commands ------------------------------------------------------------------------------------------------

    def call(self, *words: str, check: bool = True, timeout: float = 60, cwd: Path = ROOT, **more: str) -> str:
        """Output of a command of SLURM."""
        done = subprocess.run(
            words, env={**self.env, **more}, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False
        )
        assert not check or done.returncode == 0, (words, done.returncode, done.stdout, done.stderr)
        return done.stdout

    def submit(self, *words: str, cwd: Path = ROOT, **more: str) -> str:
        """Number of a new job."""
        return self.call("sbatch", "--parsable", *words, cwd=cwd, **more).strip()

    def field(self, job: str, name: str) -> str:
        """A field of `scontrol show job`."""
        found = re.search(rf"(?:^| ){name}=(\S*)", self.call("scontrol", "--oneliner", "show", "job", job))
        assert found is not None, (job, name)
        return found[1]

    def state(self, job: str) -> str:
        return self.field(job, "JobState")

    def wait(self, job: str, *states: str, seconds: float = 150) -> str:
        """Wait until a job has one of these states, or has ended; returns it. A job that waits for its restart is hurried."""

        def reached() -> str:
            state = self.state(job)
            if state == "PENDING" and "PENDING" not in states and self.field(job, "Restarts") != "0":
                # Not `now`: a restart in the second of the requeue is refused.
                self.call("scontrol", "update", f"job={job}", "StartTime=now+2", check=False)
                with contextlib.suppress(AssertionError):
                    until(lambda: self.state(job) != "PENDING", 6)
            return state if state in (states or ENDED) else ""

        return str(until(reached, seconds, f"job {job}: {states or ENDED}, now {self.state(job)}"))

    def nodes_of(self, job: str) -> list[str]:
        """Nodes of a job, the batch script's first."""
        return self.call("scontrol", "show", "hostnames", self.field(job, "NodeList")).split()

    def clear(self) -> None:
        """Cancel every job, switch all nodes on, and wait for them."""
        self.call("scancel", "--user", getpass.getuser(), check=False)
        until(lambda: not self.call("squeue", "--noheader", "--format=%i").strip(), 60, "jobs to end")
        self.clear_nodes()

    def clear_nodes(self) -> None:
        """Switch all nodes on, and wait for them."""
        for name in self.names:
            if name in self._nodes and self._nodes[name].poll() is not None:
                self._nodes.pop(name)
            self.start_node(name, wait=False)
        self.wait_idle()

    def process_of(self, name: str, pid: int) -> int:
        """Number here of a process of a node, which it calls `pid`."""
        inside = os.readlink(f"/proc/{self._init_of(name)}/ns/pid")
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                numbers = re.search(r"^NSpid:\s*(.*)$", (entry / "status").read_text(), re.MULTILINE)
                if numbers and numbers[1].split()[-1] == str(pid) and os.readlink(entry / "ns" / "pid") == inside:
                    return int(entry.name)
        raise AssertionError(f"no process {pid} on {name}")

    def _init_of(self, name: str) -> str:
        parent = self._nodes[name].pid
        return Path(f"/proc/{parent}/task/{parent}/children").read_text().split()[0]

    def send(self, name: str, pid: int, number: signal.Signals) -> None:
        """Send a signal to a process of a node, by its number there."""
        os.kill(self.process_of(name, pid), number)
