"""A page about runs: what it says and may not say, its figures in a real browser, and what it cannot show."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from support.exports import SHAPE
from support.ranks import RankPool
from support.train import run_trainer

from megagamma.commands.report import main
from megagamma.dynamics.token_losses import read as read_losses
from megagamma.errors import MegagammaError
from megagamma.evaluation.scores import KEYS, ScoreFile
from megagamma.report.outcomes import recorded
from megagamma.report.page import page
from megagamma.report.runs import arms, read
from megagamma.report.sentences import sentences

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, one_rank: RankPool, data_cache: str) -> list[Path]:
    """Two scales by two seeds."""
    root, found = tmp_path_factory.mktemp("runs"), []
    for gamma in ("0.5", "1"):
        for seed in ("1", "2"):
            found.append(root / f"g{gamma}-s{seed}")
            given = [
                "--init.gamma",
                gamma,
                "--run.seed",
                seed,
                "--run.folder",
                str(found[-1]),
                "--data.cache",
                data_cache,
            ]
            more = ["--run.steps", "8", "--validation.interval", "2", "--dynamics.log_spaced", "true"]
            more += ["--dynamics.instruments", '["weights", "spectrum", "motion", "embeddings", "activations"]']
            saved = ["--checkpoint.log_spaced", "true", "--checkpoint.save_initial", "true"]
            assert one_rank.run(run_trainer, [*SHAPE, *given, *more, *saved]) == [0]
    return found


def figures_of(text: str) -> list[dict[str, Any]]:
    match = re.search(r"<script type='application/json' id='figures'>(.*?)</script>", text, re.S)
    assert match is not None
    return json.loads(match[1])


def test_what_it_says(folders: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "report.html"
    assert main([*map(str, folders), "--output", str(output)]) == 0
    text = output.read_text()
    assert len(text) < 6e6 and "Gains on" not in text
    assert "http" not in re.sub(r"<script>.*?</script>", "", text, flags=re.S), "nothing is fetched"
    found, options = arms([read(folder) for folder in folders])
    assert options == ["init.gamma"] and [arm.label for arm in found] == ["gamma 0.5", "gamma 1"]
    first, second, third = sentences(found)
    assert first.startswith("4 runs in 2 arms, 2 seeds (1, 2)")
    ends = {run.name: run.last("val/tiny/loss") for arm in found for run in arm.runs}
    mean = sum(ends[f"g1-s{seed}"] - ends[f"g0.5-s{seed}"] for seed in (1, 2)) / 2
    assert f"{mean:+.4f} nats" in second and "95 % interval over 2 seeds" in second and "not a finding" not in third
    # One seed each: no interval, and said so.
    one_each, _ = arms([read(folders[0]), read(folders[2])])
    assert "(one seed: not a finding)" in sentences(one_each)[1] and "interval" not in sentences(one_each)[1]
    titles = re.findall(r"<h3>(.*?)</h3>", text)
    assert len(titles) == len(figures_of(text)) == text.count("class='reading'") - 1
    for title in (
        "Training loss",
        "Difference on tiny to gamma 0.5",
        "Stable rank",
        "Gradient norm",
        "Activations over training",
        "Singular values at the last measurement",
        "Do embeddings follow what comes next?",
    ):
        assert title in titles


def test_the_data_beside_a_figure_is_what_it_draws(folders: list[Path]) -> None:
    text = page([read(folder) for folder in folders], "x")
    files = [base64.b64decode(one).decode() for one in re.findall(r"data:text/csv;base64,([^']+)'", text)]
    shown = figures_of(text)
    assert len(files) == len(shown)
    rows = list(csv.DictReader(io.StringIO(files[0])))
    assert list(rows[0]) == ["arm", "run", "seed", "tokens", "loss"] and len(rows) == 4 * 8
    drawn = [y for trace in shown[0]["traces"] if trace["visible"] for y in trace["y"]]
    assert [float(row["loss"]) for row in rows] == drawn
    last = [json.loads(line)["loss"] for line in (folders[0] / "metrics.jsonl").read_text().splitlines()]
    assert drawn[:8] == pytest.approx(last, rel=1e-5)


def data_of(text: str, title: str) -> list[dict[str, str]]:
    """The rows of a figure's CSV."""
    match = re.search(rf"<h3>{title}</h3>.*?base64,([^']+)'", text, re.S)
    assert match is not None, title
    return list(csv.DictReader(io.StringIO(base64.b64decode(match[1]).decode())))


def test_spectra_are_over_their_mean_square(folders: list[Path]) -> None:
    runs = [read(folder) for folder in folders]
    rows = data_of(page(runs, "x"), "Singular values at the last measurement")
    for arm, of in (("gamma 0.5", runs[:2]), ("gamma 1", runs[2:])):
        drawn = [float(row["singular value"]) for row in rows if (row["role"], row["arm"]) == ("query", arm)]
        assert drawn == sorted(drawn, reverse=True)
        # The largest over the root mean square of all n is sqrt(n / stable rank).
        matrices = [one for run in of for one in run.dynamics[-1]["matrices"].values() if one["role"] == "query"]
        largest = [(min(one["shape"]) / one["stable_rank"]) ** 0.5 for one in matrices]
        assert drawn[0] == pytest.approx(sum(largest) / len(largest), rel=1e-4)
    assert any(row["arm"] == "a random matrix" for row in rows)


def test_gains_by_tokens_and_scores(folders: list[Path], tmp_path: Path) -> None:
    copies = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in folders]
    output = tmp_path / "report.html"
    assert main([*map(str, copies), "--output", str(output), "--tokens", "6"]) == 0
    rows = data_of(output.read_text(), "Gains on gamma 0.5 by kinds of tokens")
    (every,) = (row for row in rows if row["split"] == "all")
    assert every["arm"] == "gamma 1" and every["seeds"] == "2"
    losses = [read_losses(next((copy / "tokens").iterdir())).full.mean() for copy in copies]
    expected = [float(losses[0] - losses[2]), float(losses[1] - losses[3])]
    assert float(every["gain"]) == pytest.approx(sum(expected) / 2, abs=1e-5)
    low, high = float(every["low"]), float(every["high"])
    assert high - low == pytest.approx(12.706 * abs(expected[0] - expected[1]), rel=1e-3), "Student's t over two seeds"
    # One seed each: over sequences, and no finding. A file that cannot be read is a note.
    one_each = page([read(copies[0]), read(copies[2])], "x")
    assert "one seed: not a finding" in one_each
    next((copies[2] / "tokens").iterdir()).write_bytes(b"nothing")
    assert "its losses by token are left out" in page([read(copies[0]), read(copies[2])], "x")


def test_scores(folders: list[Path], tmp_path: Path) -> None:
    copies = [Path(shutil.copytree(folder, tmp_path / folder.name)) for folder in folders[:3]]
    for copy, value in zip(copies, (0.25, 0.35, 0.5), strict=True):
        metrics = [
            {"metric": "acc", "filter": "none", "value": value, "stderr": 0.1, "smooth": False},
            {"metric": "choice_prob_norm", "filter": "none", "value": value / 2, "stderr": 0.01, "smooth": True},
        ]
        header = dict.fromkeys(KEYS, 0) | {"task": "arc_easy", "kind": "task"}
        ScoreFile(copy / "eval" / "step_00000008").add({**header, "metrics": metrics})
    rows = data_of(page([read(copy) for copy in copies], "x"), "Scores of benchmarks")
    assert [(row["metric"], row["arm"], row["seeds"]) for row in rows] == [
        (metric, arm, seeds)
        for metric in ("acc", "choice_prob_norm")
        for arm, seeds in (("gamma 0.5", "2"), ("gamma 1", "1"))
    ]
    first, second = rows[0], rows[1]
    assert float(first["mean"]) == pytest.approx(0.3) and float(first["high"]) == pytest.approx(0.3 + 12.706 * 0.05)
    assert float(second["low"]) == pytest.approx(0.5 - 1.96 * 0.1), "of one seed over questions"


def test_recorded_curves_are_told_apart(folders: list[Path], tmp_path: Path) -> None:
    """Curves of other runs stand under a heading of their own, with their mean and interval over seeds."""
    table = tmp_path / "table.csv"
    losses = {("a", 1): 4.0, ("a", 2): 4.2, ("b", 1): 3.9, ("b", 2): 3.9}
    lines = [f"{arm},{seed},{tokens},{loss + 1 / tokens}" for tokens in (1, 2) for (arm, seed), loss in losses.items()]
    table.write_text("\n".join(["arm,seed,tokens,loss", *lines]))
    figure = recorded(table, "Longer runs", "made by a command")
    (_, first), (_, last) = ((row[:3], row[3:]) for row in figure.rows if row[0] == "a")
    assert last[0] == pytest.approx(4.6) and first[0] == pytest.approx(5.1)
    # Two seeds that are 0.2 apart: 12.706 x 0.1414 / sqrt(2).
    assert last[2] - last[0] == pytest.approx(12.706 * 0.1, rel=1e-3)
    text = page([read(folders[0])], "One", [figure])
    assert "<h2>Recorded earlier, by other runs</h2><h3>Longer runs</h3>" in text.replace("\n", "")
    assert "a (2 seeds)" in text and "Recorded earlier" not in page([read(folders[0])], "One")
    table.write_text("arm,seed,tokens,loss\na,1,5,4.0\n")
    assert [trace["name"] for trace in recorded(table, "x", "y").traces] == ["a (1 seeds)"], "no band of one seed"


def test_names_are_text(folders: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "<b>&"
    shutil.copytree(folders[0], copy)
    text = page([read(copy)], "</script><img src=x onerror=alert(1)>")
    body = re.sub(r"<script>.*?</script>", "", text, flags=re.S)
    assert "<img" not in body and "<b>&" not in body and "<b>&" in unescape(body)


def test_what_cannot_be_shown(folders: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MegagammaError, match="is given twice"):
        main([str(folders[0]), str(folders[0]), "--output", str(tmp_path / "x.html")])
    with pytest.raises(MegagammaError):
        main([str(tmp_path / "nothing")])
    # Still running, without checkpoints and measurements: the rest is shown.
    copy = tmp_path / "partial"
    shutil.copytree(folders[0], copy)
    for name in ("checkpoints", "hf"):
        shutil.rmtree(copy / name, ignore_errors=True)
    (copy / "dynamics.jsonl").unlink()
    (copy / "events.jsonl").write_text("")
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    broken = json.dumps({**json.loads(lines[3]), "loss": None})
    (copy / "metrics.jsonl").write_text("\n".join([*lines[:3], broken]) + "\n")
    assert main([str(copy)]) == 0
    out, text = capsys.readouterr().out, (copy / "report.html").read_text()
    for note in (
        "has not ended: shown up to step 4",
        "its loss was not finite at step 4",
        "its weights were not measured",
    ):
        assert note in out and note in text
    assert "Training loss" in text and "Stable rank" not in text.split("<script>")[0]
    # Of several, one that is no run is named and left out.
    assert main([str(folders[0]), str(tmp_path / "nothing"), "--output", str(tmp_path / "both.html")]) == 0
    assert "left out: " in capsys.readouterr().out


@pytest.mark.launcher
@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_in_a_browser(folders: list[Path], tmp_path: Path) -> None:
    """Every figure is drawn, at desktop width and narrow, without an error on the console."""
    output = tmp_path / "report.html"
    assert main([*map(str, folders), "--output", str(output)]) == 0
    expected = len(figures_of(output.read_text()))
    text = output.read_text()
    for place, script in (
        (
            "<head>",
            "window.seen=[];addEventListener('error',e=>seen.push(e.message));console.error=(...all)=>seen.push(all.join())",
        ),
        (
            "</body>",
            "document.body.dataset.errors=seen.join('; ')||'none';document.body.dataset.seen=["
            "document.querySelectorAll('.plot .main-svg').length,innerWidth,document.documentElement.scrollWidth].join(' ');"
            "parent.postMessage({...document.body.dataset},'*')",
        ),
    ):
        script = f"<script>{script}</script>"
        text = text.replace(place, place + script if place == "<head>" else script + place)
    (tmp_path / "probe.html").write_text(text)

    def visit(page: Path, width: int, *words: str) -> subprocess.CompletedProcess[str]:
        command = [
            str(BROWSER), "--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
            f"--window-size={width},1200", "--virtual-time-budget=20000", f"--user-data-dir={tmp_path / 'profile'}",
            *words, page.as_uri(),
        ]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)

    def value(page: Path, width: int, name: str, found: dict[int, str]) -> str:
        if width not in found:
            found[width] = visit(page, width, "--dump-dom").stdout
        match = re.search(rf'data-{name}="([^"]+)"', found[width])
        assert match is not None, found[width][-2000:]
        return match[1]

    # Windows are at least 500 wide: a phone's width is that of a frame in one.
    (tmp_path / "phone.html").write_text(
        "<body><script>addEventListener('message',e=>Object.assign(document.body.dataset,e.data))</script>"
        "<iframe src='probe.html' width='375' height='800' style='border:0'></iframe>"
    )
    pages: dict[int, str] = {}
    for width in (1280, 375):
        probe = tmp_path / ("probe.html" if width > 500 else "phone.html")
        assert value(probe, width, "errors", pages) == "none" and int(value(probe, width, "drawn", pages)) == expected
        plots, inner, scroll = map(int, value(probe, width, "seen", pages).split())
        assert plots >= expected and scroll <= inner == width, "nothing is wider than the window"
    visit(tmp_path / "phone.html", 500, f"--screenshot={tmp_path / 'narrow.png'}")
    assert (tmp_path / "narrow.png").stat().st_size > 20_000
    # Negative control: an error would be seen.
    broken = tmp_path / "broken.html"
    broken.write_text(text.replace("document.body.dataset.drawn", "nothing.at.all();document.body.dataset.drawn"))
    assert "nothing is not defined" in value(broken, 1280, "errors", {})
