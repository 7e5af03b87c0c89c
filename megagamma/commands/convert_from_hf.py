"""Import a Hugging Face folder as a run whose checkpoint holds its weights, to train it further or to analyse it.

    megagamma convert_from_hf exported/mine --out runs/continued
    megagamma pretrain --config runs/continued/config.yaml --data.paths '[data/mine]' --run.steps 1000

Classes: Llama, Qwen3, and Qwen3.5, Qwen3-Next or Lfm3 with full attention in every layer and no experts, without biases,
scaled or partial rotary embeddings. Weights become fp32; matrices to the bit. Norm gains that a class stores as gain - 1
are exact between 0.5 and 2, and rounded to 6e-8 elsewhere. Adam starts anew. Exit codes: 0; 2 with the reason.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megagamma.files import read_json


def main(arguments: list[str] | None = None) -> int:
    """Parse and import."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="Hugging Face folder with config.json and safetensors weights")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run to write")
    parser.add_argument("--tokenizer", help="its SentencePiece model (default: the folder's, where it has one)")
    parser.add_argument(
        "--vocab_size_multiple", type=int, default=128,
        help="pad the vocabulary to a multiple of this, which every tensor-parallel degree must divide (default 128)",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    read_json(args.folder / "config.json")  # a wrong path is answered at once: what follows imports torch
    from megagamma.huggingface.importing import import_model

    checkpoint = import_model(
        args.folder, args.out, tokenizer=args.tokenizer, vocab_size_multiple=args.vocab_size_multiple
    )
    print(
        f"{checkpoint}\nto train it further: megagamma pretrain --config {args.out}/config.yaml "
        "--data.paths '[PREPARED FOLDER]'"
    )
    return 0
