"""What a cluster wants to be told, in a file of shell: launch/site.example.sh. Batch scripts source it, checked first."""

from __future__ import annotations

import difflib
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from megagamma.errors import ConfigurationError
from megagamma.launching.sbatch_options import Option, parse_text

NAMES = {
    "MEGAGAMMA_PARTITION": "partition of jobs that tools/sweep.py submits",
    "MEGAGAMMA_ACCOUNT": "account of those jobs",
    "MEGAGAMMA_QOS": "quality of service of those jobs",
    "MEGAGAMMA_SBATCH": "further options of sbatch for those jobs",
    "MEGAGAMMA_FOLLOW_SBATCH": "options of sbatch for collection and evaluation after a sweep",
    "MEGAGAMMA_SIGNAL_SECONDS": "how long before a job's end it is told to save",
    "MEGAGAMMA_CONTAINER": "words before the command on every node, such as apptainer exec --nv IMAGE",
    "MEGAGAMMA_PYTHON": "the Python with torch",
    "MEGAGAMMA_HOST_PYTHON": "a Python outside of the container, for the supervisor; it needs no torch",
    "MEGAGAMMA_TASKS_PER_NODE": "processes per node, where it is not one per GPU",
    "MEGAGAMMA_LAUNCHER": "srun or deepspeed",
    "MEGAGAMMA_SRUN": "further options of srun",
    "MEGAGAMMA_SUPERVISE": "further options of megagamma supervise",
    "MEGAGAMMA_DOCTOR": "examine the nodes before each start: 1, or options of megagamma doctor",
    "MEGAGAMMA_CODE": "snapshot of the code that a job runs",
    "MEGAGAMMA_CODE_ROOT": "folder for snapshots of the code",
    "MEGAGAMMA_POINTS": "list of an array's points",
    "MEGAGAMMA_MIRROR": "folder of benchmarks, for machines without a network",
    "MEGAGAMMA_SITE": "the site file",
    "MEGAGAMMA_HOME": "the checkout",
    "MEGAGAMMA_DRY_RUN": "print the command and stop",
    "MEGAGAMMA_LOGS": "folder of an attempt's logs",
    "MEGAGAMMA_DEBUG": "print tracebacks",
}
_ASSIGNED = re.compile(r"^\s*(?:export\s+|: *\"?\$\{)?(MEGAGAMMA_\w+)(?:=|:=)", re.MULTILINE)
_IMAGE = (".sif", ".sqsh", ".img", ".simg")


@dataclass(frozen=True)
class Site:
    """A site's values; without a site file those of the environment."""

    path: Path | None = None
    values: dict[str, str] = field(default_factory=dict)
    """MEGAGAMMA_* variables after the file was sourced."""

    def sbatch_options(self) -> list[Option]:
        """Options for sbatch that follow from the file.

        Raises:
            ConfigurationError: MEGAGAMMA_SBATCH holds something else.
        """
        options = [
            Option(option, self.values[name])
            for option, name in (
                ("partition", "MEGAGAMMA_PARTITION"), ("account", "MEGAGAMMA_ACCOUNT"), ("qos", "MEGAGAMMA_QOS"),
            )
            if self.values.get(name)
        ]  # fmt: skip
        if self.values.get("MEGAGAMMA_SIGNAL_SECONDS"):
            options.append(Option("signal", f"B:USR1@{self.values['MEGAGAMMA_SIGNAL_SECONDS']}"))
        return options + parse_text(self.values.get("MEGAGAMMA_SBATCH", ""), self._place("MEGAGAMMA_SBATCH"))

    def _place(self, name: str) -> str:
        return name if self.path is None else f"{self.path}: {name}"


def site_file() -> Path | None:
    """MEGAGAMMA_SITE, else site.sh in the user's config folder; None where there is none.

    Raises:
        ConfigurationError: MEGAGAMMA_SITE names a file that is not there.
    """
    named = os.environ.get("MEGAGAMMA_SITE")
    if named:
        if not Path(named).is_file():
            raise ConfigurationError(
                f"MEGAGAMMA_SITE={named}: there is no such file: copy launch/site.example.sh there"
            )
        return Path(named)
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    path = Path(config) / "megagamma" / "site.sh"
    return path if path.is_file() else None


def load_site(path: Path | None = None) -> Site:
    """Read and check a site file.

    Args: path: of the file; default: see `site_file`.

    Raises:
        ConfigurationError: one mistake of the file, with its line where bash knows it.
    """
    path = path or site_file()
    if path is None:
        return Site(None, {name: value for name, value in os.environ.items() if name.startswith("MEGAGAMMA_")})
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    if checked.returncode:
        said = checked.stderr.strip().splitlines()
        raise ConfigurationError(f"{said[0] if said else path}: the site file is no valid bash: fix that line")
    for name in _ASSIGNED.findall(path.read_text(encoding="utf-8", errors="replace")):
        if name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"use {', '.join(NAMES)}"
            raise ConfigurationError(f"{path}: {name} is no variable of a site file: {hint}")
    # A module command that is missing on a login node is no mistake of the file.
    sourced = subprocess.run(
        ["bash", "-c", 'set -a; . "$0" >&2; env -0', str(path)], capture_output=True, text=True, check=False
    )
    pairs = (entry.partition("=") for entry in sourced.stdout.split("\0"))
    values = {name: value for name, _, value in pairs if name.startswith("MEGAGAMMA_")}
    if not sourced.stdout:
        raise ConfigurationError(
            f"{path}: ends bash when it is sourced ({sourced.stderr.strip()[-300:]}): it must not exit"
        )
    _check_values(path, values)
    return Site(path, values)


def _check_values(path: Path, values: dict[str, str]) -> None:
    for name, minimum in (("MEGAGAMMA_SIGNAL_SECONDS", 1), ("MEGAGAMMA_TASKS_PER_NODE", 1)):
        text = values.get(name, "")
        if text and (not text.isdigit() or int(text) < minimum):
            raise ConfigurationError(f"{path}: {name}={text}: must be a whole number of {minimum} or more")
    for name in ("MEGAGAMMA_SBATCH", "MEGAGAMMA_FOLLOW_SBATCH"):
        parse_text(values.get(name, ""), f"{path}: {name}")
    launcher = values.get("MEGAGAMMA_LAUNCHER", "")
    if launcher not in ("", "srun", "deepspeed"):
        raise ConfigurationError(f"{path}: MEGAGAMMA_LAUNCHER={launcher}: use srun or deepspeed")
    container = values.get("MEGAGAMMA_CONTAINER", "")
    try:
        words = shlex.split(container)
    except ValueError as error:
        raise ConfigurationError(f"{path}: MEGAGAMMA_CONTAINER={container}: {error}: close the quote") from error
    for word in words:
        image = word.rpartition("=")[2]
        if image.endswith(_IMAGE) and "://" not in image and not os.path.exists(image):
            raise ConfigurationError(
                f"{path}: MEGAGAMMA_CONTAINER={container}: there is no image {image}: build it (launch/Dockerfile) or fix "
                "its path"
            )
    python = values.get("MEGAGAMMA_PYTHON", "")
    if python and not words and shutil.which(python) is None:
        raise ConfigurationError(
            f"{path}: MEGAGAMMA_PYTHON={python}: there is no such program: give a Python with torch"
        )


if __name__ == "__main__":  # of launch/common.sh
    from megagamma.cli import main_guard

    def check() -> int:
        load_site(Path(sys.argv[1]))
        return 0

    sys.exit(main_guard(check))
