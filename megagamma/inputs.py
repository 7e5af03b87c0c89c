"""What a run reads, by its config: prepared text, or a toy."""

from __future__ import annotations

from megagamma.config.schema import Config
from megagamma.data.sources import RunData
from megagamma.data.sources import open_data as open_text


def open_data(config: Config) -> RunData:
    """Open a run's data.

    Raises:
        DataError, ConfigurationError: see `megagamma.data.sources.open_data` and `megagamma.toys.sources.open_toy`.
    """
    if config.data.toy:
        from megagamma.toys.sources import open_toy

        return open_toy(config)
    return open_text(config)
