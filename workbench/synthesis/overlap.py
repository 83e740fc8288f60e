"""Find records that repeat each other or the evaluation questions, so that a score measures skill and not memory.

Measures, all on words, numbers and operators (case, spacing and sentence punctuation ignored):

* `contamination`: 13 tokens in a row shared with one evaluation question (Brown et al. 2020, arXiv 2005.14165, app. C).
  Questions made from a template share long runs of *template* words with all their siblings, and by chance a number
  or two, which is no leak. So a run counts only when it identifies: at least 4 of its tokens are content, that is found
  in at most a tenth of the evaluation questions (or two), and the run is in at most a hundredth of them (or one).
  Numbers are tokens like others: a template filled with other numbers does not match. An equal question always counts,
  which is also how questions shorter than 13 tokens are compared.
* `near_duplicates`: Jaccard similarity of three-token shingles, each weighted by how rare it is among the records
  (inverse document frequency), so that shared template words weigh almost nothing and shared content weighs much.

Beside them, `minhash_duplicates`: plain Jaccard similarity of the same shingles, estimated from signatures (Broder
1997), for large sets of free text: 7,473 solved GSM8K questions take 2 s instead of 17. On questions made from
templates it takes siblings for repeats, because it weighs template words like any others.

Not covered: paraphrases and translations; for those compare embeddings.
"""

import hashlib
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence, Set

import numpy as np

_TOKEN = re.compile(r"\d{1,3}(?:,\d{3})+(?!\d)|\d+(?:\.\d+)?|[^\W\d_]+|[-+*/=<>^%]")
_CONTENT = 4  # tokens of a run; measured on the lab's families: 2 and 3 flag up to 12 % of fresh questions, 4 under 2 %
_LONG_POSTING = 200  # shingles in more kept records than this are template words: no use as a first filter


def tokens(text: str) -> tuple[str, ...]:
    """Lower-case words, numbers and operators of a text.

    >>> tokens("Ana has 1,200 apples; she buys 3 + 4.")
    ('ana', 'has', '1200', 'apples', 'she', 'buys', '3', '+', '4')
    """
    return tuple(match.replace(",", "") for match in _TOKEN.findall(text.lower()))


def runs(sequence: Sequence[str], n: int) -> set[tuple[str, ...]]:
    """All runs of `n` tokens in a row; the whole sequence when it is shorter.

    >>> sorted(runs(("a", "b", "c"), 2))
    [('a', 'b'), ('b', 'c')]
    """
    return {tuple(sequence[i : i + n]) for i in range(max(1, len(sequence) - n + 1))} if sequence else set()


def contamination(
    questions: Sequence[str], evaluation: Mapping[str, str], n: int = 13, templates: Set[tuple[str, ...]] | None = None
) -> list[str | None]:
    """For each question, why it overlaps with an evaluation question, or None.

    `evaluation` maps the id of an evaluation question to its text. See the head of this module for the rule. templates:
    runs that don't identify, in place of those in more than a hundredth of `evaluation`.

    >>> test = {"t1": "Ana has 3 red apples and 4 green pears. How many pieces of fruit are there in total?"}
    >>> contamination(["Bo has 9 cats.", test["t1"].upper()], test)
    [None, 'the whole question is evaluation question t1']
    """
    owners: dict[tuple[str, ...], list[str]] = defaultdict(list)
    whole: dict[tuple[str, ...], str] = {}
    for name, text in evaluation.items():
        sequence = tokens(text)
        whole.setdefault(sequence, name)
        for run in runs(sequence, n) if len(sequence) >= n else ():
            owners[run].append(name)
    found_in = Counter(token for text in evaluation.values() for token in set(tokens(text)))
    content, common = max(2, len(evaluation) // 10), max(1, len(evaluation) // 100)

    def reason(question: str) -> str | None:
        sequence = tokens(question)
        if sequence in whole:
            return f"the whole question is evaluation question {whole[sequence]}"
        for start in range(len(sequence) - n + 1):
            run = sequence[start : start + n]
            telling = sum(found_in[token] <= content for token in run)
            known = len(owners.get(run, ()))
            rare = known <= common if templates is None else run not in templates
            if known and rare and telling >= _CONTENT:
                return f"{n} tokens in a row shared with evaluation question {owners[run][0]}: {' '.join(run)!r}"
        return None

    return [reason(question) for question in questions]


def check_threshold(threshold: float) -> None:
    """Refuse what is no similarity."""
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} is no similarity. Give a number above 0 and at most 1, such as 0.8.")


def near_duplicates(texts: Sequence[str], threshold: float = 0.8) -> list[int | None]:
    """For each text, the index of the earlier kept text that it repeats, or None when it is new.

    Texts are visited in order and compared with the kept ones only, so the first of a group stays. Equal token
    sequences always count as repeats. `threshold` is a weighted Jaccard similarity in (0, 1].

    >>> near_duplicates(["Ana has 3 cats.", "Bo runs 5 km a day.", "ana has 3 cats"])
    [None, None, 0]
    """
    check_threshold(threshold)
    shingles = [runs(tokens(text), 3) for text in texts]
    unique = {sequence: index for index, sequence in reversed(list(enumerate(map(tokens, texts))))}
    frequency = Counter(shingle for index in unique.values() for shingle in shingles[index])
    # +1 keeps a little weight on a shingle that every record holds: two equal lonely records must not compare as 0/0
    weight = {shingle: math.log((len(unique) + 1) / count) for shingle, count in frequency.items()}
    # fsum rounds once, whatever the order: sets of strings have another order in every process
    sizes = [math.fsum(weight[shingle] for shingle in found) for found in shingles]
    postings: dict[tuple[str, ...], list[int]] = defaultdict(list)
    result: list[int | None] = []
    for index, text in enumerate(texts):
        first = unique[tokens(text)]
        earlier = result[first] if first < index and result[first] is not None else first
        if first == index:
            earlier = _most_similar(shingles[index], shingles, postings, weight, sizes, sizes[index], threshold)
        if earlier is None:
            for shingle in shingles[index]:
                postings[shingle].append(index)
        result.append(earlier)
    return result


def _most_similar(
    found: set[tuple[str, ...]],
    shingles: Sequence[set[tuple[str, ...]]],
    postings: Mapping[tuple[str, ...], list[int]],
    weight: Mapping[tuple[str, ...], float],
    sizes: Sequence[float],
    size: float,
    threshold: float,
) -> int | None:
    """The earliest kept text whose weighted Jaccard similarity reaches the threshold."""
    lists = [postings[shingle] for shingle in found if shingle in postings]
    candidates = {index for posting in lists if len(posting) <= _LONG_POSTING for index in posting}
    for index in sorted(candidates):
        shared = math.fsum(weight[shingle] for shingle in found & shingles[index])
        if shared >= threshold * (size + sizes[index] - shared) - 1e-12:
            return index
    return None


def minhash_duplicates(
    texts: Sequence[str], threshold: float = 0.8, permutations: int = 128, seed: int = 0
) -> list[int | None]:
    """As `near_duplicates`, by MinHash: for each text the index of the earlier kept one that it repeats, or None.

    Signatures of `permutations` hashes find candidates in bands (a pair at `threshold` is missed with a probability
    under 1 in 1,000); the similarity of a candidate is then computed exactly, so what is dropped is truly that similar.

    >>> minhash_duplicates(["Ana has 3 cats.", "Bo runs 5 km a day.", "ana has 3 cats"])
    [None, None, 0]
    """
    check_threshold(threshold)
    rows = _rows_a_band(threshold, permutations)
    draws = np.random.default_rng(seed).integers(1, 2**63, size=(2, permutations), dtype=np.uint64)
    factors, offsets = draws[0] | np.uint64(1), draws[1]  # multiply-shift hashing wants odd factors
    shingles = [runs(tokens(text), 3) for text in texts]
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    result: list[int | None] = []
    for index, found in enumerate(shingles):
        hashes = np.array([_hash64(shingle) for shingle in found] or [0], dtype=np.uint64)
        with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant
            signature = ((hashes[:, None] * factors + offsets) >> np.uint64(32)).min(axis=0)
        bands = [(start, signature[start : start + rows].tobytes()) for start in range(0, permutations, rows)]
        candidates = sorted({other for band in bands for other in buckets.get(band, ())})
        repeated = next((other for other in candidates if _jaccard(found, shingles[other]) >= threshold), None)
        if repeated is None:
            for band in bands:
                buckets[band].append(index)
        result.append(repeated)
    return result


def _rows_a_band(threshold: float, permutations: int) -> int:
    """The longest bands (the fewest false candidates) that find a pair at `threshold` 999 times in 1,000."""
    fitting = [r for r in range(1, 33) if (1 - threshold**r) ** (permutations // r) <= 1e-3]
    return max(fitting, default=1)


def _hash64(shingle: tuple[str, ...]) -> int:
    return int.from_bytes(hashlib.blake2b(" ".join(shingle).encode(), digest_size=8).digest(), "big")


def _jaccard(a: set[tuple[str, ...]], b: set[tuple[str, ...]]) -> float:
    return len(a & b) / len(a | b) if a or b else 1.0
