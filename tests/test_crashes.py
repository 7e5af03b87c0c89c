"""Publishing stopped between every two file operations: the old or the new state is there, and never neither.

A checkpoint is saved over one of its step while others are pruned, a model is exported over an export, and text is
prepared over prepared text. What the disk sees is real; of a run only the gathering over ranks is left out.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.crashes import Case, outcome_of

WAYS = ["exchange", "set aside"]


def config_of_a_tiny_model() -> Any:
    from megagamma.config.resolve import resolve
    from megagamma.config.schema import Config, DataConfig, ModelConfig

    model = ModelConfig(
        hidden_size=8, num_layers=1, num_attention_heads=1, ffn_hidden_size=8, vocab_size=8, vocab_size_multiple=8,
        attention_gate="none",
    )  # fmt: skip
    return resolve(Config(model=model, data=DataConfig(corpus="tiny")))


class OneProcess:
    """What saving needs of a runtime of one process; the real one has threads, which do not outlive a fork."""

    rank, size, is_main = 0, 1, True

    def run_on_rank0(self, action: Any) -> Any:
        return action()

    run_on_all_ranks = run_on_rank0

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def any_rank(self, flag: bool) -> bool:
        return flag

    def barrier(self) -> None:
        pass


class Save(Case):
    """Step 3 again, then `prune`, which may delete step 1 but not step 2, inside which somebody keeps an export."""

    strangers = 2

    def save(self, root: Path, step: int, mark: str) -> None:
        from unittest import mock

        import torch

        from megagamma.checkpoint import saver
        from megagamma.config.io import as_dict
        from megagamma.model.parameters import logical_parameters

        config = config_of_a_tiny_model()
        parameters = logical_parameters(config.model)
        owned = dict.fromkeys(saver.KINDS, parameters)
        value = {"old": 1.0, "new": 2.0}[mark]
        tensors = [(kind, one.name, torch.full(one.shape, value)) for kind in saver.KINDS for one in parameters]
        engine = mock.Mock(runtime=OneProcess())
        engine.state.step = step
        state = {
            "config": as_dict(config), "consumed_samples": step, "seconds": 1.0, "tokenizer": "", "progress": {"mark": mark},
        }  # fmt: skip
        with (
            mock.patch.object(saver, "_owned", return_value=owned),
            mock.patch.object(saver, "whole_tensors", return_value=iter(tensors)),
        ):
            saver.Saver(engine, root).save(step, state)

    def build(self, base: Path) -> None:
        for step in (1, 2, 3):
            self.save(base, step, "old")
        (base / "step_00000002" / "hf").mkdir()
        (base / "step_00000002" / "hf" / "model.safetensors").write_bytes(self.stranger)
        (base / "step_00000003" / "notes.txt").write_bytes(self.stranger)

    def act(self, folder: Path) -> None:
        from megagamma.checkpoint.retention import prune

        self.save(folder, 3, "new")
        prune(folder, 1, set())

    def recover(self, folder: Path) -> None:
        from megagamma.checkpoint.retention import clean_up

        clean_up(folder)

    def state(self, folder: Path) -> str:
        from megagamma.checkpoint.reader import CheckpointReader, read_manifest, steps_saved, verify
        from megagamma.errors import CheckpointError

        try:
            for step in steps_saved(folder):
                path = folder / f"step_{step:08d}"
                verify(path, read_manifest(path))
            if 2 not in steps_saved(folder) or 3 not in steps_saved(folder):
                return "missing"
            reader = CheckpointReader(folder / "step_00000003")
            value = float(reader.read("weight", reader.names()[0]).flatten()[0])
        except CheckpointError as error:
            return str(error)
        mark: str = reader.manifest["progress"]["mark"]
        return mark if value == {"old": 1.0, "new": 2.0}[mark] else f"weights {value} under the manifest of {mark}"

    def clean_names(self) -> list[str]:
        return ["step_00000002", "step_00000003"]


class Export(Case):
    """Another dtype over an export whose scores are kept in it."""

    strangers = 1

    def export(self, folder: Path, mark: str) -> None:
        from unittest import mock

        import torch

        from megagamma.huggingface import export as exporting
        from megagamma.huggingface.parity import Parity

        # The comparison itself writes nothing.
        held = Parity("whole model", 96, 1e-6, 1e-5, 1e-4, 16, True, "Qwen3ForCausalLM", "float32", "5", "2")
        options = exporting.ExportOptions(
            dtype=torch.float32 if mark == "old" else torch.bfloat16,
            tokenizer="none",
            overwrite=True,
            max_shard_bytes=500,
        )
        with mock.patch.object(exporting, "compare", return_value=held):
            exporting.export(
                folder / "run" / "checkpoints" / "step_00000000", folder / "hf", options, say=lambda _: None, quiet=True
            )

    def build(self, base: Path) -> None:
        import torch

        from megagamma.huggingface.importing import write_run
        from megagamma.model.parameters import logical_parameters

        config = config_of_a_tiny_model()
        write_run(
            base / "run", config, ((one, torch.ones(one.shape)) for one in logical_parameters(config.model)), quiet=True
        )
        self.export(base, "old")
        (base / "hf" / "eval").mkdir()
        (base / "hf" / "eval" / "scores.json").write_bytes(self.stranger)

    def act(self, folder: Path) -> None:
        self.export(folder, "new")

    def recover(self, folder: Path) -> None:
        from megagamma.folders import recover_at_start

        recover_at_start(folder / "hf")

    def state(self, folder: Path) -> str:
        from megagamma.errors import MegagammaError
        from megagamma.huggingface.importing import HuggingFaceWeights
        from megagamma.owned import strangers

        if not (folder / "hf").exists():
            return "missing"
        try:
            weights = HuggingFaceWeights(folder / "hf")
            dtypes = {str(weights.read(name).dtype) for name in weights.names()}
            left = strangers(folder / "hf", allowed=("eval",), strict=True)
            config = json.loads((folder / "hf" / "config.json").read_text())
        except (MegagammaError, OSError, ValueError) as error:
            return str(error)
        if left or len(dtypes) > 1 or config["dtype"] not in str(dtypes):
            return f"mixed: {dtypes} {left}"
        return "old" if "float32" in str(dtypes) else "new"

    def clean_names(self) -> list[str]:
        return ["hf", "run"]


class Prepare(Case):
    """Other settings over prepared text."""

    def prepare(self, folder: Path, mark: str) -> None:
        from megagamma.data.preparation.prepare import PrepareSettings, prepare
        from megagamma.data.preparation.source import Source

        text = folder / "text.txt"
        settings = PrepareSettings(
            str(folder / "data"), Source(inputs=(str(text),), document_separator="\n"), str(folder / "tokenizer.model"),
            validation_fraction=0.2, part_bytes=1000, progress=False,
        )  # fmt: skip
        prepare(settings if mark == "old" else replace(settings, split_salt="another", overwrite=True))

    def build(self, base: Path) -> None:
        from megagamma.data.preparation.source import Shard, Source
        from megagamma.data.preparation.train_tokenizer import train_tokenizer

        text = base / "text.txt"
        text.write_text("".join(f"document {k} says hello to number {k * 7}\n" for k in range(50)))
        source = Source(inputs=(str(text),), document_separator="\n")
        from megagamma.data.preparation.corpus import list_shards

        shards: list[Shard] = list_shards(source)
        train_tokenizer(shards, source, 290, base / "tokenizer.model", 1, 100_000)
        self.prepare(base, "old")

    def act(self, folder: Path) -> None:
        self.prepare(folder, "new")

    def recover(self, folder: Path) -> None:
        from megagamma.folders import recover_at_start

        recover_at_start(folder / "data", "output")

    def state(self, folder: Path) -> str:
        from megagamma.data.preparation.indexing import verify_prepared
        from megagamma.errors import DataError

        if not (folder / "data").exists():
            return "missing"
        try:
            manifest = verify_prepared(folder / "data", full=True)
        except DataError as error:
            return str(error)
        return {"validation": "old", "another": "new"}[manifest["settings"]["split_salt"]]

    def clean_names(self) -> list[str]:
        return ["data", "text.txt", "tokenizer.model"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("case", "stride"),
    [(Save(), 3), (Export(), 5), (Prepare(), 5)]
    + [pytest.param(case, 1, marks=pytest.mark.slow) for case in (Save(), Export(), Prepare())],
    ids=lambda value: type(value).__name__.lower() if isinstance(value, Case) else f"each {value}",
)
def test_stopped_between_every_two_file_operations(tmp_path: Path, case: Case, stride: int, way: str) -> None:
    outcome = outcome_of(case, tmp_path / "work", way, stride)
    assert not outcome.problems, "\n".join(outcome.problems)
    assert outcome.points > 20 and outcome.stopped == len(range(1, outcome.points + 1, stride))
    # The stops came before and after the new state had its name.
    assert outcome.states["old"] > 0 and outcome.states["new"] > 0
    if way == "exchange":
        assert outcome.set_aside == 0
    elif stride == 1:
        assert outcome.set_aside > 0, "the moment between the two renames was met"


@pytest.mark.parametrize("mistake", ["delete first", "delete all"])
def test_a_wrong_way_to_publish_is_noticed(tmp_path: Path, mistake: str) -> None:
    """Negative control: the old folder deleted before the rename, and all of it deleted after."""
    outcome = outcome_of(Save(), tmp_path / "work", mistake)
    text = "\n".join(outcome.problems)
    assert "a stranger is lost" in text
    if mistake == "delete first":
        assert "after the recovery: missing" in text or "step_00000003" in text
