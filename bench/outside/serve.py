"""The loop of a program in another environment: answer requests about model folders, one JSON line each.

Imported beside the program that is started, by an interpreter that knows torch, transformers 4 and numpy and not the
workbench. Seconds cover the library's own call, not loading, and stand in the answer.
"""

import json
import sys
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

Answer = dict[str, np.ndarray]


@cache
def load(folder: str) -> tuple[Any, Any]:
    """The model in float32 and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def serve(library: str, works: dict[str, Callable[..., Answer]]) -> None:
    """Answer requests {work, folder, out, arguments} from standard input until it ends; arrays go to the file `out`.

    works: for each name a function (model, tokenizer, **arguments) -> arrays by name.
    """
    torch.set_num_threads(int(sys.argv[1]))
    versions = {name: version(name) for name in (library, "transformers", "torch", "numpy")}
    for line in sys.stdin:
        request = json.loads(line)
        model, tokenizer = load(request["folder"])
        wall, cpu = time.perf_counter(), time.process_time()
        arrays = works[request["work"]](model, tokenizer, **request["arguments"])
        spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        np.savez(request["out"], **arrays)
        print(json.dumps({**spent, "versions": versions}), flush=True)


def ids_of(model: Any, tokenizer: Any, texts: list[str]) -> Answer:
    """The token ids that a call of the tokenizer gives each text, as these libraries call it."""
    return {str(number): np.array(tokenizer(text)["input_ids"]) for number, text in enumerate(texts)}
