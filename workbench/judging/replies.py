"""What a judge said: read from its text, or from the log-probabilities of the few words it may say.

Reading the probabilities works with models that are too small to keep to a format, and needs a loaded model. Texts are
read strictly: a reply that names several verdicts and marks none of them is unparsed, never guessed.
"""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from workbench.files import content_key

if TYPE_CHECKING:
    from workbench.interventions import Intervention
    from workbench.models import LM
    from workbench.served import Served

BATCH = 16  # prompts of one scoring forward
_MARKED = (
    r"\[\[\s*((?i:A|B|C|tie))\s*\]\]",
    # "verdict: B", "the better answer is **Answer B**"; a small a is an article, but for at the end of a line
    r"(?im:(?:answer|verdict|winner|choice|better(?: one)?)[*_]*\s*(?:\bis|:)\s*[*_\s]*(?:answer\s+)?\(?)"
    r"((?i:tie)|[AB]|(?m:[ab](?=\W*$)))(?![\w'’])",
)
_WHOLE = r"(?<![\d.,])(\d+)(?![\d.,]*\d)"  # no part of 4.5
_GRADE = (
    rf"\[\[\s*{_WHOLE}\s*\]\]()",
    rf"(?:score|grade|rating)[*_]*\s*(?:is|:|=)?\s*[*_]*{_WHOLE}(?:\s*/\s*(\d+))?",
    rf"{_WHOLE}\s*/\s*(\d+)",
)


def read_choice(text: str) -> str | None:
    """'A', 'B' or 'tie' as the last marked verdict of a reply, or as the only one that it names; else None.

    >>> [read_choice(text) for text in ("B", "[[A]]", "A is longer, but the verdict: B", "A or B?", "tie.", "")]
    ['B', 'A', 'B', None, 'tie', None]
    >>> read_choice("Answer B is better than answer A."), read_choice("The answer is a matter of taste: B")
    (None, 'B')
    """
    for pattern in _MARKED:
        if marked := re.findall(pattern, text):
            return {"A": "A", "B": "B"}.get(marked[-1].upper(), "tie")
    named = set(re.findall(r"\b(A|B)\b(?!')", text)) | {word.lower() for word in re.findall(r"(?i)\b(tie)\b", text)}
    bare = re.fullmatch(r"\W*(?:answer\s+)?([AB]|tie)\W*", text, re.IGNORECASE)
    if bare:
        return {"A": "A", "B": "B"}.get(bare[1].upper(), "tie")
    return named.pop() if len(named) == 1 else None


def read_grade(text: str, scale: Sequence[int]) -> int | None:
    """The last marked grade of a reply, or the only number in it, if it is on the scale; else None.

    A grade out of something counts where that is the end of the scale, a broken number never.

    >>> [read_grade(text, range(1, 6)) for text in ("4", "Score: 2", "3/5", "7", "1 or 2", "[[5]] of 9")]
    [4, 2, 3, None, None, 5]
    >>> [read_grade(text, range(1, 6)) for text in ("4.5/5", "Score: 4.5", "4/10", "4 / 5")]
    [None, None, None, 4]
    """
    for pattern in _GRADE:
        if marked := re.findall(pattern, text, re.IGNORECASE):
            grade, most = marked[-1]
            return int(grade) if int(grade) in scale and most in ("", str(max(scale))) else None
    numbers = set(re.findall(r"\d+(?:[.,]\d+)*", text))
    return int(min(numbers)) if len(numbers) == 1 and min(numbers) in map(str, scale) else None


def by_text(
    lm: "LM | Served", prompts: Sequence[Any], change: "Intervention | None", max_new_tokens: int
) -> list[dict[str, Any]]:
    """Greedy replies: text, tokens_in, tokens_out. A served model takes no interventions (refused by the caller).

    The text begins with the thinking block, where the model's template opens one.
    """
    from workbench.models import LM
    from workbench.tasks.answers import reopened

    extra: dict[str, Any] = {} if change is None else {"interventions": change}
    asked = [lm.render(prompt) for prompt in prompts] if isinstance(lm, LM) else list(prompts)
    found = lm.generate(asked, max_new_tokens=max_new_tokens, **extra)
    return [
        {
            "text": reopened(prompt, reply.text) if isinstance(prompt, str) else reply.text,
            "tokens_in": reply.tokens_in,
            "tokens_out": reply.tokens_out,
        }
        for prompt, reply in zip(asked, found, strict=True)
    ]


def by_letters(
    lm: "LM", prompts: Sequence[Any], change: "Intervention | None", words: Sequence[str]
) -> list[dict[str, Any]]:
    """scores: natural log of the probability of each word after the prompt, summed over its tokens.

    Behind a prompt that no chat template ended a word stands after a space, as the model would write it.
    """
    from contextlib import nullcontext

    import torch

    from workbench.evaluation.asking import following
    from workbench.interventions.trained import Answered, log_likelihood

    heads = [lm.encode(prompt) for prompt in prompts]
    rows = [
        Answered(head, following(lm, lm.render(prompt), word))
        for prompt, head in zip(prompts, heads, strict=True)
        for word in words
    ]
    order = sorted(range(len(rows)), key=lambda number: len(rows[number].prompt))
    scores = [0.0] * len(rows)
    while order:
        # edits of the cache need prompts that end in one column: rows of one length together
        length = len(rows[order[0]].prompt)
        here = [number for number in order[:BATCH] if change is None or len(rows[number].prompt) == length]
        order = order[len(here) :]
        batch = [rows[number] for number in here]
        inside = nullcontext() if change is None else lm.apply(change, prompt_lengths=[length] * len(batch))
        with torch.no_grad(), inside:
            for number, score in zip(here, log_likelihood(lm, batch).tolist(), strict=True):
                scores[number] = score
    width = len(words)
    found = [dict(zip(words, scores[start : start + width], strict=True)) for start in range(0, len(scores), width)]
    return [{"scores": row, "tokens_in": len(head), "tokens_out": 0} for row, head in zip(found, heads, strict=True)]


def best(scores: dict[str, float]) -> str | None:
    """The likeliest word; None where two are exactly as likely or a score is no number.

    >>> best({"A": -1.0, "B": -2.0}), best({"A": -1.0, "B": -1.0})
    ('A', None)
    """
    if any(math.isnan(value) for value in scores.values()):
        return None
    top = max(scores.values())
    winners = [word for word, value in scores.items() if value == top]
    return winners[0] if len(winners) == 1 else None


def expected_grade(scores: dict[str, float]) -> float:
    """Mean of the grades, each weighted by its probability among the grades.

    >>> round(expected_grade({"1": 0.0, "3": 0.0}), 3)
    2.0
    """
    top = max(scores.values())
    weights = {word: math.exp(value - top) for word, value in scores.items()}
    return sum(int(word) * weight for word, weight in weights.items()) / sum(weights.values())


def check_judge(lm: Any, by: str, change: Any) -> None:
    """Refuse what a served model can't do, and unknown ways of reading a verdict."""
    from workbench.served import Served

    if by not in ("text", "letters"):
        raise ValueError(
            f"by={by!r} is not known. Use 'text' (what the judge writes) or 'letters' (log-probabilities)."
        )
    if isinstance(lm, Served) and (by == "letters" or change is not None):
        what = "by='letters' needs log-probabilities" if by == "letters" else "interventions need its layers"
        raise ValueError(
            f"{lm.name!r} is served: {what}. Judge with by='text' and no interventions, or load it: load_model(...)."
        )


def identity(lm: Any, change: Any) -> dict[str, Any]:
    """What a judge's verdicts depend on, apart from its prompts: plain data for the settings of a file."""
    from workbench.evaluation import fingerprint
    from workbench.evaluation.conditions import around
    from workbench.models import LM

    # the change is hashed once more: sums of several parts would make a long line
    changed = "none" if change is None else content_key(change=fingerprint(change))[:12]
    found = {"judge": lm.name, "revision": lm.revision, "interventions": changed}
    if isinstance(lm, LM):  # a server tells neither
        found["precision"] = [lm.reasons.get("quantization", ""), str(lm.model.dtype)]
        found["around"] = content_key(applied=around(lm))[:12]
    return found


def without_special(lm: Any, text: str) -> str:
    """The text with the judge's special tokens broken up, so that an answer can't end its own turn."""
    from workbench.served import Served

    tokenizer = None if isinstance(lm, Served) else getattr(lm, "tokenizer", None)  # a server keeps its own
    for token in getattr(tokenizer, "all_special_tokens", ()):
        if len(token) > 1:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text
