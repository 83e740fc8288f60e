"""Known benchmarks as rows with a role, because a benchmark's name should be enough to get it.

Files come from a path, else from the folder named by the environment variable WORKBENCH_DATA, else from the Hugging
Face hub through `datasets`. Does not cover: reading a file (`rows`), generated tasks (`workbench.tasks`).

Splits never share a question. A benchmark's test file is its test split, and its training file gives training and
tuning rows, 9 to 1; AQuA's development file is halved between them. Where one file is everything (SVAMP, MATH-500, BBH,
HumanEval, any plain file) a hash of the question text deals it out: training 0.2, tuning 0.2, test 0.6. Repeated
questions are dropped, and so are three rows of BBH whose gold answer is none of their options.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from workbench.aside import Aside
from workbench.tasks.rows import read_records, rows_of, same_text

SPLITS: tuple[str, ...] = ("train", "tuning", "test")
SHARES: dict[str, dict[str, float]] = {
    "train": {"train": 0.9, "tuning": 0.1},
    "dev": {"train": 0.5, "tuning": 0.5},
    "test": {"test": 1.0},
    "all": {"train": 0.2, "tuning": 0.2, "test": 0.6},
    "generated": {"train": 0.5, "tuning": 0.25, "test": 0.25},
}


@dataclass(frozen=True)
class Benchmark:
    """Where a benchmark lies and what its answers are; `files` and `hub_splits` map a source to a role in SHARES."""

    folder: str
    files: Mapping[str, str]
    hub: tuple[str, str | None]
    hub_splits: Mapping[str, str]
    kind: str | None


BENCHMARKS: dict[str, Benchmark] = {
    "gsm8k": Benchmark(
        "gsm8k", {"test.jsonl": "test", "train.jsonl": "train"}, ("openai/gsm8k", "main"),
        {"test": "test", "train": "train"}, "number",
    ),
    "svamp": Benchmark(
        "svamp", {"SVAMP.json": "all"}, ("ChilleD/SVAMP", None), {"train": "all", "test": "all"}, "number",
    ),
    "aqua": Benchmark(
        "aqua", {"test.json": "test", "dev.json": "dev"}, ("deepmind/aqua_rat", "raw"),
        {"test": "test", "validation": "dev"}, "option",
    ),
    "math500": Benchmark("math500", {"test.jsonl": "all"}, ("HuggingFaceH4/MATH-500", None), {"test": "all"}, "latex"),
    "humaneval": Benchmark(
        "humaneval", {"HumanEval.jsonl": "all"}, ("openai/openai_humaneval", None), {"test": "all"}, "code"
    ),
}  # fmt: skip
BBH: tuple[str, ...] = (
    "boolean_expressions", "causal_judgement", "date_understanding", "disambiguation_qa", "dyck_languages",
    "formal_fallacies", "geometric_shapes", "hyperbaton", "logical_deduction_five_objects",
    "logical_deduction_seven_objects", "logical_deduction_three_objects", "movie_recommendation",
    "multistep_arithmetic_two", "navigate", "object_counting", "penguins_in_a_table",
    "reasoning_about_colored_objects", "ruin_names", "salient_translation_error_detection", "snarks",
    "sports_understanding", "temporal_sequences", "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects", "tracking_shuffled_objects_three_objects", "web_of_lies", "word_sorting",
)  # fmt: skip


def benchmark(name: str) -> Benchmark:
    """The benchmark called `name`; "bbh:SUBTASK" is one of the 27 parts of BIG-Bench Hard."""
    if not name.startswith("bbh"):
        return BENCHMARKS[name]
    part = name.partition(":")[2]
    if part not in BBH:
        near = get_close_matches(part, BBH, n=3, cutoff=0.4)
        said = f"Did you mean {' or '.join(f'bbh:{other}' for other in near)}? " if near else ""
        raise ValueError(
            f"{name!r} names no part of BIG-Bench Hard. {said}Parts: {', '.join(f'bbh:{p}' for p in BBH)}."
        )
    return Benchmark("bbh", {f"{part}.json": "all"}, ("lukaemon/bbh", part), {"test": "all"}, None)


def split_of(question: str, shares: Mapping[str, float]) -> str:
    """The split that owns a question, by a hash of its text (case and spacing aside) alone, so that it never moves.

    >>> split_of("What is 1 + 1?", SHARES["all"]) == split_of(" what is  1 + 1?", SHARES["all"])
    True
    """
    place = int.from_bytes(hashlib.sha256(same_text(question).encode()).digest()[8:16], "big") / 2**64
    for split, share in shares.items():
        if place < share:
            return split
        place -= share
    return list(shares)[-1]


def load_rows(
    name: str, path: Path | None, question: str | None, answer: str | None, aside: Aside | None = None
) -> list[tuple[str, list[dict[str, Any]]]]:
    """A benchmark's rows by role (a key of `SHARES`): from `path`, else WORKBENCH_DATA, else the hub."""
    found = benchmark(name)
    if path is not None and path.is_file() and not any(_named(path, file) for file in found.files):
        return [("all", rows_of(read_records(path, aside), str(path), question, answer, aside))]
    if path is not None:
        files = _files(found, path.parent if path.is_file() else path)
        if not files:
            expected = " or ".join(found.files)
            raise ValueError(f"{path}: no file of {name!r} there. Expected {expected} in it or in its {found.folder}/.")
        return [(role, rows_of(read_records(file, aside), str(file), question, answer, aside)) for role, file in files]
    data = os.environ.get("WORKBENCH_DATA")
    files = _files(found, Path(data)) if data else []
    if files:
        return [(role, rows_of(read_records(file, aside), str(file), question, answer, aside)) for role, file in files]
    return _from_hub(name, found, data)


def _named(path: Path, file: str) -> bool:
    return path.name in (file, f"{file}.gz")


def _files(found: Benchmark, folder: Path) -> list[tuple[str, Path]]:
    """The benchmark's files, in `folder` or a subfolder named like it (BBH has one in the other)."""
    places = [folder, folder / found.folder, folder / found.folder / found.folder]
    if (folder / found.folder).is_dir():
        places = places[1:]  # a data folder for all: files of the same name beside it are another benchmark's
    files = []
    for file, role in found.files.items():
        candidates = [place / f"{file}{end}" for place in places for end in ("", ".gz")]
        files += [(role, candidate) for candidate in candidates if candidate.is_file()][:1]
    return files


def _from_hub(name: str, found: Benchmark, data: str | None) -> list[tuple[str, list[dict[str, Any]]]]:
    import datasets  # slow to import, and needed only here

    repository, configuration = found.hub
    loaded = []
    try:
        for split, role in found.hub_splits.items():
            records = datasets.load_dataset(repository, configuration, split=split)
            loaded.append((role, rows_of(enumerate(map(dict, records), start=1), f"{repository}/{split}")))
    except Exception as error:
        looked = f"WORKBENCH_DATA ({data}) has no {' or '.join(found.files)}" if data else "WORKBENCH_DATA is not set"
        why = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}"
        call = f"import datasets; datasets.load_dataset({repository!r}, {configuration!r})"
        raise ValueError(
            f"{name!r} could not be loaded: no path= was given, {looked}, and the hub's {repository!r} is neither "
            f"cached nor reachable ({why}). Next: load_task({name!r}, path=FILE_OR_FOLDER), or set WORKBENCH_DATA to a "
            f'folder that holds {found.folder}/, or run once with network: python -c "{call}". '
            "The lab tasks, such as load_task('word-problems'), need none of this."
        ) from error
    return loaded
