"""What a wrong command line or a wrong path can be told at once: before torch, which takes seconds to import."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from megagamma.config.schema import Config
from megagamma.data.preparation.manifest import read_manifest
from megagamma.environment import is_first_of_node
from megagamma.errors import DataError, MegagammaError
from megagamma.files import advice
from megagamma.runs.folder import check_resume, checkpoint_folders


def check_early(config: Config, size: int) -> None:
    """Check that data, tokenizer and folder of a run are there. All of it is checked again, under the run's lock.

    Of several processes each looks at the data, which its own host has to have, and the first of each host says so; the
    folder is then left to rank 0, whose answer all processes get when they have come together.

    Args:
        config: resolved and validated.
        size: processes of the run.

    Raises:
        MegagammaError: what is missing.
    """
    try:
        for folder in [*config.data.paths, *config.validation.paths.values()]:
            read_manifest(folder)
        if config.tokenizer.path and not os.path.isfile(config.tokenizer.path):
            raise DataError(
                f"tokenizer.path={config.tokenizer.path}: there is no such file: give a SentencePiece .model"
            )
        if config.run.branch_from:
            checkpoint_folders(Path(config.run.branch_from))
    except MegagammaError as error:
        error.on_one_rank = is_first_of_node()
        raise
    if size == 1:
        check_resume(config.run)
        _check_place(Path(config.run.folder), "run.folder")


def _check_place(folder: Path, option: str) -> None:
    """Whether a folder can be used or created, as far as its nearest parent says. Nothing is created.

    Raises:
        MegagammaError: naming the option, the folder and the reason.
    """
    nearest = folder.absolute()
    problem = 0
    while not problem:
        try:
            mode = os.stat(nearest).st_mode
            if not stat.S_ISDIR(mode):
                problem = errno.ENOTDIR
            elif not os.access(nearest, os.W_OK | os.X_OK):
                problem = errno.EROFS if os.statvfs(nearest).f_flag & os.ST_RDONLY else errno.EACCES
            else:
                return
        except FileNotFoundError:
            nearest = nearest.parent
        except ValueError:  # a null byte
            problem = errno.EINVAL
        except OSError as error:
            problem = error.errno or errno.EIO
    refused = OSError(problem, os.strerror(problem))
    raise MegagammaError(f"{option}={folder}: cannot be written ({refused.strerror}): {advice(refused)}")
