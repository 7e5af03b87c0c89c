"""The docs against the tree: every link, path, module, test and option that they name exists, and their example runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from support.ranks import RankPool
from support.train import SMOKE

from megagamma.config.io import known_keys
from megagamma.config.schema import ROLES
from megagamma.runs.folder import RunFolder

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]

_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
# A path from the root of the tree, perhaps with a pattern in it, perhaps with a test of the file.
_PATH = re.compile(r"(?<![\w/.-])((?:megagamma|tools|tests|configs|docs)/[\w./*-]*)(?:::(\w+))?")
_MODULE = re.compile(r"(?<![\w/.-])megagamma((?:\.\w+)+)")
_FLAG = re.compile(r"--([a-z]+\.[a-z_]+)")
# Files such as tokenizer.model look alike.
_QUOTED_KEY = re.compile(r"`([a-z]+\.(?!(?:json|md|model|py|yaml)`)[a-z_]+)`")


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def link_problems(text: str, page: Path) -> list[str]:
    """Relative links whose file or heading is not there."""
    problems = []
    for link in _LINK.findall(text):
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            problems.append(f"link {link}")
    return problems


def path_problems(text: str) -> list[str]:
    """Paths and tests that are not in the tree."""
    problems = []
    for match in _PATH.finditer(text):
        path, test = match[1].rstrip("."), match[2]
        files = list(ROOT.glob(path.rstrip("/")))
        if not files or (test and f"def {test}(" not in files[0].read_text(encoding="utf-8")):
            problems.append(f"path {match[0]}")
    return problems


def module_problems(text: str) -> list[str]:
    """Dotted names that are neither a module of the package nor something that one defines."""
    problems = []
    for dotted in _MODULE.findall(text):
        place, names = ROOT / "megagamma", dotted.split(".")[1:]
        while names and (place / names[0]).is_dir():
            place /= names.pop(0)
        file = place / f"{names.pop(0)}.py" if names and (place / f"{names[0]}.py").exists() else place / "__init__.py"
        if names and names[0] not in defined(file):
            problems.append(f"module megagamma{dotted}")
    return problems


def defined(file: Path) -> set[str]:
    """Names that a module defines at its top, or lists in `__all__`, as those that it imports when they are asked for."""
    names = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            targets = {target.id for target in node.targets if isinstance(target, ast.Name)}
            names |= set(ast.literal_eval(node.value)) if targets == {"__all__"} else targets
    return names


def option_problems(text: str) -> list[str]:
    """Flags `--section.key`, and quoted `section.key`, that are no options."""
    keys = {*known_keys(), *(f"init.{role}" for role in ROLES)}
    sections = {key.partition(".")[0] for key in keys}
    quoted = [key for key in _QUOTED_KEY.findall(text) if key.partition(".")[0] in sections]
    return [f"option {key}" for key in [*_FLAG.findall(text), *quoted] if key not in keys]


def problems_of(text: str, page: Path) -> list[str]:
    return link_problems(text, page) + path_problems(text) + module_problems(text) + option_problems(text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_everything_named_exists(page: Path) -> None:
    assert problems_of(page.read_text(encoding="utf-8"), page) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("see [the page](docs/missing.md)", "link docs/missing.md"),
        ("see [the part](docs/memory.md#no-such-heading)", "link docs/memory.md#no-such-heading"),
        ("in `megagamma/interop/export.py`.", "path megagamma/interop/export.py"),
        ("run tools/no_such_tool.py", "path tools/no_such_tool.py"),
        ("all of `configs/model/*.toml`", "path configs/model/*.toml"),
        ("`tests/test_docs.py::test_that_is_gone`", "path tests/test_docs.py::test_that_is_gone"),
        ("`megagamma.training.setup.gone`", "module megagamma.training.setup.gone"),
        ("`megagamma.nowhere`", "module megagamma.nowhere"),
        ("set --model.hiden_size 3", "option model.hiden_size"),
        ("the section's `init.gama`", "option init.gama"),
    ],
)
def test_what_does_not_exist_is_noticed(text: str, problem: str) -> None:
    assert any(one.startswith(problem) for one in problems_of(text, ROOT / "README.md"))


def test_what_exists_passes() -> None:
    text = (
        "[a](docs/memory.md#calibration) [b](#pretrain) [c](https://example.org/docs/x.md) `megagamma/files.py`, docs/. "
        "`configs/model/*.yaml` `tests/test_docs.py::test_what_exists_passes` `megagamma.cli.main_guard` "
        "--init.embedding 0.5 `run.seed` `checkpoint.json` `tokenizer.model` `model.layers.7.self_attn.q_proj.weight`"
    )
    assert problems_of(text, ROOT / "README.md") == []


def test_indexes_are_complete() -> None:
    """The index of the docs links every page, and that of the decisions every decision."""
    for folder, others in ((ROOT / "docs", {"decisions/README.md"}), (ROOT / "docs" / "decisions", set())):
        pages = {page.name for page in folder.glob("*.md")} - {"README.md"}
        index = (folder / "README.md").read_text(encoding="utf-8")
        assert pages | others <= set(_LINK.findall(index))


def test_every_package_is_described() -> None:
    packages = {path.parent.name for path in (ROOT / "megagamma").glob("*/__init__.py")}
    assert {"config", "initialization", "training"} <= packages
    for page in ("README.md", "docs/architecture.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert {name for name in packages if not re.search(rf"megagamma/{name}\b", text)} == set(), page


def train_with_example(code: str, arguments: list[str]) -> int:
    """A smoke run with the callback that CONTRIBUTING.md shows, on this rank of a pool."""
    from megagamma.config.io import parse_config
    from megagamma.environment import world_from_environment
    from megagamma.job import train

    names: dict[str, type] = {}
    exec(code, names)
    world = world_from_environment()
    config = parse_config([*SMOKE, *arguments], world_size=world.size)
    return train(config, world, measuring=[names["LossByHalf"](2)])


def test_the_example_of_an_instrument_runs(tmp_path: Path, data_cache: str, two_ranks: RankPool) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    arguments = [
        *("--run.folder", str(tmp_path / "run"), "--data.cache", data_cache, "--run.steps", "2"),
        *("--parallel.pipeline", "2", "--data.global_batch_size", "2", "--checkpoint.at_end", "false"),
        *("--validation.interval", "0", "--validation.at_end", "false", "--logging.sample_tokens", "0"),
    ]
    assert two_ranks.run(train_with_example, code, arguments) == [0, 0]
    first, second = RunFolder(tmp_path / "run").metrics().read()
    assert "context/first_half" not in first
    # On the batch of the step, right after its update.
    halves = (second["context/first_half"] + second["context/second_half"]) / 2
    assert 0.5 * second["loss"] < halves < second["loss"]
