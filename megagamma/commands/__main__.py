"""The console script: `megagamma COMMAND ...`, also as `python -m megagamma.commands COMMAND ...`."""

from __future__ import annotations

import ast
import difflib
import importlib
import pkgutil
import sys
from pathlib import Path

import megagamma
from megagamma.cli import leave, main_guard
from megagamma.errors import ConfigurationError


def modules() -> dict[str, str]:
    """Module of every command by its name."""
    names = (item.name for item in pkgutil.iter_modules([str(Path(__file__).parent)]))
    found = {name: f"megagamma.commands.{name}" for name in names if not name.startswith("_")}
    return {"pretrain": "megagamma.pretrain", **found}


def summary(module: str) -> str:
    """First line of a module's docstring. The module is not imported: some take seconds."""
    path = Path(megagamma.__file__).parents[1].joinpath(*module.split(".")).with_suffix(".py")
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").splitlines()[0]


def run(words: list[str]) -> int:
    """Run the command that the first word names, with the other words as its arguments.

    Raises:
        ConfigurationError: there is no command of that name.
    """
    commands = modules()
    if not words or words[0] in ("-h", "--help", "help"):
        print("usage: megagamma COMMAND [ARGUMENTS]        (megagamma COMMAND --help lists its arguments)\n")
        for name, module in commands.items():
            print(f"  {name:<20} {summary(module)}")
        return 0
    if words[0] == "--version":
        print(f"megagamma {megagamma.__version__}")
        return 0
    name = words[0].replace("-", "_")
    if name not in commands:
        near = difflib.get_close_matches(name, commands, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"use {', '.join(commands)}"
        raise ConfigurationError(f"{words[0]} is not a command: {hint}")
    sys.argv = [f"megagamma {name}", *words[1:]]  # what the command's help and a run's provenance show
    return importlib.import_module(commands[name]).main(words[1:])


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns its exit code, see `megagamma.cli`."""
    words = sys.argv[1:] if arguments is None else arguments
    code = main_guard(lambda: run(words))
    if words[:1] == ["pretrain"]:
        leave(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
