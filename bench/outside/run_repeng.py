"""repeng (https://github.com/vgel/repeng) on a model folder; see `serve`."""

import importlib
from typing import Any

from serve import Answer, ids_of, serve

library = importlib.import_module("repeng")  # installed in its own environment only: make outside


def train(model: Any, tokenizer: Any, positive: list[str], negative: list[str], **options: Any) -> Answer:
    """A direction of length 1 a layer; without options as the library does by default (method pca_diff, batch 32)."""
    pairs = [library.DatasetEntry(one, other) for one, other in zip(positive, negative, strict=True)]
    found = library.ControlVector.train(model, tokenizer, pairs, **options)
    return {str(layer): vector for layer, vector in found.directions.items()}


def pass_on(model: Any, tokenizer: Any, file: str, to: str) -> Answer:
    """The directions that the library reads from a GGUF file, which it also writes to another."""
    found = library.ControlVector.import_gguf(file)
    found.export_gguf(to)
    return {str(layer): vector for layer, vector in found.directions.items()}


if __name__ == "__main__":
    serve("repeng", {"train": train, "gguf": pass_on, "ids": ids_of})
