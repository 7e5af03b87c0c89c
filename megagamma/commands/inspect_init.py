"""Look at a model before it is trained: initialization, parameters, FLOPs, memory. It needs no data.

    megagamma inspect_init --config configs/model/7b.yaml
    megagamma inspect_init --config configs/model/70b.yaml --parallel.tensor 8 --parallel.pipeline 4
        --world_size 256 --data.micro_batch_size 1 --data.global_batch_size 512
    megagamma inspect_init --config configs/model/1b.yaml --init.gamma 0.5 --compare --json init.json
    megagamma inspect_init --model FOLDER_OR_CONFIG_JSON [--init.gamma 1] [--role 'PATTERN=ROLE' ...]

Every option of a run works here. The measured stds are of a sample drawn from the very streams that a run fills
its weights from; z is their distance from the target std in standard errors (a few are normal, beyond
init.max_z a run refuses to start). --model looks at a Hugging Face model instead: the std of its weights by role as they are,
read from its safetensors files without loading it, beside what --init would draw (inspect_init --model X --help lists its
options); of a config.json the latter alone. With --parallel.memory_gib the exit code is 2 when the run does not fit.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonargparse

from megagamma.config.io import build_parser, parse_namespace, to_config
from megagamma.config.resolve import resolve, validate
from megagamma.config.schema import Config, InitConfig, padded_vocab_size
from megagamma.errors import ConfigurationError
from megagamma.reporting.tables import aligned_table

DEFAULT_VOCABULARY = 32000  # Llama 2's
GIB = 2**30


def parser() -> jsonargparse.ArgumentParser:
    """All options of a run, and this program's own options."""
    found = build_parser(None, __doc__ or "")
    found.add_argument("--world_size", type=int, default=1, help="Processes of the run. (default: 1)")
    found.add_argument("--tensor-level", action="store_true", help="One row per matrix in place of one per role.")
    found.add_argument("--compare", action="store_true", help="Also the target std of every other scheme.")
    found.add_argument("--json", type=str, default="", metavar="FILE", help="Write all of it to a file.")
    return found


def config_of(namespace: Any) -> Config:
    """The config to inspect, resolved and validated; what only a run needs is filled in."""
    config = to_config(namespace)
    if config.data.toy:
        from megagamma.toys.sources import toy_of  # brings in torch

        config.model.vocab_size = config.model.vocab_size or toy_of(config.data).vocab_size
    elif not config.data.paths and not config.data.corpus:
        config.data.corpus = "tiny"  # no data is read
    if config.model.vocab_size is None:
        config.model.vocab_size = DEFAULT_VOCABULARY
        print(
            f"notice: model.vocab_size is not given; {DEFAULT_VOCABULARY} is assumed here, a run takes "
            "its tokenizer's: set --model.vocab_size N",
            file=sys.stderr,
        )
    if namespace.world_size < 1:
        raise ConfigurationError(f"world_size={namespace.world_size} must be at least 1")
    validate(resolve(config), namespace.world_size)
    return config


def print_shape(config: Config) -> None:
    """The derived shape of the model."""
    model, init = config.model, config.init
    gate = "no gate" if model.attention_gate == "none" else f"{model.attention_gate} gate"
    head = "tied head" if model.tie_embeddings else "untied head"
    norm = "q/k-norm" if model.qk_norm else "no q/k-norm"
    print(
        f"model   {model.num_layers} layers, hidden {model.hidden_size}, SwiGLU {model.ffn_hidden_size}, "
        f"{model.num_attention_heads} heads of {model.head_dim} in {model.num_query_groups} groups, "
        f"sequences of {config.data.sequence_length}"
    )
    print(
        f"        vocabulary {model.vocab_size:,} (padded to {padded_vocab_size(model):,}), {head}, {gate}, "
        f"{norm}, norm epsilon {model.norm_epsilon:g}, RoPE base {model.rope_theta:g}"
    )
    print(
        f"init    scheme {init.scheme}, {init.distribution}, seed {config.run.seed}, "
        f"depth_scale {str(init.depth_scale).lower()}, residual_fan_in {init.residual_fan_in}"
    )


def print_matrices(rows: list[dict[str, Any]]) -> None:
    """Target and measured std, one line per role or matrix."""
    columns = ("matrices", "shape", "d_in", "gamma", "eff.", "target std", "measured", "z", "sampled")
    widths = (max(len(row["name"]) for row in rows) + 2, 14, 7, 7, 7, 12, 12, 7, 12)
    cells = [
        (
            row["name"],
            "x".join(map(str, row["shape"])),
            str(row["d_in"]),
            "-" if row["gamma"] is None else f"{row['gamma']:.3g}",
            f"{row['effective_gamma']:.3f}",
            f"{row['asked_std']:.4e}",
            f"{row['measured_std']:.4e}",
            f"{row['z']:.2f}",
            f"{row['sampled_elements']:,}",
        )
        for row in rows
    ]
    print("\n" + aligned_table(columns, widths, cells))
    print("eff.: exponent that the target std, depth factor included, amounts to; sampled: elements drawn")


def print_comparison(table: dict[str, dict[str, float]]) -> None:
    """Target std per role and scheme."""
    names = list(next(iter(table.values())))
    cells = [(role, *(f"{stds[name]:.3e}" for name in names)) for role, stds in table.items()]
    print("\n" + aligned_table(("target std", *names), (18, *[13] * len(names)), cells))


def print_cost(cost: dict[str, Any]) -> None:
    """Parameters, FLOPs, memory of the largest rank, and the budget of 20 tokens per parameter."""
    counts, where, rank = cost["parameters"], cost["layout"], cost["largest_rank"]
    print(
        f"\nparameters  {counts['total']:,} = {counts['embedding']:,} embedding and head + "
        f"{counts['non_embedding']:,} non-embedding"
    )
    print(f"compute     {cost['flops_per_token']:.4g} FLOPs per token (forward and backward, causal)")
    print(
        f"memory      {rank['device_bytes'] / GIB:.2f} GiB on the largest rank (stage {rank['pipeline_stage']}), "
        "at the fullest moment of a step:"
    )
    names = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "update", "overhead")
    print(f"            {'stage':<6}" + "".join(f"{name:>12}" for name in names) + f"{'needed':>9}{'on host':>9}")
    for stage in cost["stages"]:
        sizes = "".join(
            f"{stage['fullest'][name] / GIB:>12.2f}" if name in stage["fullest"] else f"{'-':>12}" for name in names
        )
        print(
            f"            {stage['pipeline_stage']:<6}{sizes}{stage['device_bytes'] / GIB:>9.2f}"
            f"{stage['offloaded_bytes'] / GIB:>9.2f}"
        )
    print(
        f"            ranks: {where['world_size']} = data {where['data']} x tensor {where['tensor']} x "
        f"pipeline {where['pipeline']}, ZeRO {where['zero_stage']}, {where['dtype']}; -: not there at that moment"
    )
    print(
        f"budget      20 tokens per parameter: {cost['budget_tokens']:.4g} tokens = {cost['budget_steps']:,} "
        f"steps of {cost['tokens_per_step']:,} tokens, {cost['budget_flops']:.3g} FLOPs"
    )


def inspect_model(words: list[str]) -> int:
    """Print how a Hugging Face model is drawn, and would be.

    Raises:
        MegagammaError: see `megagamma.huggingface.drawn.report_of`.
    """
    found = argparse.ArgumentParser(
        prog="megagamma inspect_init", description="How a Hugging Face model is drawn, from its files."
    )
    found.add_argument("--model", type=Path, required=True, help="a folder with safetensors files, or a config.json")
    for option in dataclasses.fields(InitConfig):
        if option.name in ("scheme", "gamma", "std", "residual_fan_in", "depth_scale"):
            kind: Callable[[str], Any] = _KINDS.get(option.name, str)
            found.add_argument(f"--init.{option.name}", dest=option.name, type=kind, default=option.default)
    found.add_argument(
        "--role", action="append", default=[], metavar="PATTERN=ROLE",
        help="role of the tensors whose names match, such as '*.wq.weight=query'; may be repeated",
    )  # fmt: skip
    found.add_argument("--tensor-level", action="store_true", help="one row per matrix in place of one per role")
    found.add_argument("--json", default="", metavar="FILE", help="write all of it to a file")
    given = vars(found.parse_args(words))
    path, pairs, by_matrix, output = (given.pop(name) for name in ("model", "role", "tensor_level", "json"))
    roles = {}
    for pair in pairs:
        pattern, separator, role = pair.rpartition("=")
        if not separator:
            raise ConfigurationError(f"--role {pair}: must be PATTERN=ROLE, such as '*.wq.weight=query'")
        roles[pattern] = role
    from megagamma.files import write_json
    from megagamma.huggingface.drawn import report_of

    report = report_of(path, roles, **given)
    print(report.table("matrix") if by_matrix else report)
    if output:
        write_json(output, report.as_dict())
        print(f"written to {output}")
    return 0


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} must be true or false")
    return text.lower() == "true"


_KINDS: dict[str, Callable[[str], Any]] = {"gamma": float, "std": float, "depth_scale": _truth}


def main(arguments: list[str] | None = None) -> int:
    """Parse, inspect, print."""
    words = sys.argv[1:] if arguments is None else arguments
    if any(word.split("=")[0] == "--model" for word in words):
        return inspect_model(words)
    namespace = parse_namespace(parser(), arguments)
    config = config_of(namespace)
    # torch is imported only now, so that --help and a mistyped option are answered at once.
    from megagamma.files import write_json
    from megagamma.initialization.report import NormSaturation, saturation_lines
    from megagamma.planning.memory import check_fits
    from megagamma.planning.preview import inspect

    result = inspect(config, namespace.world_size, namespace.tensor_level, namespace.compare)
    print_shape(config)
    print_matrices(result["matrices"])
    print()
    for line in saturation_lines([NormSaturation(**row) for row in result["norms"]], config.model.norm_epsilon):
        print(line)
    if namespace.compare:
        print_comparison(result["asked_std_by_scheme"])
    print_cost(result["cost"])
    if namespace.json:
        write_json(namespace.json, result)
        print(f"written to {namespace.json}")
    check_fits(config, namespace.world_size)
    return 0
