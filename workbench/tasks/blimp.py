"""BLiMP (arXiv 1912.00582): 67 paradigms of 1,000 pairs of sentences, one grammatical, one not, as a task of pairs.

A pair has no question to be asked: rows hold `good` and `bad`, and `workbench.likelihood.minimal_pairs` scores them. A
hash of the two sentences deals them out: training 0.2, tuning 0.2, test 0.6. Files come from a path, else from the
folder named by WORKBENCH_DATA, else from the Hugging Face hub, one paradigm at a time.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

from workbench.tasks.benchmarks import SHARES, SPLITS, split_of
from workbench.tasks.rows import read_records

HUB = "nyu-mll/blimp"
PARADIGMS: tuple[str, ...] = (
    "adjunct_island", "anaphor_gender_agreement", "anaphor_number_agreement", "animate_subject_passive",
    "animate_subject_trans", "causative", "complex_NP_island",
    "coordinate_structure_constraint_complex_left_branch", "coordinate_structure_constraint_object_extraction",
    "determiner_noun_agreement_1", "determiner_noun_agreement_2", "determiner_noun_agreement_irregular_1",
    "determiner_noun_agreement_irregular_2", "determiner_noun_agreement_with_adj_2",
    "determiner_noun_agreement_with_adj_irregular_1", "determiner_noun_agreement_with_adj_irregular_2",
    "determiner_noun_agreement_with_adjective_1", "distractor_agreement_relational_noun",
    "distractor_agreement_relative_clause", "drop_argument", "ellipsis_n_bar_1", "ellipsis_n_bar_2",
    "existential_there_object_raising", "existential_there_quantifiers_1", "existential_there_quantifiers_2",
    "existential_there_subject_raising", "expletive_it_object_raising", "inchoative", "intransitive",
    "irregular_past_participle_adjectives", "irregular_past_participle_verbs",
    "irregular_plural_subject_verb_agreement_1", "irregular_plural_subject_verb_agreement_2",
    "left_branch_island_echo_question", "left_branch_island_simple_question",
    "matrix_question_npi_licensor_present", "npi_present_1", "npi_present_2", "only_npi_licensor_present",
    "only_npi_scope", "passive_1", "passive_2", "principle_A_c_command", "principle_A_case_1",
    "principle_A_case_2", "principle_A_domain_1", "principle_A_domain_2", "principle_A_domain_3",
    "principle_A_reconstruction", "regular_plural_subject_verb_agreement_1",
    "regular_plural_subject_verb_agreement_2", "sentential_negation_npi_licensor_present",
    "sentential_negation_npi_scope", "sentential_subject_island", "superlative_quantifiers_1",
    "superlative_quantifiers_2", "tough_vs_raising_1", "tough_vs_raising_2", "transitive", "wh_island",
    "wh_questions_object_gap", "wh_questions_subject_gap", "wh_questions_subject_gap_long_distance",
    "wh_vs_that_no_gap", "wh_vs_that_no_gap_long_distance", "wh_vs_that_with_gap",
    "wh_vs_that_with_gap_long_distance",
)  # fmt: skip
Rows = list[dict[str, Any]]


def paradigms(name: str) -> tuple[str, ...]:
    """The paradigms that "blimp" (all 67) or "blimp:PARADIGM" stands for.

    >>> paradigms("blimp:passive_1")
    ('passive_1',)
    """
    asked = name.partition(":")[2]
    if not asked and name == "blimp":
        return PARADIGMS
    if asked not in PARADIGMS:
        near = get_close_matches(asked, PARADIGMS, n=3, cutoff=0.4)
        said = f"Did you mean {' or '.join(f'blimp:{other}' for other in near)}? " if near else ""
        raise ValueError(f"{name!r} names no paradigm of BLiMP. {said}Paradigms: {', '.join(PARADIGMS)}.")
    return (asked,)


def load_pairs(
    name: str, path: Path | None, per_paradigm: int | None
) -> tuple[str, Callable[[str, int | None, int], Rows]]:
    """Where the pairs are from, and what draws rows of a split; see `Task.rows`.

    per_paradigm: how many of each paradigm a split gives, a seeded sample of its own; None gives all.
    """
    if per_paradigm is not None and (not isinstance(per_paradigm, int) or per_paradigm < 1):
        raise ValueError(f"per_paradigm is a number of pairs, from 1, or None for all; not {per_paradigm!r}.")
    wanted = paradigms(name)
    file = _file(path)
    dealt: dict[str, dict[str, Rows]] = {split: {each: [] for each in wanted} for split in SPLITS}
    for row in _read(file, file.stat().st_mtime_ns) if file is not None else _from_hub(name, wanted):
        if row["paradigm"] in wanted:
            dealt[split_of(f"{row['good']}\n{row['bad']}", SHARES["all"])][row["paradigm"]].append(row)

    def draw(split: str, n: int | None, seed: int) -> Rows:
        kept = [row for each, rows in dealt[split].items() for row in _some(rows, per_paradigm, f"{each}/{seed}")]
        if not kept or (n or 0) > len(kept):
            held = ", ".join(f"{sum(map(len, own.values()))} {each}" for each, own in dealt.items())
            raise ValueError(
                f"Task {name!r} can't give {n or 'any'} {split} pairs: it has {len(kept)} there (all that the file "
                f"holds: {held}). Ask for fewer, or for more a paradigm: load_task({name!r}, per_paradigm=None)."
            )
        return deepcopy(kept if n is None else _some(kept, n, f"{name}/{split}/{seed}"))

    return str(file or HUB), draw


def _some(rows: Rows, n: int | None, seed: str) -> Rows:
    return rows if n is None else Random(seed).sample(rows, len(rows))[:n]


def _file(path: Path | None) -> Path | None:
    """The file of all pairs: `path` itself, or in it, or in the data folder."""
    data = os.environ.get("WORKBENCH_DATA")
    places = [path] if path is not None else [Path(data)] if data else []
    for place in places:
        files = [place, *(place / inner / f"blimp.jsonl{end}" for inner in (".", "blimp") for end in ("", ".gz"))]
        if found := next((file for file in files if file.is_file()), None):
            return found
    if path is not None:
        raise ValueError(f"{path}: no blimp.jsonl or blimp.jsonl.gz there, nor in its folder blimp/.")
    return None


@lru_cache(maxsize=2)  # one file holds all paradigms
def _read(file: Path, changed: int) -> Rows:
    return list(_rows(read_records(file), str(file)))


def _rows(records: Iterator[tuple[int, dict[str, Any]]], where: str) -> Iterator[dict[str, Any]]:
    for at, record in records:
        good, bad, paradigm = (record.get(key) for key in ("sentence_good", "sentence_bad", "UID"))
        if not all(isinstance(each, str) and each.strip() for each in (good, bad, paradigm)):
            raise ValueError(f"{where}, line {at}: a pair needs sentence_good, sentence_bad and UID; found {record!r}.")
        mark = hashlib.sha256(f"{good}\n{bad}".encode()).hexdigest()[:12]
        yield {
            "id": f"{paradigm}-{mark}", "question": "", "answer": good, "good": good, "bad": bad, "paradigm": paradigm,
            "cluster": paradigm, "field": str(record.get("field", "")), "term": str(record.get("linguistics_term", "")),
        }  # fmt: skip


def _from_hub(name: str, wanted: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    import datasets  # slow to import, and needed only here

    for each in wanted:
        try:
            records = datasets.load_dataset(HUB, each, split="train")
        except Exception as error:
            why = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}"
            raise ValueError(
                f"{name!r} could not be loaded: WORKBENCH_DATA names no folder with blimp/blimp.jsonl.gz, and the "
                f"hub's {HUB!r} is neither cached nor reachable ({why}). Next: load_task({name!r}, path=FILE)."
            ) from error
        yield from _rows(enumerate(map(dict, records), start=1), f"{HUB}/{each}")
