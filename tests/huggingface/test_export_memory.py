"""Writing an exported model takes memory for its largest matrix, and not for the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys, torch
from pathlib import Path
from support.memory import forget_peak, resident
from megagamma.config.io import parse_config
from megagamma.huggingface.export import ExportOptions, read_checkpoint, write_weights
from megagamma.huggingface.formats import choose_format, exported_tensors
from megagamma.huggingface.importing import write_run
from megagamma.model.parameters import logical_parameters

folder, keep = Path(sys.argv[1]), sys.argv[2] == "keep"
config = parse_config([
    "--config", "configs/smoke.yaml", "--model.hidden_size", "768", "--model.num_layers", "16",
    "--model.ffn_hidden_size", "2048", "--model.vocab_size", "2000",
])
if not (folder / "run").exists():
    write_run(folder / "run", config, ((one, torch.ones(one.shape)) for one in logical_parameters(config.model)), quiet=True)
reader, config = read_checkpoint(folder / "run" / "checkpoints" / "step_00000000")
if keep:
    reader.close_files = lambda: None
target = choose_format(config.model)
sizes = [4 * torch.Size(one.shape).numel() for one in exported_tensors(config.model, target)]
(folder / "hf").mkdir(exist_ok=True)
write_weights(folder / "hf", reader, config, target, ExportOptions(), quiet=True)  # all that is loaded once
reader.close_files()
reader, _ = read_checkpoint(reader.folder)
if keep:
    reader.close_files = lambda: None
before = resident()
forget_peak()
write_weights(folder / "hf", reader, config, target, ExportOptions(), quiet=True)
print("PEAK", resident("VmHWM") - before, max(sizes), sum(sizes))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from /proc")
def test_memory_is_that_of_the_largest_matrix(tmp_path: Path, root: Path) -> None:
    def peak(mode: str) -> tuple[int, int, int]:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(tmp_path), mode], cwd=root, capture_output=True, text=True, check=False,
            env={"PYTHONPATH": "tests", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
        line = next(line for line in done.stdout.splitlines() if line.startswith("PEAK"))
        found = [int(one) for one in line.split()[1:]]
        return found[0], found[1], found[2]

    used, largest, whole = peak("close")
    assert whole > 40 * largest > 0
    # A matrix as it is mapped, as it is interleaved with its gate, and a piece of it that is written.
    assert used < 4 * largest + (16 << 20), (used, largest, whole)
    assert used < 0.25 * whole
    # Negative control: with the files kept mapped, the whole model is resident at the end.
    kept, _, _ = peak("keep")
    assert kept > 0.9 * whole, (kept, whole)
