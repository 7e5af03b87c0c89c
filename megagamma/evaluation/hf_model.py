"""lm-eval's `hf` model over a folder of ours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megagamma.environment import accelerate_world_size
from megagamma.errors import EvaluationError
from megagamma.evaluation.scores import reason


@dataclass
class HuggingFaceOptions:
    """How a Hugging Face folder is run.

    Attributes:
        device: auto (cuda when there is one), cpu, cuda or cuda:1.
        dtype: auto (as saved), float32, bfloat16 or float16.
        parallelize: split the layers over all GPUs of this machine.
        max_length: context length in tokens; None takes the model's.
        prefix_token_id: what stands before a text without a prompt; None: the tokenizer's bos, else its eos. Models that
            were trained with documents separated by eos alone need eos.
        trust_remote_code: run the folder's own model file.
    """

    device: str = "auto"
    dtype: str = "auto"
    parallelize: bool = False
    max_length: int | None = None
    prefix_token_id: int | None = None
    trust_remote_code: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """What of it changes scores."""
        return {
            "kind": "hf",
            "dtype": self.dtype,
            "max_length": self.max_length,
            "prefix_token_id": self.prefix_token_id,
        }


def checked_device(options: HuggingFaceOptions) -> str:
    """The device that options mean.

    Raises:
        EvaluationError: there is none of that kind here, or the options do not go together.
    """
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = "unknown"
    if kind not in ("cpu", "cuda"):
        raise EvaluationError(f"device={options.device}: must be auto, cpu, cuda or cuda:1")
    if kind == "cuda" and not torch.cuda.is_available():
        raise EvaluationError(f"device={options.device}, but torch sees no GPU here: use cpu or auto")
    if options.parallelize and kind == "cpu":
        raise EvaluationError("parallelize needs GPUs, and torch sees none here: leave it out")
    if kind == "cpu" and (processes := accelerate_world_size()) > 1:
        raise EvaluationError(
            f"WORLD_SIZE={processes} on a CPU: lm-eval shares documents over GPUs only: start one process"
        )
    return device


def load_model(folder: str | Path, options: HuggingFaceOptions, batch_size: int | str = 8) -> Any:
    """lm-eval's `hf` model over a folder.

    Raises:
        EvaluationError: no such folder, no such device, or transformers cannot load it.
    """
    folder = Path(folder).expanduser().resolve()
    if not (folder / "config.json").is_file():
        raise EvaluationError(f"model={folder}: not a Hugging Face model folder: config.json is missing")
    device = checked_device(options)
    from lm_eval.models.huggingface import HFLM

    try:
        return HFLM(
            pretrained=str(folder),
            device=device,
            dtype=options.dtype,
            batch_size=batch_size,
            parallelize=options.parallelize,
            max_length=options.max_length,
            prefix_token_id=options.prefix_token_id,
            trust_remote_code=options.trust_remote_code,
        )
    except Exception as error:
        raise EvaluationError(
            f"model={folder}: cannot be loaded ({reason(error)}): convert it again, or see whether it fits in memory"
        ) from error
