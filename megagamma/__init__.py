"""megagamma: pretraining of large language models with the scale of initialization as a first-class option.

The method in two lines, for a model that is there already:

    import megagamma
    report = megagamma.initialize(model, gamma=1.0, seed=1234)
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megagamma.adapters.initialize import initialize
    from megagamma.adapters.patch import patched_initialization

__version__ = "0.1.0"
__all__ = ["__version__", "initialize", "patched_initialization"]

# Imported when they are asked for: a command that draws nothing should not wait for torch.
_PLACES = {
    "initialize": "megagamma.adapters.initialize",
    "patched_initialization": "megagamma.adapters.patch",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PLACES[name]), name)
