"""Who a process is under each launcher, and how many threads it takes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from megagamma import environment
from megagamma.environment import (
    World,
    accelerate_rank,
    accelerate_world_size,
    choose_threads,
    cores_of_this_process,
    cpu_quota,
    export_local_rank,
    launcher_rank,
    launcher_serves_store,
    let_waiting_threads_sleep,
    rendezvous_address,
    restart_count,
    slurm_job_id,
    world_from_environment,
    world_size,
)
from megagamma.errors import ConfigurationError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SRUN = {
    "SLURM_PROCID": "3", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_NTASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "node[07-08]",
}  # fmt: skip
PREFIXES = ("SLURM_", "TORCHELASTIC_", "MASTER_", "OMP_", "GOMP_", "KMP_")
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith(PREFIXES) or name in NAMES:
            monkeypatch.delenv(name)
    # What the functions set themselves is undone too.
    for name in ("MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def install_scontrol(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """A program that stands for SLURM's, which test machines lack."""
    path = folder / "scontrol"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


# -- the launchers -------------------------------------------------------------------------------------------------


def test_plain_python_is_one_process() -> None:
    assert world_from_environment() == World(0, 1, 0, 1)
    assert (launcher_rank(), world_size(), slurm_job_id(), restart_count()) == (0, 1, None, 0)
    assert not launcher_serves_store()


def test_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert world_from_environment() == World(5, 8, 1, 4)
    assert (launcher_rank(), world_size(), restart_count()) == (5, 8, 2)
    assert launcher_serves_store()
    assert "MASTER_ADDR" not in os.environ


def test_deepspeed_names_the_processes_of_a_node_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "LOCAL_SIZE": "4"})
    assert world_from_environment().local_size == 4
    monkeypatch.delenv("LOCAL_SIZE")
    assert world_from_environment().local_size == 0, "not said"


def test_srun_sets_the_rendezvous(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_all(monkeypatch, SRUN)
    install_scontrol(tmp_path, monkeypatch, '[ "$*" = "show hostnames node[07-08]" ] && printf "node07\\nnode08\\n"')
    assert world_from_environment() == World(3, 4, 1, 2)
    assert rendezvous_address() == ("node07", 20000 + 4567)
    assert (launcher_rank(), world_size(), slurm_job_id()) == (3, 4, "1234567")


def test_srun_keeps_a_rendezvous_that_is_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_all(monkeypatch, {**SRUN, "MASTER_ADDR": "other", "MASTER_PORT": "5"})
    install_scontrol(tmp_path, monkeypatch, "exit 1")
    assert world_from_environment().rank == 3
    assert rendezvous_address() == ("other", 5)


@pytest.mark.parametrize("script", ["exit 1", "true"])
def test_srun_whose_hosts_cannot_be_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> None:
    set_all(monkeypatch, SRUN)
    install_scontrol(tmp_path, monkeypatch, script)
    with pytest.raises(ConfigurationError, match=r"SLURM_JOB_NODELIST=node\[07-08\]: .*set MASTER_ADDR"):
        world_from_environment()


def test_allocation_without_srun_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, SRUN)
    monkeypatch.delenv("SLURM_STEP_ID")
    assert world_from_environment() == World(0, 1, 0, 1)
    assert world_size() == 1


def test_torchrun_inside_srun_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {**SRUN, **TORCHRUN})
    assert world_from_environment() == World(5, 8, 1, 4)
    assert (launcher_rank(), world_size()) == (5, 8)


def test_accelerate_does_not_know_srun(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, SRUN)
    assert (accelerate_rank(), accelerate_world_size()) == (0, 1)
    set_all(monkeypatch, TORCHRUN)
    assert (accelerate_rank(), accelerate_world_size()) == (5, 8)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
@pytest.mark.parametrize("value", ["two", "-1", "1.5", "½"])
def test_variable_that_is_no_number(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    set_all(monkeypatch, {**TORCHRUN, name: value})
    with pytest.raises(ConfigurationError, match=rf"^{name}={value}: must be a whole number of .*: unset it") as caught:
        world_from_environment()
    assert caught.value.on_one_rank, "the process that has it must report it"


def test_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {"RANK": "", "WORLD_SIZE": "", "OMP_NUM_THREADS": "", "SLURM_JOB_ID": ""})
    assert world_from_environment() == World(0, 1, 0, 1)
    assert (launcher_rank(), world_size(), slurm_job_id()) == (0, 1, None)


def test_program_reports_a_rank_that_is_no_number(root: Path) -> None:
    process = subprocess.run(
        [sys.executable, "megagamma/pretrain.py", "--config", "configs/smoke.yaml"], cwd=root, capture_output=True,
        text=True, timeout=120, env={**os.environ, "RANK": "first", "WORLD_SIZE": "none"},
    )  # fmt: skip
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith("error: WORLD_SIZE=none: must be a whole number of 1 or more")
    assert process.stderr.count("\n") == 1


# -- the rendezvous --------------------------------------------------------------------------------------------------


def test_rendezvous_by_default() -> None:
    assert rendezvous_address() == ("127.0.0.1", 29500)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("127.0.0.1", "29500")


@pytest.mark.parametrize("port", ["http", "0", "65536", "-1"])
def test_port_that_is_none(monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(ConfigurationError, match=rf"^MASTER_PORT={port}: must be .* 1 to 65535: give a free port"):
        rendezvous_address()


def test_local_rank_is_set_for_libraries_but_not_changed() -> None:
    export_local_rank(3)
    export_local_rank(4)
    assert os.environ["LOCAL_RANK"] == "3"


# -- threads -----------------------------------------------------------------------------------------------------


def test_requested_threads_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert choose_threads(5, 1) == 5
    assert choose_threads(0, 1) == 3
    assert choose_threads(0, 100) == 3, "the variable is per process"


def test_threads_of_a_list_are_those_of_its_first_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "6, 2")
    assert choose_threads(0, 1) == 6


@pytest.mark.parametrize("value", ["0", "-2", "many", "1.5", ",2"])
def test_threads_that_are_no_number(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    with pytest.raises(ConfigurationError, match=rf"^OMP_NUM_THREADS={value}: must be .*--run\.threads N"):
        choose_threads(0, 1)
    assert choose_threads(2, 1) == 2


@pytest.mark.parametrize(("quota", "processes", "threads"), [
    (None, 1, 12), (None, 4, 3), (None, 5, 2), (None, 50, 1), (4.0, 1, 4), (4.9, 2, 2), (0.5, 1, 1), (64.0, 1, 12),
])  # fmt: skip
def test_cores_are_shared_by_the_processes_of_a_node(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, processes: int, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    monkeypatch.setattr(environment, "cpu_quota", lambda: quota)
    assert choose_threads(0, processes) == threads


def test_cores_are_those_that_the_process_may_use() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from megagamma.environment import cores_of_this_process; print(cores_of_this_process())"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "1\n"
    assert 1 <= cores_of_this_process() <= len(os.sched_getaffinity(0))


def groups_of(folder: Path, membership: str, files: dict[str, str]) -> tuple[Path, Path]:
    """A process's list of control groups, and their file system."""
    (folder / "cgroup").write_text(membership)
    for name, text in files.items():
        path = folder / "mount" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder / "cgroup", folder / "mount"


@pytest.mark.parametrize(("membership", "files", "quota"), [
    ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
    ("0::/\n", {"cpu.max": "max 100000\n"}, None),
    ("0::/a/b\n", {"cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2.0),
    # A container: the path is the host's, and the limit is at the root of what is mounted.
    ("0::/kubepods/pod1\n", {"cpu.max": "300000 100000\n"}, 3.0),
    ("4:memory:/x\n2:cpu,cpuacct:/job\n",
     {"cpu,cpuacct/job/cpu.cfs_quota_us": "400000\n", "cpu,cpuacct/job/cpu.cfs_period_us": "100000\n"}, 4.0),
    ("1:cpu:/\n0::/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
    ("3:cpuset:/\n", {"cpuset/cpu.max": "100000 100000\n"}, None),
    ("0::/\n", {"cpu.max": "nonsense\n"}, None),
    ("nonsense\n", {}, None),
])  # fmt: skip
def test_quota_of_control_groups(tmp_path: Path, membership: str, files: dict[str, str], quota: float | None) -> None:
    assert cpu_quota(*groups_of(tmp_path, membership, files)) == quota


def test_system_without_control_groups(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path / "missing", tmp_path) is None


def test_waiting_threads_sleep_unless_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    for name in names:
        monkeypatch.setenv(name, "")  # so that what is set below is undone
        monkeypatch.delenv(name)
    let_waiting_threads_sleep()
    assert [os.environ.get(name) for name in names] == [None, "5000", "1"]
    for chosen in names:
        for name in names:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(chosen, "7")
        let_waiting_threads_sleep()
        assert [name for name in names if name in os.environ] == [chosen] and os.environ[chosen] == "7"


def test_freed_memory_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Page faults of large blocks that are freed and asked for again: none where freed memory is kept."""
    if sys.platform != "linux" or os.confstr("CS_GNU_LIBC_VERSION") is None:
        pytest.skip("only the GNU C library has the setting")
    code = textwrap.dedent("""
        import resource, sys
        from megagamma.environment import keep_freed_memory
        kept = keep_freed_memory() if sys.argv[1] == "keep" else False
        for _ in range(12):
            if _ == 2:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            block = bytearray(1 << 26)
            block[::4096] = b"x" * (1 << 14)
            del block
        print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """)
    for name in [name for name in os.environ if name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD")]:
        monkeypatch.delenv(name)

    def faults(way: str) -> tuple[bool, int]:
        words = [sys.executable, "-c", code, way]
        kept, count = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
        return kept == "True", int(count)

    assert faults("keep")[0] and faults("keep")[1] < 5_000
    assert not faults("default")[0] and faults("default")[1] > 50_000
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "100000")
    assert not faults("keep")[0]


def test_training_threads_sleep_while_they_wait(root: Path) -> None:
    """CPU time of a process whose second thread waits: none when it sleeps, that of a core when it spins."""
    code = textwrap.dedent("""
        import os, sys, time
        from megagamma.cli import main_guard
        def main():
            if sys.argv[1] == "spin":
                os.environ["GOMP_SPINCOUNT"], os.environ["KMP_BLOCKTIME"] = "infinite", "infinite"
            import torch
            torch.set_num_threads(2)
            torch.ones(1 << 20).add_(1)  # starts the second thread, which waits for work from then on
            begin, cpu = time.perf_counter(), time.process_time()
            time.sleep(1.0)
            print((time.process_time() - cpu) / (time.perf_counter() - begin))
        main_guard(main)
    """)
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}

    def load(mode: str) -> float:
        command = [sys.executable, "-c", code, mode]
        return float(subprocess.check_output(command, cwd=root, env=environ, text=True, timeout=120))

    assert load("sleep") < 0.05
    if len(os.sched_getaffinity(0)) > 1:
        assert load("spin") > 0.1, "the measurement sees a thread that spins"


def test_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, megagamma.environment\n"
        "print([n for n in ('torch', 'numpy', 'yaml', 'deepspeed') if n in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


def test_no_other_module_reads_the_variables(root: Path) -> None:
    """A reader elsewhere would have rules of its own about defaults and bad values."""
    variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_", "TORCHELASTIC_", "OMP_")
    readers = set()
    for path in [*(root / "megagamma").rglob("*.py"), *(root / "tools").glob("*.py")]:
        for line in path.read_text().splitlines():
            reads = "environ.get(" in line or "environ[" in line or "getenv(" in line or "env.get(" in line
            if reads and any(name in line for name in variables):
                readers.add(str(path.relative_to(root)))
    assert readers == {"megagamma/environment.py"}
