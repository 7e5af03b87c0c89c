"""Prepare text for pretraining, verify what was prepared, or look at a training batch.

    megagamma prepare_data --corpus sotu
    megagamma prepare_data --input 'text/**/*.jsonl.zst' --vocab_size 16384 --output data/mine --workers 8
    megagamma prepare_data --hf_dataset NAME --hf_split train --tokenizer data/mine/tokenizer.model --output data/hub
    megagamma prepare_data --verify data/mine
    megagamma prepare_data --inspect runs/demo/config.yaml --step 100 --rows 2

The output folder holds train and validation token files (Megatron's .bin and .idx), tokenizer.model and
manifest.json. A run that was killed continues when it is started again with the same options. Empty files are
left out and counted.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

from megagamma.data.preparation.corpus import EMBEDDED_CORPORA, FORMATS
from megagamma.data.preparation.indexing import verify_prepared
from megagamma.data.preparation.prepare import PrepareSettings, prepare
from megagamma.data.preparation.source import Source
from megagamma.errors import ConfigurationError


def build_parser() -> argparse.ArgumentParser:
    """Every option, with its unit and default."""
    defaults = PrepareSettings("", Source())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    group = parser.add_argument_group("source (give one)")
    group.add_argument(
        "--corpus",
        choices=EMBEDDED_CORPORA,
        help="an embedded corpus: 12 MB of speeches, or 0.15 MB of generated sentences for smoke tests",
    )
    group.add_argument(
        "--input",
        nargs="+",
        default=[],
        metavar="PATH",
        help="files, quoted globs and folders: .txt .jsonl .json .parquet, each plain or .gz .bz2 .xz .zst",
    )
    group.add_argument("--hf_dataset", metavar="NAME", help="a Hugging Face data set, or a local folder of one")

    group = parser.add_argument_group("how to read it")
    group.add_argument("--hf_config", metavar="NAME", help="configuration of the data set")
    group.add_argument("--hf_split", default="train", metavar="NAME", help="split of the data set (default: train)")
    group.add_argument("--streaming", action="store_true", help="stream the data set, without a local copy")
    group.add_argument(
        "--text_field",
        default="text",
        metavar="NAME",
        help="key or column that holds the text (default: text)",
    )
    group.add_argument("--format", choices=sorted(set(FORMATS.values())), help="format of files whose names do not say")
    group.add_argument(
        "--document_separator",
        metavar="TEXT",
        help=(
            r"cut text files into documents at this string (\n and \t are understood), or at "
            r"blank lines with 'blank-line' (default: one document per file)"
        ),
    )
    group.add_argument(
        "--drop_duplicates",
        action="store_true",
        help="keep only the first of documents with exactly the same text",
    )

    group.add_argument(
        "--max_document_megabytes",
        type=float,
        default=defaults.source.max_document_bytes / 2**20,
        metavar="MB",
        help="longest document, line or JSON file that is read, held in memory several times over (default: 1024)",
    )
    group.add_argument(
        "--max_ratio",
        type=float,
        default=defaults.source.max_ratio,
        metavar="N",
        help="most bytes of text behind a byte of a compressed file, beyond 1 GiB of text (default: 200)",
    )

    group = parser.add_argument_group("tokenizer (give one; an embedded corpus has a default)")
    group.add_argument("--tokenizer", metavar="FILE", help="an existing SentencePiece .model")
    group.add_argument(
        "--vocab_size",
        type=int,
        metavar="N",
        help="train one of N pieces (default: 4096 for sotu, 512 for tiny)",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=defaults.seed,
        help=f"seed of the sample it is trained on (default: {defaults.seed})",
    )
    group.add_argument(
        "--sample_characters",
        type=int,
        default=defaults.sample_characters,
        metavar="N",
        help=f"characters it is trained on at most (default: {defaults.sample_characters:,})",
    )

    group = parser.add_argument_group("output")
    group.add_argument("--output", metavar="DIR", help="folder to create (default: data/NAME for an embedded corpus)")
    group.add_argument(
        "--validation_fraction",
        type=float,
        default=defaults.validation_fraction,
        metavar="F",
        help=(f"share of documents held out, by the hash of their text (default: {defaults.validation_fraction})"),
    )
    group.add_argument(
        "--split_salt",
        default=defaults.split_salt,
        metavar="TEXT",
        help="another salt holds out other documents",
    )
    group.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes that encode (default: one per core); the result does not depend on it",
    )
    group.add_argument(
        "--part_megabytes",
        type=float,
        default=defaults.part_bytes / 2**20,
        metavar="MB",
        help=(
            "text per part, the unit of parallel work and of resuming (default: 4); the result does not depend on it"
        ),
    )
    group.add_argument("--overwrite", action="store_true", help="replace a prepared folder that differs or is corrupt")

    group = parser.add_argument_group("other tasks")
    group.add_argument("--verify", metavar="DIR", help="check a prepared folder, checksums included, and exit")
    group.add_argument("--inspect", metavar="CONFIG", help="print the decoded text of a batch of a training config")
    group.add_argument(
        "--step", type=int, default=1, metavar="N", help="with --inspect: which step's batch (default: 1)"
    )
    group.add_argument(
        "--rows", type=int, default=4, metavar="K", help="with --inspect: how many of its rows (default: 4)"
    )
    return parser


def settings_from(options: argparse.Namespace) -> PrepareSettings:
    """The parsed options as settings."""
    separator = options.document_separator
    if separator is not None:
        separator = separator.replace("\\n", "\n").replace("\\t", "\t")
    for name in ("max_document_megabytes", "max_ratio"):
        if not 0 < getattr(options, name) < 2**40:
            raise ConfigurationError(f"--{name} {getattr(options, name):g} must be above 0 and below 2^40")
    output = options.output or (os.path.join("data", options.corpus) if options.corpus else None)
    if output is None:
        raise ConfigurationError("output: not given: name the folder to create with --output DIR")
    source = Source(
        options.corpus, tuple(options.input), options.format, options.text_field, separator,
        options.hf_dataset, options.hf_config, options.hf_split, options.streaming,
        int(options.max_document_megabytes * 2**20), options.max_ratio,
    )  # fmt: skip
    return PrepareSettings(
        output, source, options.tokenizer, options.vocab_size, options.validation_fraction,
        options.split_salt, options.drop_duplicates, options.seed, options.sample_characters, options.workers,
        int(options.part_megabytes * 2**20), options.overwrite,
    )  # fmt: skip


def print_summary(folder: str, manifest: dict) -> None:
    """One line per split, and what was left out."""
    for split, counts in manifest["splits"].items():
        ratio = counts["bytes"] / counts["tokens"]
        print(
            f"{folder} {split}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, "
            f"{counts['bytes']:,} bytes of text ({ratio:.2f} bytes per token)"
        )
    print(
        f"{folder}: {manifest['tokenizer']['vocab_size']:,} pieces, {manifest['dtype']}, "
        f"{manifest['duplicates_dropped']:,} duplicates and "
        f"{manifest['empty_documents']:,} empty documents left out"
    )
    # Folders of older versions do not count them.
    if files := manifest.get("empty_files", 0):
        print(f"{folder}: {files:,} empty {'file' if files == 1 else 'files'} left out")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if options.verify:
            print_summary(options.verify, verify_prepared(options.verify, full=True))
            print(f"{options.verify}: every file matches its checksum")
        elif options.inspect:
            from megagamma.data.inspect import print_batch

            print_batch(options.inspect, options.step, options.rows)
        else:
            settings = settings_from(options)
            print_summary(settings.output, verify_prepared(prepare(settings)))
    except KeyboardInterrupt:
        print("finished parts are kept; the same command continues from them", file=sys.stderr)
        raise
    return 0
