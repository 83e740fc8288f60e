"""steering-vectors (https://github.com/steering-vectors/steering-vectors) on a model folder; see `serve`."""

import importlib
from typing import Any

import numpy as np
import torch
from serve import Answer, ids_of, serve

library = importlib.import_module("steering_vectors")  # installed in its own environment only: make outside


def train(
    model: Any, tokenizer: Any, positive: list[str], negative: list[str], method: str = "mean", **options: Any
) -> Answer:
    """A vector a layer, by the aggregator of that name; without options as the library does by default."""
    if method != "mean":
        options["aggregator"] = getattr(library, f"{method}_aggregator")()
    samples = list(zip(positive, negative, strict=True))
    found = library.train_steering_vector(model, tokenizer, samples, **options)
    return {str(layer): vector.numpy() for layer, vector in found.layer_activations.items()}


def generate(
    model: Any, tokenizer: Any, text: str, layer: int, vector: list[float], tokens: int, cached: bool, **where: Any
) -> Answer:
    """Greedy tokens under a vector, from the first new token on when `where` says min_token_index."""
    steer = library.SteeringVector({layer: torch.tensor(vector)})
    ids = tokenizer(text, return_tensors="pt")
    with torch.no_grad(), steer.apply(model, **where):
        found = model.generate(**ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, use_cache=cached)
    return {"ids": found[0, ids["input_ids"].shape[1] :].numpy()}


def keys_and_values(model: Any, tokenizer: Any, positive: list[str], negative: list[str], token: int) -> Answer:
    """Mean differences of one token's cached keys (rotation taken off) and values: plain transformers, one text a time.

    A key is rotated by halves: its coordinates (i, i + head_dim / 2) as a plane, by position / theta^(2i / head_dim).
    """
    totals: dict[str, np.ndarray] = {}
    theta = getattr(model.config, "rope_theta", None)
    for sign, texts in ((1, positive), (-1, negative)):
        for text in texts:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                cache = model(ids, use_cache=True).past_key_values
            for layer in range(model.config.num_hidden_layers):
                key, value = (part[0, :, token].double().numpy() for part in cache[layer][:2])
                if theta is not None:
                    half = key.shape[-1] // 2
                    turn = np.exp(-1j * (ids.shape[1] + token) * theta ** (-np.arange(half) / half))
                    plane = (key[:, :half] + 1j * key[:, half:]) * turn
                    key = np.concatenate([plane.real, plane.imag], axis=-1)
                for name, part in ((f"key {layer}", key), (f"value {layer}", value)):
                    totals[name] = totals.get(name, np.zeros(())) + sign * part / len(texts)
    return totals


if __name__ == "__main__":
    serve("steering-vectors", {"train": train, "generate": generate, "kv": keys_and_values, "ids": ids_of})
