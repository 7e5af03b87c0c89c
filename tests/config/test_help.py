"""Every option is described, once, where it is declared; `--help` repeats it and answers at once."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

from megagamma.config import schema as config_module
from megagamma.config.io import known_keys
from megagamma.config.schema import Config


def test_help_names_every_knob_without_torch(root: Path) -> None:
    """In a process of its own: what is imported is a matter of the process."""
    code = (
        "import sys\nsys.argv = ['pretrain.py', '--help']\nfrom megagamma.pretrain import main\n"
        "try:\n    main()\nexcept SystemExit as done:\n"
        "    print('CODE', done.code, 'torch' in sys.modules, 'deepspeed' in sys.modules)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert found.stdout.splitlines()[-1] == "CODE 0 False False", found.stderr
    missing = [key for key in known_keys() if f"--{key} " not in found.stdout]
    assert not missing
    assert "--model.hiden_size " not in found.stdout
    # The text comes from the docstrings, not only the names.
    assert "Peak learning rate." in found.stdout


def test_every_knob_has_a_docstring() -> None:
    tree = ast.parse(Path(config_module.__file__).read_text())
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Config")]
    assert len(classes) == len(dataclasses.fields(Config)), "one class per section, and Config itself"
    bare = []
    for node in classes:
        assert ast.get_docstring(node), node.name
        for item, after in zip(node.body, [*node.body[1:], None], strict=True):
            if not isinstance(item, ast.AnnAssign):
                continue
            described = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            # A section is described by its class.
            if not described and not (node.name == "Config" and item.annotation.id.endswith("Config")):
                bare.append(f"{node.name}.{item.target.id}")
    assert not bare
