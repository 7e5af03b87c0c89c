"""How a Hugging Face model is, or would be, drawn: from its files, without loading it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megagamma.adapters.blocks import Entry, Kept, Plan
from megagamma.adapters.huggingface import huggingface_plan
from megagamma.adapters.initialize import checked_options, initialize
from megagamma.adapters.local import LocalTensor
from megagamma.adapters.patterns import Role, check_roles, entries_by_pattern
from megagamma.adapters.report import Report
from megagamma.config.schema import InitConfig
from megagamma.errors import ConfigurationError
from megagamma.files import read_json
from megagamma.huggingface.importing import HuggingFaceWeights
from megagamma.initialization.report import WeightStatistics

_CONFIG = "config.json"


def report_of(path: Path, roles: Mapping[str, Role], **options: Any) -> Report:
    """The dry run of `megagamma.initialize` for a folder or a config.json.

    Of a folder every matrix is measured, a piece of at most 32 MiB at a time; of a config.json there are targets alone.

    Args:
        path: a folder with config.json and safetensors files, or a config.json.
        roles: of parameters by name, before the class's table.
        options: of the rule, as `megagamma.initialize` has them.

    Raises:
        MegagammaError: it is neither, or holds a model that is quantized or of an unknown class.
    """
    init = checked_options(0, **options)
    check_roles(roles)
    if path.is_dir():
        settings = read_json(path / _CONFIG)
        _refuse_quantized(path, settings)
        return _of_folder(path, settings, init, roles)
    if path.suffix != ".json":
        raise ConfigurationError(f"--model {path}: must be a folder of a Hugging Face model, or its config.json")
    settings = read_json(path)
    _refuse_quantized(path, settings)
    return _of_config(path, settings, roles, options)


def _refuse_quantized(path: Path, settings: Mapping[str, Any]) -> None:
    if settings.get("quantization_config"):
        kind = settings["quantization_config"].get("quant_method", "of some kind")
        raise ConfigurationError(f"--model {path}: is quantized ({kind}): give the model that it was made from")


def _of_folder(folder: Path, settings: Mapping[str, Any], init: InitConfig, roles: Mapping[str, Role]) -> Report:
    if not any(folder.glob("*.safetensors")):
        found = ", ".join(sorted(one.name for one in folder.iterdir())[:5])
        raise ConfigurationError(
            f"--model {folder}: has no safetensors files (it has {found}): load and save it once with transformers' "
            "save_pretrained"
        )
    weights = HuggingFaceWeights(folder)
    shapes = {name: weights.shape(name) for name in sorted(weights.names())}
    plan, kept = _plan(settings, shapes, roles)
    if not plan.logical():
        some = ", ".join(list(shapes)[:3])
        raise ConfigurationError(
            f"--model {folder}: no tensor has a name that its class's table knows (they are named as {some}): give --role"
        )
    statistics: dict[str, WeightStatistics] = {}
    for name, entry in plan.entries.items():
        if not isinstance(entry, tuple):
            continue
        values = weights.read(name)
        if not values.is_floating_point() or values.element_size() < 2:
            raise ConfigurationError(
                f"{folder}: {name} is {values.dtype}, quantized: give the model that it was made from"
            )
        for block, _, view in LocalTensor(values, (0,) * values.dim(), shapes[name]).pieces(entry):
            known = statistics.get(block.logical.name, WeightStatistics())
            statistics[block.logical.name] = known + WeightStatistics.of(view)
    return Report(plan, init, statistics, False, kept)


def _plan(
    settings: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], roles: Mapping[str, Role]
) -> tuple[Plan, dict[str, str]]:
    """The plan, and why other tensors are not looked at. A tied head that is written all the same is the embedding."""
    given = entries_by_pattern(roles, shapes)
    plan = huggingface_plan(settings, shapes)
    entries: dict[str, Entry] = {**plan.entries, **given}
    if settings.get("tie_word_embeddings"):
        entries = {name: one for name, one in entries.items() if not (isinstance(one, tuple) and _is_head(one))}
    kept = {name: one.reason for name, one in entries.items() if isinstance(one, Kept)}
    kept |= {name: "has no role" for name in shapes if name not in plan.entries and name not in given}
    plan.entries = entries
    return plan, kept


def _is_head(entry: Any) -> bool:
    return bool(entry[0].logical.role == "head")


def _of_config(
    path: Path, settings: Mapping[str, Any], roles: Mapping[str, Role], options: Mapping[str, Any]
) -> Report:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:  # transformers has exceptions of its own for a config that cannot be
        kind = settings.get("model_type")
        raise ConfigurationError(
            f"--model {path}: transformers cannot build model_type={kind!r} ({str(error).splitlines()[0][:200]}): give a "
            "folder with its weights, whose names are enough"
        ) from error
    return initialize(model, roles=roles, dry_run=True, **options)
