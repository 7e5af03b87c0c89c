"""Whether an exported model is the model: its logits and greedy text against ours, on the same tokens, in fp32."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from megagamma.config.schema import Config
from megagamma.errors import MegagammaError
from megagamma.huggingface.formats import Format
from megagamma.huggingface.importing import HuggingFaceWeights
from megagamma.huggingface.native import ParityInputs, ParityOutputs

# In fp32 the two differ by 0 to 1e-5; a misplaced gate, norm or epsilon by 1e-3 and more.
TOLERANCE = 1e-4
_NUMBERS = 1 << 23  # logits of a comparison, at most


class ParityError(MegagammaError):
    """The exported model is not the model."""


@dataclass
class Parity:
    """Content of parity.json."""

    compared: str
    """"whole model", or the layers, each between embedding and head."""
    tokens: int
    largest_difference: float
    """Of a logit, absolute."""
    largest_relative: float
    """The same over the largest logit."""
    tolerance: float
    greedy_tokens: int
    greedy_equal: bool | None
    """None where nothing was continued: a single layer writes no text."""
    architecture: str
    dtype: str
    transformers: str
    torch: str

    @property
    def holds(self) -> bool:
        """Whether the folder may be published. Both bounds, since the logits of a young model are small."""
        worst = max(self.largest_difference, self.largest_relative)
        return worst < self.tolerance and self.greedy_equal is not False

    def line(self) -> str:
        """One line for the console."""
        sign = "<" if max(self.largest_difference, self.largest_relative) < self.tolerance else "against"
        greedy = ""
        if self.greedy_equal is not None:
            word = "=" if self.greedy_equal else "is not"
            greedy = f"; greedy continuation of {self.greedy_tokens} tokens {word} ours"
        return (
            f"parity ({self.compared}): largest logit difference {self.largest_difference:.1e} {sign} "
            f"{self.tolerance:g} over {self.tokens} tokens, relative {self.largest_relative:.1e}{greedy}"
        )

    def as_json(self) -> dict[str, Any]:
        """For parity.json."""
        return asdict(self) | {"holds": self.holds}


def needed_bytes(parameters: int) -> int:
    """Memory of a comparison of whole models: one at a time in fp32, and what runs beside it."""
    return round(1.3 * 4 * parameters) + (1 << 30)


def free_memory(device: str) -> int:
    """Memory that a comparison may take: of the GPU, and of this machine within the limit of its control group. Bytes."""
    free = psutil.virtual_memory().available
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
    if device.startswith("cuda"):
        free = min(free, torch.cuda.mem_get_info(torch.device(device))[0])
    return max(0, free)


def sampled_layers(count: int, sample: int = 3) -> list[int]:
    """First, last and between."""
    if count <= sample:
        return list(range(count))
    return sorted({round(index * (count - 1) / (sample - 1)) for index in range(sample)})


def parity_inputs(
    config: Config, checkpoint: Path, target: Format, dtype: torch.dtype, layer: int | None, device: str
) -> ParityInputs:
    """Random tokens, as hard as any: two sequences, shorter where the vocabulary is large."""
    vocabulary = config.model.vocab_size
    assert vocabulary is not None
    length = max(8, min(config.data.sequence_length, 256, _NUMBERS // (2 * vocabulary)))
    generator = torch.Generator().manual_seed(20)
    tokens = torch.randint(0, vocabulary, (2, length), generator=generator)
    new = max(1, min(16, config.data.sequence_length - 8)) if layer is None else 0
    return ParityInputs(checkpoint, tokens, tokens[0, : min(8, length)], new, layer, dtype, target.norm_offset, device)


def exported_model(folder: Path, layer: int | None = None, trust: bool = False) -> torch.nn.Module:
    """The exported folder as a user of transformers loads it, in fp32; with `layer`, that layer alone."""
    import transformers

    if layer is None:
        model: torch.nn.Module = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=trust
        )
        return model.eval()
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust, dtype=torch.float32)
    weights, prefix = HuggingFaceWeights(folder), f"model.layers.{layer}."
    state = {
        name.replace(prefix, "model.layers.0."): weights.read(name).float()
        for name in weights.names()
        if name.startswith(prefix) or not name.startswith("model.layers.")
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ParityError(f"{folder}: tensors that do not belong together: {[*missing, *unexpected][:4]}")
    return model.eval()


@torch.no_grad()
def _theirs(inputs: ParityInputs, model: torch.nn.Module) -> ParityOutputs:
    device = torch.device(inputs.device)
    model.to(device)
    outputs: Any = model(input_ids=inputs.tokens.to(device))
    greedy: list[int] = []
    if inputs.new_tokens:
        prompt = inputs.prompt.unsqueeze(0).to(device)
        whole: Any = model
        whole.generation_config.eos_token_id = None
        out = whole.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=inputs.new_tokens, do_sample=False,
            pad_token_id=0,
        )  # fmt: skip
        greedy = out[0, prompt.shape[1] :].tolist()
    return ParityOutputs(outputs.logits.float().cpu(), greedy)


def compare(
    config: Config,
    checkpoint: Path,
    folder: Path,
    target: Format,
    dtype: torch.dtype,
    *,
    native: Callable[[ParityInputs], ParityOutputs],
    layers: list[int] | None = None,
    tolerance: float = TOLERANCE,
    device: str = "cpu",
) -> Parity:
    """Compare an exported folder with the checkpoint that it was made from.

    Args:
        config: of the run, vocabulary known.
        native: runs our model, such as `megagamma.huggingface.native.run_in_subprocess`.
        layers: compare only these, one after the other, each between embedding and head: for models whose fp32 weights
            do not fit in memory. None: the whole model.
        device: of both models.
    """
    import transformers

    absolute = relative = 0.0
    tokens, equal, greedy = 0, True, 0
    for layer in [None] if layers is None else layers:
        inputs = parity_inputs(config, checkpoint, target, dtype, layer, device)
        ours = native(inputs)
        model = exported_model(folder, layer, trust=target.code is not None)
        theirs = _theirs(inputs, model)
        del model
        gc.collect()
        if ours.logits.shape != theirs.logits.shape:
            raise ParityError(
                f"{folder}: gives logits of shape {tuple(theirs.logits.shape)}, the model {tuple(ours.logits.shape)}"
            )
        difference = float((ours.logits - theirs.logits).abs().max())
        if not math.isfinite(difference):
            difference = math.inf  # max() would drop what is not a number
        absolute = max(absolute, difference)
        relative = max(relative, difference / max(float(ours.logits.abs().max()), 1e-30))
        tokens += inputs.tokens.numel()
        equal &= ours.greedy == theirs.greedy
        greedy += len(ours.greedy)
    compared = "whole model" if layers is None else f"layers {', '.join(map(str, layers))}, each alone"
    return Parity(
        compared, tokens, absolute, relative, tolerance, greedy, equal if greedy else None, target.architecture,
        str(dtype).removeprefix("torch."), transformers.__version__, torch.__version__,
    )  # fmt: skip
