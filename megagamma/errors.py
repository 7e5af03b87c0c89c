"""Exceptions of the project. Every message says what is wrong, its value, the rule, and how to fix it.

Command-line programs turn a `MegagammaError` into one line on standard error and its `exit_code`,
without a traceback: the person who reads it is a user, not a debugger.
"""


class MegagammaError(Exception):
    """Base of all errors that a user can cause and fix."""

    exit_code = 2
    on_one_rank = False
    """Whether the other ranks do not have it, so that the one that does must print it."""


class ConfigurationError(MegagammaError):
    """An option, or a combination of options, that cannot work. Raised before any file or process group is opened."""


class DataError(MegagammaError):
    """Text, token files or a tokenizer that is missing, corrupt, or does not belong together."""


class CheckpointError(MegagammaError):
    """A checkpoint that is missing, corrupt, incomplete, or of another model."""


class InitializationError(MegagammaError):
    """Weights that were not drawn with their target std."""


class DistributedError(MegagammaError):
    """Process groups that cannot be formed: a port in use, a rank missing, a device absent."""


class TrainingError(MegagammaError):
    """A run that cannot continue, such as a loss that is not a number under the policy `stop`."""

    exit_code = 3


class EvaluationError(MegagammaError):
    """Scores that cannot be had: an unknown task, data that is missing, a score file or model that makes no sense."""
