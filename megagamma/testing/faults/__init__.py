"""The faults of the drill (`megagamma.testing.drill`), each with what is promised."""

from megagamma.testing.drill import Fault
from megagamma.testing.faults import files, processes, storage

FAULTS = {
    fault.name: fault
    for fault in (
        Fault("killed in a step", "resumes to the bit, each step once", processes.killed_in_a_step),
        Fault("crashed", "resumes to the bit after SIGSEGV and SIGABRT", processes.crashed),
        Fault(
            "killed in a save",
            "every checkpoint under its name is valid; resumes to the bit",
            processes.killed_in_a_save,
        ),
        Fault("one rank killed", "the other leaves by itself; resumes on another layout", processes.one_rank_killed),
        Fault("one rank silent", "given up after run.timeout_minutes", processes.one_rank_silent),
        Fault("asked to stop", "saves and leaves with exit code 75", processes.asked_to_stop),
        Fault("launched twice", "the second is refused, the first undisturbed", processes.launched_twice),
        Fault("console gone", "trains on, files complete, exit code 0", processes.console_gone),
        Fault("folder renamed", "stops with an error, writes no second folder", processes.folder_renamed),
        Fault("disk full", "stops with an error, earlier checkpoints untouched", storage.disk_full),
        Fault("disk full, asynchronous", "a warning, then a stop; nothing published", storage.disk_full_asynchronous),
        Fault("folder unwritable", "refused before a step", storage.unwritable),
        Fault("bit flip", "refused by name; the checkpoint before when asked for", files.bit_flip),
        Fault(
            "bit flip in checkpoint.json",
            "refused by name; the checkpoint before when asked for",
            files.bit_flip_manifest,
        ),
        Fault("file cut off", "refused by name; the checkpoint before when asked for", files.cut_off),
        Fault("file removed", "refused by name; the checkpoint before when asked for", files.removed),
        Fault("checkpoint.json edited", "refused by name; the checkpoint before when asked for", files.edited),
        Fault("file of the user in a checkpoint", "never deleted", files.file_of_the_user),
        Fault("checkpoints gone", "earlier metrics are kept", files.checkpoints_gone),
        Fault("metrics garbled", "resumes, every other line kept", files.metrics_garbled),
        Fault("tokens changed", "refused before a step", files.tokens_changed),
        Fault("index changed", "refused before a step", files.index_changed),
        Fault("never finite", "no success: exit code 3", storage.never_finite),
    )
}
"""Every fault by its name, in the order of the drill."""
