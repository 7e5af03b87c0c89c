"""What a prepared folder's manifest holds."""

from __future__ import annotations

MANIFEST = {
    "format": "megagamma.prepared",
    "format_version": 1,
    "dtype": "uint16",
    "tokenizer": {"fingerprint": "a", "vocab_size": 10, "eos_id": 1, "pad_id": 0},
    "splits": {"train": {"documents": 1, "tokens": 2, "bytes": 3}},
    "files": {name: {"bytes": 4, "sha256": "b"} for name in ("train.bin", "train.idx")},
}
