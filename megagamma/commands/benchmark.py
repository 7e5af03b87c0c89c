"""Measure speed as ratios: ours and a reference, taken in turns in one process on one machine.

    megagamma benchmark [init] [train] [checkpoint] [convert] [--json FILE]

train: steps of `configs/model/17m.yaml` (no gate, no q/k-norm) against Hugging Face's LlamaForCausalLM of the same
shape under torch's AdamW, same batches, same threads. init: the counter-based streams against `torch.normal_`.
checkpoint: saving and loading against plain files. convert: writing Hugging Face weights against copying the checkpoint's
(`convert --config configs/model/1b.yaml` for another size). It needs the source tree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

from megagamma.cli import source_tree


def in_turns(first: Callable[[], object], second: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median seconds of two functions called alternately, after one unmeasured call of each."""
    times: tuple[list[float], list[float]] = ([], [])
    for round_number in range(repeats + 1):
        for function, found in zip((first, second), times, strict=True):
            begin = time.perf_counter()
            function()
            if round_number:
                found.append(time.perf_counter() - begin)
    return statistics.median(times[0]), statistics.median(times[1])


def preset(name: str) -> str:
    """Path of a model's config."""
    return str(source_tree() / "configs" / "model" / f"{name}.yaml")


def build(arguments: list[str]) -> tuple[Any, Any]:
    """(config, engine) of a filled model on this process's CPU, without data."""
    from megagamma.config.io import parse_config
    from megagamma.distributed.runtime import Runtime
    from megagamma.training.assembly import fresh_engine

    common = ["--data.corpus", "tiny", "--model.vocab_size", "4096", "--run.device", "cpu"]
    batch = ["--data.global_batch_size", "4", "--data.micro_batch_size", "4"]
    config = parse_config([*common, *batch, *arguments])
    engine = fresh_engine(config, Runtime(config))
    engine.set_learning_rate(1e-4)
    return config, engine


def random_batch(config: Any) -> Any:
    """One microbatch of random tokens."""
    import torch

    from megagamma.data.contracts import Batch

    batch, length = config.data.global_batch_size, config.data.sequence_length
    tokens = torch.randint(0, config.model.vocab_size, (batch, length + 1))
    positions = torch.arange(length).repeat(batch, 1)
    return Batch(tokens[:, :-1], tokens[:, 1:].contiguous(), torch.ones(batch, length), positions)


def benchmark_train(steps: int, arguments: list[str]) -> dict[str, Any]:
    """Tokens per second of a training step, ours and Hugging Face's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from megagamma.model.parameters import logical_parameters
    from megagamma.planning.flops import flops_per_token, measure_matmul_peak

    shape = ["--config", preset("17m"), "--model.attention_gate", "none", "--model.qk_norm", "false"]
    config, engine = build([*shape, *arguments])
    model = config.model
    torch.manual_seed(0)
    reference = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            intermediate_size=model.ffn_hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_attention_heads,
            num_key_value_heads=model.num_query_groups,
            head_dim=model.head_dim,
            max_position_embeddings=config.data.sequence_length,
            rms_norm_eps=model.norm_epsilon,
            tie_word_embeddings=model.tie_embeddings,
            use_cache=False,
        )
    )
    adam = torch.optim.AdamW(reference.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ours_batch = random_batch(config)
    batch, length = ours_batch.tokens.shape

    def ours() -> None:
        engine.forward_backward([ours_batch])
        engine.step()

    def theirs() -> None:
        # The labels are given shifted, so that both models predict the same positions.
        inputs, labels = ours_batch.tokens, ours_batch.labels
        out = reference(input_ids=inputs, shift_labels=labels, labels=inputs)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        adam.step()
        adam.zero_grad()

    ours_seconds, theirs_seconds = in_turns(ours, theirs, steps)
    peak = measure_matmul_peak(engine.dtype)
    flops = flops_per_token(model, length) * batch * length
    result = {
        "parameters": sum(logical.numel for logical in logical_parameters(model)),
        "ours_tokens_per_second": batch * length / ours_seconds,
        "llama_tokens_per_second": batch * length / theirs_seconds,
        "ratio": theirs_seconds / ours_seconds,
        "ours_share_of_matmul_peak": flops / ours_seconds / peak,
    }
    engine.close()
    return result


def benchmark_init(repeats: int) -> dict[str, Any]:
    """Normal numbers per second on one thread, ours and torch's."""
    import torch

    from megagamma.initialization.streams import normal_

    torch.set_num_threads(1)
    out = torch.empty(4096, 4096)
    ours, theirs = in_turns(
        lambda: normal_(out, seed=1, name="benchmark", global_shape=tuple(out.shape)), lambda: out.normal_(), repeats
    )
    return {
        "ours_million_per_second": out.numel() / ours / 1e6,
        "torch_million_per_second": out.numel() / theirs / 1e6,
        "ratio": theirs / ours,
    }


def benchmark_checkpoint(repeats: int, arguments: list[str]) -> dict[str, Any]:
    """Rates of saving and loading against plain files of the same bytes; the stall of an asynchronous save."""
    import os
    import tempfile
    from pathlib import Path

    import torch

    from megagamma.checkpoint.saver import Saver, load
    from megagamma.config.io import as_dict
    from megagamma.distributed.replicas import fingerprint

    config, engine = build(["--config", preset("30m"), *arguments])
    batch = random_batch(config)
    state = {"config": as_dict(config), "consumed_samples": 0, "seconds": 0.0, "tokenizer": "", "progress": {}}
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        saver = Saver(engine, folder / "checkpoints")
        path = saver.save(1, state)
        assert path is not None
        size = sum(file.stat().st_size for file in path.iterdir())
        block = os.urandom(1 << 24)

        def write() -> None:
            with open(folder / "plain", "wb") as file:
                for _ in range(size // len(block)):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())

        def read() -> None:
            with open(folder / "plain", "rb") as file:
                while file.read(1 << 24):
                    pass

        def forget() -> None:
            """Drop the file cache of both, so that they are read from the disk."""
            for file in (*path.iterdir(), folder / "plain"):
                with open(file, "rb") as opened:
                    os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

        save_seconds, write_seconds = in_turns(lambda: saver.save(1, state), write, repeats)

        def load_from_disk() -> None:
            forget()
            load(engine, path)

        def read_from_disk() -> None:
            forget()
            read()

        load_seconds, read_seconds = in_turns(load_from_disk, read_from_disk, repeats)
        stalls = []
        for _ in range(repeats):
            begin = time.perf_counter()
            saver.save(1, state, asynchronous=True)
            stalls.append(time.perf_counter() - begin)
            saver.finish()

    def step() -> None:
        engine.forward_backward([batch])
        engine.step()

    check_seconds, step_seconds = in_turns(
        lambda: [fingerprint(tensor.parameter.data) for tensor in engine.map], step, max(3, repeats // 2)
    )
    engine.close()
    torch.set_num_threads(1)
    return {
        "megabytes": size / 1e6,
        "save_rate_over_plain_write": write_seconds / save_seconds,
        "load_rate_over_plain_read": read_seconds / load_seconds,
        "asynchronous_stall_over_save": statistics.median(stalls) / save_seconds,
        "replica_check_over_step": check_seconds / step_seconds,
    }


def benchmark_convert(repeats: int, arguments: list[str]) -> dict[str, Any]:
    """Seconds to check a random model's checkpoint and write its Hugging Face weights, beside copying its file of weights.

    bf16 writes half of what is copied.
    """
    import os
    import tempfile
    from pathlib import Path

    import torch

    from megagamma.config.io import parse_config
    from megagamma.huggingface.export import ExportOptions, read_checkpoint, verify_weights, write_weights
    from megagamma.huggingface.formats import choose_format
    from megagamma.huggingface.importing import write_run
    from megagamma.initialization.streams import normal_
    from megagamma.model.parameters import LogicalParameter, logical_parameters
    from megagamma.planning.flops import parameter_counts

    common = ["--data.corpus", "tiny", "--model.vocab_size", "32000", "--config", preset("30m")]
    config = parse_config([*common, *arguments])

    def draw(logical: LogicalParameter) -> torch.Tensor:
        out = torch.ones(logical.shape)
        return (
            out
            if logical.role == "norm"
            else normal_(out, seed=1, name=logical.name, global_shape=logical.shape, std=0.02)
        )

    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name)
        drawn = ((one, draw(one)) for one in logical_parameters(config.model))
        checkpoint = write_run(folder / "run", config, drawn, quiet=True)
        reader, config = read_checkpoint(checkpoint)
        target = choose_format(config.model)
        weights = checkpoint / "weight-00000.safetensors"
        found: dict[str, Any] = {"parameters": parameter_counts(config.model).total}

        def copy() -> None:
            with open(weights, "rb") as source, open(folder / "copy", "wb") as file:
                while block := source.read(1 << 24):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())

        for dtype in (torch.float32, torch.bfloat16):
            options = ExportOptions(dtype=dtype)

            def write(options: ExportOptions = options) -> None:
                verify_weights(reader)
                write_weights(folder, reader, config, target, options, quiet=True)

            ours, plain = in_turns(write, copy, repeats)
            kind = str(dtype).removeprefix("torch.")
            size = sum(file.stat().st_size for file in folder.glob("model*.safetensors"))
            found[f"{kind}_seconds"] = ours
            found[f"{kind}_time_of_copying_over_ours"] = plain / ours
            found[f"{kind}_megabytes"] = size / 1e6
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the requested benchmarks and print one line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["init", "train", "checkpoint", "convert"]
    parser.add_argument("which", nargs="*", metavar="BENCHMARK", help=f"of {', '.join(names)}; default: all")
    parser.add_argument("--repeats", type=int, default=12, help="measured calls of each side (default 12)")
    parser.add_argument("--json", help="write the numbers to this file too")
    args, rest = parser.parse_known_args(arguments)
    results: dict[str, Any] = {}
    for which in args.which or names:
        if which not in names:
            parser.error(f"{which} is not a benchmark: use {', '.join(names)}")
        if which == "init":
            results[which] = benchmark_init(args.repeats)
        elif which == "train":
            results[which] = benchmark_train(args.repeats, rest)
        elif which == "convert":
            results[which] = benchmark_convert(max(3, args.repeats // 3), rest)
        else:
            results[which] = benchmark_checkpoint(max(3, args.repeats // 3), rest)
        print(which, json.dumps(results[which]), flush=True)
    if args.json:
        from megagamma.files import write_json

        write_json(args.json, results)
    return 0
