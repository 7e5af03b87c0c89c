"""Exported models are the models: every variant, tied and untied, from one process and from TP2 x PP2."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.exports import TIED, VARIANTS, save_model
from support.processes import snapshot
from support.ranks import RankPool

from megagamma.checkpoint.reader import read_manifest, verify
from megagamma.errors import CheckpointError, ConfigurationError, MegagammaError
from megagamma.huggingface import export as exporting
from megagamma.huggingface import formats as huggingface
from megagamma.huggingface.export import ExportOptions, export, plan_shards, read_checkpoint
from megagamma.huggingface.formats import FORMATS, Exported
from megagamma.huggingface.native import ParityInputs, ParityOutputs, parity_outputs, run_in_subprocess
from megagamma.huggingface.parity import ParityError, exported_model
from megagamma.owned import LIST, strangers

Native = Callable[[ParityInputs], ParityOutputs]

# Variant, class asked for (None: the default), architecture.
CASES = [
    ("plain", None, "LlamaForCausalLM"),
    ("qk_norm", None, "Qwen3ForCausalLM"),
    ("elementwise", None, "Qwen3_5ForCausalLM"),
    ("elementwise", "qwen3_next", "Qwen3NextForCausalLM"),
    ("headwise", None, "Qwen3_5ForCausalLM"),
    ("headwise", "qwen3_next", "Qwen3NextForCausalLM"),
    ("headwise", "lfm3", "Lfm3ForCausalLM"),
    ("gate alone", None, "GatedLlamaForCausalLM"),
    ("head gate alone", None, "GatedLlamaForCausalLM"),
]


@pytest.fixture(scope="module")
def native(one_rank: RankPool) -> Native:
    """Our model in a process that lives for many answers."""
    return lambda inputs: one_rank.run(parity_outputs, inputs)[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, one_rank: RankPool, data_cache: str) -> Callable[[str, bool], Path]:
    """The checkpoint of a variant, tied or not, by one process; each made once."""
    made: dict[tuple[str, bool], Path] = {}

    def make(variant: str, tied: bool = False) -> Path:
        key = (variant, tied)
        if key not in made:
            folder = str(tmp_path_factory.mktemp("run") / "one")
            given = ["--data.cache", data_cache, *VARIANTS[variant], *(TIED if tied else [])]
            made[key] = Path(one_rank.run(save_model, given, folder)[0])
        return made[key]

    return make


Saved = Callable[..., Path]


def check_parity(
    checkpoint: Path, output: Path, native: Native, variant: str, hf_class: str | None, architecture: str, tied: bool
) -> None:
    """Export, and check what is said of it and what is in the folder."""
    lines: list[str] = []
    options = ExportOptions(hf_class=hf_class, custom_code="alone" in variant, parity="full")
    folder = export(checkpoint, output, options, native=native, say=lines.append, quiet=True)
    found = json.loads((folder / "parity.json").read_text())
    assert found["holds"] and found["architecture"] == architecture
    assert found["largest_difference"] < 1e-5
    assert found["greedy_equal"] and found["greedy_tokens"] == 16
    assert found["tokens"] == 2 * 48
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == 520, "the true one"
    assert config["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied
    assert any("must trust it" in line for line in lines) is ("alone" in variant)
    assert (folder / "modeling_gated_llama.py").exists() is ("alone" in variant)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(("variant", "hf_class", "architecture"), CASES)
def test_parity(
    tmp_path: Path, native: Native, saved: Saved, variant: str, hf_class: str | None, architecture: str, tied: bool
) -> None:
    check_parity(saved(variant, tied), tmp_path / "hf", native, variant, hf_class, architecture, tied)


# The checkpoint does not depend on the layout that wrote it (tests/checkpoint); here is the way from end to end.
MODELS = [(*case, tied) for case in CASES for tied in (False, True)]
REPRESENTATIVE = ("elementwise", None, "Qwen3_5ForCausalLM", True)


@pytest.mark.parametrize(
    ("variant", "hf_class", "architecture", "tied"),
    [pytest.param(*model, marks=[] if model == REPRESENTATIVE else pytest.mark.slow) for model in MODELS],
)
def test_parity_of_what_four_ranks_saved(
    tmp_path: Path, native: Native, four_ranks: RankPool, data_cache: str,
    variant: str, hf_class: str | None, architecture: str, tied: bool,
) -> None:  # fmt: skip
    given = ["--data.cache", data_cache, *VARIANTS[variant], *(TIED if tied else [])]
    layout = ["--parallel.tensor", "2", "--parallel.pipeline", "2"]
    checkpoint = Path(four_ranks.run(save_model, [*given, *layout], str(tmp_path / "run"))[0])
    check_parity(checkpoint, tmp_path / "hf", native, variant, hf_class, architecture, tied)


# -- mistakes that parity must see --------------------------------------------------------------------------------------


def _expect_refusal(checkpoint: Path, output: Path, native: Native, hf_class: str | None = None) -> ParityError:
    with pytest.raises(ParityError) as caught:
        export(checkpoint, output, ExportOptions(hf_class=hf_class), native=native, quiet=True, say=lambda _: None)
    assert not output.exists() and not list(output.parent.glob(".hf*")), "nothing is published, nothing left"
    return caught.value


def test_gate_order_is_seen(tmp_path: Path, native: Native, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    right = exporting.export_tensor

    def blocks(tensor: Exported, model: object, target: object, read: object) -> torch.Tensor:
        values = right(tensor, model, target, read)  # type: ignore[arg-type]
        if tensor.logical.role != "query":
            return values
        pair = values.view(4, 2, 24, -1)
        return torch.cat((pair[:, 0].reshape(96, -1), pair[:, 1].reshape(96, -1)))

    monkeypatch.setattr(exporting, "export_tensor", blocks)
    assert "nothing was published" in str(_expect_refusal(saved("elementwise"), tmp_path / "hf", native))


def test_norm_offset_is_seen(tmp_path: Path, native: Native, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = dataclasses.replace(FORMATS["qwen3_5"], norm_offset=0.0)
    monkeypatch.setitem(huggingface.FORMATS, "qwen3_5", wrong)
    _expect_refusal(saved("elementwise"), tmp_path / "hf", native)


@pytest.mark.parametrize(
    ("variant", "hf_class"), [("plain", None), ("qk_norm", None), ("elementwise", None), ("headwise", "lfm3")]
)
def test_epsilon_is_seen(
    tmp_path: Path, native: Native, saved: Saved, monkeypatch: pytest.MonkeyPatch, variant: str, hf_class: str | None
) -> None:
    right = exporting.export_config
    wrong = {"rms_norm_eps": 1e-5, "norm_eps": 1e-5}
    monkeypatch.setattr(exporting, "export_config", lambda *given: right(*given) | wrong)
    _expect_refusal(saved(variant), tmp_path / "hf", native, hf_class)


def test_padded_rows_are_seen(tmp_path: Path, native: Native, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, config = exporting.exported_tensors, exporting.export_config

    def padded(model: object, target: object) -> list[Exported]:
        found = tensors(model, target)  # type: ignore[arg-type]
        return [dataclasses.replace(one, shape=(640, *one.shape[1:])) if one.shape[0] == 520 else one for one in found]

    monkeypatch.setattr(exporting, "exported_tensors", padded)
    monkeypatch.setattr(exporting, "export_config", lambda *given: config(*given) | {"vocab_size": 640})
    monkeypatch.setattr(exporting, "export_tensor", lambda tensor, model, target, read: read(tensor.logical.name, None))
    assert "640" in str(_expect_refusal(saved("plain"), tmp_path / "hf", native))


def test_numbers_that_are_none_are_seen(tmp_path: Path, saved: Saved) -> None:
    def broken(inputs: ParityInputs) -> ParityOutputs:
        return ParityOutputs(torch.full((2, 48, 520), float("nan")), [0] * 16)

    _expect_refusal(saved("plain"), tmp_path / "hf", broken)


# -- forms of the folder --------------------------------------------------------------------------------------------------


def test_bf16_is_the_rounded_model(tmp_path: Path, native: Native, saved: Saved) -> None:
    """Parity in fp32 of the rounded weights; against the weights as they were, it would not hold."""
    options = ExportOptions(dtype=torch.bfloat16)
    checkpoint = saved("elementwise")
    folder = export(checkpoint, tmp_path / "hf", options, native=native, quiet=True)
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    exact = export(checkpoint, tmp_path / "exact", ExportOptions(), native=native, quiet=True)
    for name, tensor in load_file(exact / "model.safetensors").items():
        assert torch.equal(weights[name], tensor.bfloat16())
    with pytest.raises(ParityError):
        export(
            checkpoint, tmp_path / "other", options, quiet=True, say=lambda _: None,
            native=lambda inputs: native(dataclasses.replace(inputs, dtype=torch.float32)),
        )  # fmt: skip


def test_shards_hold_the_same_tensors(tmp_path: Path, native: Native, saved: Saved) -> None:
    checkpoint = saved("headwise")
    one = export(checkpoint, tmp_path / "one", ExportOptions(), native=native, quiet=True)
    many = export(checkpoint, tmp_path / "many", ExportOptions(max_shard_bytes=200_000), native=native, quiet=True)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in many.glob("*.safetensors"))
    assert len(files) > 3 and files == sorted(set(index["weight_map"].values()))
    whole = load_file(one / "model.safetensors")
    spread = {name: tensor for file in files for name, tensor in load_file(many / file).items()}
    assert spread.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(spread[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(4 * tensor.numel() for tensor in whole.values())


def test_shards_are_cut_by_size() -> None:
    logical = None
    tensors = [Exported(str(size), (size,), logical) for size in (3, 3, 9, 1, 2, 2)]  # type: ignore[arg-type]
    found = [[one.shape[0] for one in shard] for shard in plan_shards(tensors, 24, 4)]
    assert found == [[3, 3], [9], [1, 2, 2]]


@pytest.mark.parametrize("variant", ["plain", "elementwise", "headwise"])
def test_parity_of_single_layers(
    tmp_path: Path, native: Native, saved: Saved, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    """For models that do not fit: layers 0, 2 and 3 of 4, and a mistake in one of them is seen."""
    hf_class = "lfm3" if variant == "headwise" else None
    options = ExportOptions(parity="layers", hf_class=hf_class, max_shard_bytes=200_000)
    folder = export(saved(variant), tmp_path / "hf", options, native=native, quiet=True)
    found = json.loads((folder / "parity.json").read_text())
    assert found["holds"] and found["compared"] == "layers 0, 2, 3, each alone"
    assert found["largest_difference"] < 1e-5
    right = exporting.export_tensor

    def wrong(tensor: Exported, *given: object) -> torch.Tensor:
        values = right(tensor, *given)  # type: ignore[arg-type]
        return values * 1.01 if tensor.logical.name == "model.layers.2.self_attn.v_proj.weight" else values

    monkeypatch.setattr(exporting, "export_tensor", wrong)
    with pytest.raises(ParityError):
        export(saved(variant), tmp_path / "wrong", options, native=native, quiet=True, say=lambda _: None)


def test_a_model_that_does_not_fit_is_compared_by_layers(
    tmp_path: Path, native: Native, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "needed_bytes", lambda parameters: 1 << 60)
    said: list[str] = []
    folder = export(saved("plain"), tmp_path / "hf", ExportOptions(), native=native, say=said.append, quiet=True)
    assert "comparing layers 0, 2, 3, each alone" in said[0]
    assert "layers" in json.loads((folder / "parity.json").read_text())["compared"]


def test_the_answer_of_a_process_apart_is_the_same(saved: Saved, native: Native) -> None:
    tokens = torch.arange(40).view(2, 20)
    inputs = ParityInputs(saved("elementwise"), tokens, tokens[0, :5], 3)
    here, apart = native(inputs), run_in_subprocess(inputs)
    assert here.greedy == apart.greedy
    assert torch.allclose(here.logits, apart.logits, atol=1e-6)


def test_card_and_configs(tmp_path: Path, native: Native, saved: Saved) -> None:
    folder = export(saved("elementwise"), tmp_path / "hf", ExportOptions(), native=native, quiet=True)
    card = (folder / "README.md").read_text()
    assert "gamma 0.5" in card and "step 7" in card and "RMSNorm epsilon 1e-12" in card
    config = json.loads((folder / "config.json").read_text())
    assert config["megagamma"]["gamma"] == 0.5
    assert config["megagamma"]["tokens"] == 56 * 48
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["partial_rotary_factor"] == 1.0 and config["layer_types"] == ["full_attention"] * 4
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == config["eos_token_id"] == 2
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token_id == 2 and tokenizer.bos_token_id is None


# -- what is refused ------------------------------------------------------------------------------------------------------


def test_a_gate_without_qk_norm_is_refused_unless_asked(tmp_path: Path, native: Native, saved: Saved) -> None:
    with pytest.raises(ConfigurationError, match="--custom_code"):
        export(saved("gate alone"), tmp_path / "hf", ExportOptions(), native=native)
    with pytest.raises(
        ConfigurationError, match=r"cannot hold model.attention_gate=none, model.qk_norm=true: use qwen3"
    ):
        export(saved("qk_norm"), tmp_path / "hf", ExportOptions(hf_class="llama"), native=native)


def test_what_is_there_is_kept(tmp_path: Path, native: Native, saved: Saved) -> None:
    output = tmp_path / "hf"
    output.mkdir()  # an empty one is taken
    export(saved("plain"), output, ExportOptions(), native=native, quiet=True)
    before = (output / "model.safetensors").stat().st_mtime_ns
    said: list[str] = []
    export(saved("plain"), output, ExportOptions(overwrite=True), native=native, say=said.append, quiet=True)
    assert said == [f"{output}: is this model already"]
    assert (output / "model.safetensors").stat().st_mtime_ns == before
    for options in (ExportOptions(dtype=torch.bfloat16), ExportOptions(tokenizer="none")):
        with pytest.raises(ConfigurationError, match="holds another export: use --overwrite"):
            export(saved("plain"), output, options, native=native)
    with pytest.raises(ConfigurationError, match="use --overwrite"):
        export(saved("plain", tied=True), output, ExportOptions(), native=native)
    # A failed replacement leaves what was there.
    with pytest.raises(ParityError):
        export(
            saved("plain", tied=True), output, ExportOptions(overwrite=True), quiet=True, say=lambda _: None,
            native=lambda inputs: ParityOutputs(torch.zeros(2, 48, 520), [0] * 16),
        )  # fmt: skip
    assert (output / "model.safetensors").stat().st_mtime_ns == before
    export(saved("plain", tied=True), output, ExportOptions(overwrite=True), native=native, quiet=True)
    assert "lm_head.weight" not in load_file(output / "model.safetensors")


@pytest.mark.parametrize("harm", ["weights gone", "weights cut", "proof lenient", "proof of layers"])
def test_what_is_not_proven_is_made_again(tmp_path: Path, native: Native, saved: Saved, harm: str) -> None:
    output, weights = tmp_path / "hf", tmp_path / "hf" / "model.safetensors"
    given = {
        "proof lenient": ExportOptions(tolerance=5.0), "proof of layers": ExportOptions(parity="layers"),
    }.get(harm, ExportOptions())  # fmt: skip
    export(saved("plain"), output, given, native=native, quiet=True, say=lambda _: None)
    if harm == "weights gone":
        weights.unlink()
    if harm == "weights cut":
        weights.write_bytes(weights.read_bytes()[:-10])
    said: list[str] = []
    export(saved("plain"), output, ExportOptions(parity="full"), native=native, say=said.append, quiet=True)
    assert said[-1].startswith("parity (whole model)")
    found = json.loads((output / "parity.json").read_text())
    assert found["tolerance"] == 1e-4 and found["compared"] == "whole model"
    assert load_file(weights)


@pytest.mark.parametrize("overwrite", [False, True], ids=["stricter proof", "overwrite"])
def test_what_the_user_keeps_in_an_export_stays(tmp_path: Path, native: Native, saved: Saved, overwrite: bool) -> None:
    """Notes and an edited card are named; scores that our own scoring wrote move to the new folder."""
    output = tmp_path / "hf"
    export(saved("plain"), output, ExportOptions(parity="layers"), native=native, quiet=True, say=lambda _: None)
    checkpoint = saved("plain", tied=True) if overwrite else saved("plain")
    options = ExportOptions(parity="full", overwrite=overwrite)
    (output / "eval").mkdir()
    (output / "eval" / "scores.json").write_text("{}")
    card = (output / "README.md").read_text()
    (output / "README.md").write_text(card + "Mine.\n")
    (output / "notes.txt").write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(
        ConfigurationError, match=r"holds README\.md \(changed\), notes\.txt, not as this tool wrote it"
    ):
        export(checkpoint, output, options, native=native, quiet=True, say=lambda _: None)
    assert snapshot(tmp_path) == before
    (output / "README.md").write_text(card)
    (output / "notes.txt").unlink()
    export(checkpoint, output, options, native=native, quiet=True, say=lambda _: None)
    assert ("lm_head.weight" in load_file(output / "model.safetensors")) is not overwrite
    assert json.loads((output / "parity.json").read_text())["compared"] == "whole model"
    assert (output / "eval" / "scores.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_export_of_before_is_known_by_its_names(tmp_path: Path, native: Native, saved: Saved) -> None:
    output = tmp_path / "hf"
    export(saved("plain"), output, ExportOptions(), native=native, quiet=True, say=lambda _: None)
    (output / LIST).unlink()
    assert not strangers(output)
    (output / "notes.txt").touch()
    assert [str(found) for found in strangers(output)] == ["notes.txt"]


def test_a_place_that_belongs_to_something_else_is_refused(tmp_path: Path, native: Native, saved: Saved) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(saved("plain").parent.parent, run)
    checkpoint = run / "checkpoints" / "step_00000007"
    alone = tmp_path / "step_00000007"
    shutil.copytree(checkpoint, alone)
    before = snapshot(tmp_path)
    for output, owner in [
        (run / "checkpoints" / "step_00000099", "lies in the checkpoints of a run"),
        (checkpoint / "hf", "lies in the checkpoint"),
        (alone, "is the checkpoint"),
        (tmp_path / "link", "lies in the checkpoints of a run"),
    ]:
        if output.name == "link":
            output.symlink_to(run / "checkpoints" / "step_00000099")
        with pytest.raises(ConfigurationError, match=f"--out .*: {owner}.*choose another folder"):
            export(checkpoint, output, ExportOptions(overwrite=True), native=native)
    assert snapshot(tmp_path) == before
    # Negative controls: where exports of a run go, and those of a checkpoint outside one.
    options = ExportOptions(tokenizer="none")
    export(checkpoint, run / "hf" / "step_00000007", options, native=native, quiet=True, say=lambda _: None)
    export(alone, alone / "hf" / "step_00000007", options, native=native, quiet=True, say=lambda _: None)


def test_nothing_but_an_export_is_replaced(tmp_path: Path, native: Native, saved: Saved) -> None:
    import shutil

    run = tmp_path / "run"
    shutil.copytree(saved("plain").parent.parent, run)
    checkpoint = run / "checkpoints" / "step_00000007"
    for place in (run, run / "checkpoints", checkpoint):
        with pytest.raises(ConfigurationError, match="holds the checkpoint"):
            export(checkpoint, place, ExportOptions(overwrite=True), native=native)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("mine")
    with pytest.raises(ConfigurationError, match="is no exported model"):
        export(checkpoint, tmp_path / "thesis", ExportOptions(overwrite=True), native=native)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "mine"
    verify(checkpoint, read_manifest(checkpoint))


def test_two_conversions_to_one_folder(tmp_path: Path, native: Native, saved: Saved) -> None:
    """The second is told; the first goes on to its end."""
    refused: list[str] = []

    def meanwhile(inputs: ParityInputs) -> ParityOutputs:
        with pytest.raises(ConfigurationError) as caught:
            export(saved("plain"), tmp_path / "hf", ExportOptions(), native=native)
        refused.append(str(caught.value))
        return native(inputs)

    folder = export(saved("plain"), tmp_path / "hf", ExportOptions(), native=meanwhile, quiet=True)
    assert "another process writes it now" in refused[0]
    assert [path.name for path in tmp_path.iterdir()] == ["hf"] and load_file(folder / "model.safetensors")


def test_a_rename_that_fails_leaves_what_was_there(
    tmp_path: Path, native: Native, saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "hf"
    export(saved("plain"), output, ExportOptions(), native=native, quiet=True)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(MegagammaError, match="No space left"):
        export(saved("plain", tied=True), output, ExportOptions(overwrite=True), native=native, quiet=True)
    assert "lm_head.weight" in load_file(output / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_damaged_and_unfinished_checkpoints(tmp_path: Path, native: Native, saved: Saved) -> None:
    import shutil

    copy = tmp_path / "checkpoints" / "step_00000007"
    shutil.copytree(saved("plain"), copy)
    content = bytearray((copy / "weight-00000.safetensors").read_bytes())
    content[-100] ^= 1
    (copy / "weight-00000.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weight-00000.safetensors: its content is not what was written"):
        export(copy, tmp_path / "hf", ExportOptions(), native=native)
    (copy / "checkpoint.json").unlink()
    with pytest.raises(CheckpointError, match="not a finished one"):
        export(copy, tmp_path / "hf", ExportOptions(), native=native)
    assert not (tmp_path / "hf").exists()


def test_another_tokenizer_is_refused(tmp_path: Path, native: Native, saved: Saved) -> None:
    import shutil

    from megagamma.huggingface.export import find_tokenizer

    checkpoint = saved("plain")
    reader, config = read_checkpoint(checkpoint)
    fingerprint = reader.manifest["tokenizer"]
    assert find_tokenizer(checkpoint, config, fingerprint, None) is not None
    assert find_tokenizer(checkpoint, config, fingerprint, "none") is None
    alone = tmp_path / "step_00000007"
    shutil.copytree(checkpoint, alone)
    config.data.cache = str(tmp_path / "nowhere")
    with pytest.raises(ConfigurationError, match="--tokenizer none to export without one"):
        find_tokenizer(alone, config, fingerprint, None)
    with pytest.raises(ConfigurationError, match="is not that of the checkpoint"):
        find_tokenizer(alone, config, "0" * 64, str(checkpoint.parent.parent / "tokenizer.model"))
    folder = export(checkpoint, tmp_path / "hf", ExportOptions(tokenizer="none"), native=native, quiet=True)
    assert not (folder / "tokenizer.json").exists()
    assert exported_model(folder) is not None
