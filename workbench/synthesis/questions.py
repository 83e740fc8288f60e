"""Recipes that make their own questions: drawn from the model, after examples, by rewriting, or from a text file.

A made question has no gold answer. In `magpie`, `self_instruct` and `evolve` the answer that most samples give stands
in for it (self-consistency, arXiv 2203.11171), which is agreement and not truth: records say `"by": "agreement"`. In
`from_corpus` a quote has to be in the passage word for word (`corpus`), and the answer is unchecked. One row of the
task stands for one draw: its id makes the seeds, so that no draw depends on another. Repeats among made questions are
found by `overlap`, when all are there. A draw that fails keeps its reason in the attempt's `dropped`.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from workbench.prompts import examples_for
from workbench.synthesis.corpus import located, parsed, passages
from workbench.synthesis.overlap import tokens
from workbench.synthesis.roles import Role, written
from workbench.synthesis.sampling import NOTHING, Attempt, Row, Settings, attempt_of, row_seed, sampled, spent
from workbench.synthesis.sampling import tokens_of as counted
from workbench.tasks.verifiers import extract

if TYPE_CHECKING:
    from workbench.generate import Generation
    from workbench.models import LM
    from workbench.prompts import Message
    from workbench.tasks import Task

MARK = "QmarkQ"  # stands for the user's words while the template is read
OPERATORS = {
    "constrain": "Add one more condition to this question.",
    "deepen": "Change this question so that it takes more knowledge to answer.",
    "reason": "Change this question so that it takes one more step of reasoning to answer.",
    "concretise": "Replace the general words of this question by more concrete ones.",
    "broaden": "Write a new and rarer question of the same subject, as long and as hard as this one.",
}  # after the operators of WizardLM, in words of our own
REWRITER = Role("{operator} Reply with the new question alone.\n\nQuestion: {question}")
MORE = Role("Here are some questions:\n\n{list}\n\nWrite one more of their kind. Reply with the question alone.")
READER = Role(
    "Read this passage.\n\n{passage}\n\nWrite a question that the passage answers, the answer, and the words of the "
    "passage that show it, copied exactly, in three lines:\nQuestion: ...\nAnswer: ...\nQuote: ..."
)


@dataclass(frozen=True)
class Draft:
    """A made question: `dropped` says why it will not be asked, `about` where it comes from."""

    row: Row
    cost: dict[str, int]
    dropped: str | None = None
    about: dict[str, Any] = field(default_factory=dict)


def magpie(
    lm: "LM",
    task: "Task",
    rows: list[Row],
    settings: Settings,
    *,
    prefix: str | None = None,
    agree: float = 0.5,
    temperature: float = 1.0,
) -> list[Attempt]:
    """Let the model write the user's turn, then answer it (Magpie, arXiv 2406.08464).

    prefix: text after which the model writes a question; None takes what the chat template puts before a user's words.
    temperature: of the questions; that of the answers is in `settings`. agree: a sample counts as right when it gives
    the one commonest answer and at least this share of the samples does.
    """
    majority((), agree)  # tells a wrong share before any work
    start, stop = user_prefix(lm)
    made = _drawn(lm, rows, [start if prefix is None else prefix] * len(rows), stop, settings, temperature)
    drafts = [_draft(lm, task, row, "magpie", settings, *found) for row, found in zip(rows, made, strict=True)]
    return _answered(lm, task, rows, drafts, settings, agree)


def self_instruct(
    lm: "LM",
    task: "Task",
    rows: list[Row],
    settings: Settings,
    *,
    shots: int = 3,
    show: Literal["turns", "list"] = "turns",
    agree: float = 0.5,
    temperature: float = 1.0,
) -> list[Attempt]:
    """New questions after `shots` of the task's own, then answered as in `magpie` (Self-Instruct, arXiv 2212.10560).

    show: 'turns' puts the examples, answered in `settings.style`, before the bare user's turn, which needs no
    obedience; 'list' asks for one more question like those in a list. The examples are tuning rows, chosen by a hash
    of the row's id; a question that repeats one of them is dropped.
    """
    if show not in ("turns", "list"):
        raise ValueError(f"show={show!r} is not known. Use 'turns' or 'list'.")
    majority((), agree)
    seeds = [examples_for(task, row, shots) for row in rows]
    if show == "turns":
        starts = [user_prefix(lm, _exchanges(examples, settings.style)) for examples in seeds]
        made = _drawn(lm, rows, [start for start, _ in starts], user_prefix(lm)[1], settings, temperature)
    else:
        parts = [{"list": "\n".join(f"- {each['question']}" for each in examples)} for examples in seeds]
        names = [f"{row['id']}/question" for row in rows]
        made = [_read(lm, g) for g in written(lm, MORE, names, parts, replace(settings, temperature=temperature))]
    drafts = []
    for row, found, examples in zip(rows, made, seeds, strict=True):
        draft = _draft(lm, task, row, "self_instruct", settings, *found)
        drafts.append(not_among([each["question"] for each in examples], draft, "repeats a seed question"))
    return _answered(lm, task, rows, drafts, settings, agree)


def evolve(
    lm: "LM",
    task: "Task",
    rows: list[Row],
    settings: Settings,
    *,
    operators: Mapping[str, str] = OPERATORS,
    writer: Role = REWRITER,
    agree: float = 0.5,
    temperature: float = 1.0,
) -> list[Attempt]:
    """Rewrite each row's question by one operator, then answer it as in `magpie` (WizardLM, arXiv 2304.12244).

    operators: name -> instruction; which one a row gets is drawn from its id. Kept are questions that changed and
    whose answers agree. The writer may be another model, or an adapter that learnt to rewrite.
    """
    if not operators:
        raise ValueError(f"operators is empty. Give one or more, such as {{'reason': {OPERATORS['reason']!r}}}.")
    majority((), agree)
    names = sorted(operators)
    chosen = [names[row_seed(settings.seed, f"{row['id']}/operator", 0) % len(names)] for row in rows]
    parts = [{"operator": operators[name], "question": row["question"]} for name, row in zip(chosen, rows, strict=True)]
    own = replace(settings, temperature=temperature)
    drafts = []
    made = written(lm, writer, [f"{row['id']}/question" for row in rows], parts, own)
    for row, name, generation in zip(rows, chosen, made, strict=True):
        draft = _draft(lm, task, row, "evolve", settings, *_read(writer.lm or lm, generation))
        draft = replace(draft, about={"operator": name, "from": str(row["id"])})
        drafts.append(not_among([row["question"]], draft, "unchanged question"))
    return _answered(lm, task, rows, drafts, settings, agree)


def from_corpus(
    lm: "LM",
    task: "Task",
    rows: list[Row],
    settings: Settings,
    *,
    corpus: Path,
    longest: int = 1200,
    writer: Role = READER,
    context: bool = True,
) -> list[Attempt]:
    """Questions about passages of a text file, each with an answer and a quote that the passage holds word for word.

    Each row gets one passage by its id and `settings.samples` tries, each an attempt of its own. A try without three
    labelled parts, or whose quote is not in the passage, is dropped. That the quote supports the answer is not checked.
    corpus: a UTF-8 file; longest: characters of a passage (`corpus.passages`). context: put the passage before the
    question in the record; without it, the record asks what the model should know by heart.
    """
    from workbench.served import Served

    found = passages(Path(corpus), longest)
    picked = [found[row_seed(settings.seed, f"{row['id']}/passage", 0) % len(found)] for row in rows]
    asked = [(row, passage, k) for row, passage in zip(rows, picked, strict=True) for k in range(settings.samples)]
    parts = [{"passage": passage.text} for _, passage, _ in asked]
    made = written(lm, writer, [f"{row['id']}/{k}/question" for row, _, k in asked], parts, settings)
    attempts = []
    for (row, passage, k), part, generation in zip(asked, parts, made, strict=True):
        text = parsed(generation.text)
        span = located(passage.text, text["quote"]) if text else None
        why = "no question, answer and quote" if text is None else None if span else "quote is not in the passage"
        why = why or (None if generation.finished else "unfinished question")
        question = text["question"] if text else generation.text.strip()
        new = {"id": f"{row['id']}/corpus/{k}", "answer": text["answer"] if text else ""}
        new["question"] = f"{passage.text}\n\n{question}" if context else question
        sample = _sample(generation, new["answer"] or NOTHING) | {"correct": why is None, "by": "quote"}
        if why is None and not isinstance(lm, Served):  # a server says no tokens: there it is all that was written
            sample["tokens_out"] = counted(lm, new["answer"])
        about: dict[str, Any] = {"file": Path(corpus).name, "passage": passage.number}
        if text and span:
            about |= {"span": [passage.start + end for end in span], "quote": text["quote"]}
        prompt = lm.render([{"role": "user", "content": writer.fill(**part)}])
        draft = Draft(new, spent([generation]), why, about)
        attempts.append(_attempt(task, draft, prompt, [sample]))
    return attempts


def user_prefix(lm: "LM", before: "Sequence[Message]" = ()) -> tuple[str, tuple[str, ...]]:
    """What a prompt holds up to a user's words, after `before`; and the plain text, if any, that ends those words.

    Special tokens that end a turn are no text; `magpie` cuts at them by itself. Raises ValueError where the template
    does not show the user's words as they are.
    """
    text = lm.render([*before, {"role": "user", "content": MARK}])
    if text.count(MARK) != 1:
        raise ValueError(
            f"The chat template of {lm.name!r} shows the user's words {text.count(MARK)} times, so what comes before "
            "them is not known. Give it: functools.partial(magpie, prefix='...')."
        )
    start, after = text.split(MARK)
    ends = [at for token in lm.tokenizer.all_special_tokens if (at := after.find(token)) >= 0]
    plain = after[: min(ends, default=len(after))].strip()
    return start, (plain.splitlines()[0],) if plain else ()


def majority(answers: Sequence[str | None], agree: float = 0.5) -> str | None:
    """The one commonest answer when at least the share `agree` of all gave it; None where two are as common.

    >>> majority(["4", "4", None, "5"]), majority(["4", "5"]), majority(["4", None, None])
    ('4', None, None)
    """
    if not 0 < agree <= 1:
        raise ValueError(f"agree={agree} is no share. Give a number above 0 and at most 1, such as 0.5.")
    ranked = Counter(answer for answer in answers if answer is not None).most_common(2)
    tie = len(ranked) == 2 and ranked[0][1] == ranked[1][1]
    return ranked[0][0] if ranked and not tie and ranked[0][1] >= agree * len(answers) else None


def _exchanges(examples: Sequence[Row], style: str) -> "list[Message]":
    turns = []
    for each in examples:
        answer = each.get("solutions", {}).get(style) or str(each["answer"])
        turns += [{"role": "user", "content": each["question"]}, {"role": "assistant", "content": answer}]
    return turns


Made = tuple[str, bool, dict[str, int]]  # a question, whether it came to its end, what it cost


def _drawn(
    lm: "LM", rows: list[Row], prompts: list[str], stop: tuple[str, ...], settings: Settings, temperature: float
) -> list[Made]:
    """What the model writes in the user's place, one text a row."""
    seeds = [row_seed(settings.seed, f"{row['id']}/question", 0) for row in rows]
    found = lm.generate(
        prompts, None, settings.max_new_tokens, temperature=temperature, top_p=settings.top_p, seed=seeds,
        batch_size=settings.batch_size, stop=stop,
    )  # fmt: skip
    return [_read(lm, generation, stop) for generation in found]


def _read(lm: "LM", generation: "Generation", stop: tuple[str, ...] = ()) -> Made:
    """The text up to the first special token: a template may end a turn with one that does not end a generation."""
    ids, special = generation.token_ids, set(lm.tokenizer.all_special_ids)
    end = next((place for place, token in enumerate(ids) if token in special), None)
    text = generation.text if end is None else str(lm.tokenizer.decode(ids[:end], skip_special_tokens=True))
    for word in stop:
        text = text.split(word, 1)[0]
    return " ".join(text.split()), generation.finished or end is not None, spent([generation])


def _draft(
    lm: "LM", task: "Task", row: Row, name: str, settings: Settings, text: str, finished: bool, cost: dict[str, int]
) -> Draft:
    """A question with the reason for which it can't be asked, if there is one; its answer's form is the row's."""
    new = {"id": f"{row['id']}/{name}", "question": text, "answer": ""}
    why = None if finished else "unfinished question"
    why = why if tokens(text) else "empty question"
    limit = getattr(lm.model.config.get_text_config(), "max_position_embeddings", None)
    if why is None and limit is not None:
        size = len(lm.encode(task.messages(new, settings.strategy))) + settings.max_new_tokens
        why = "question too long for the model" if size > limit else None
    return Draft(new, cost, why)


def not_among(known: Sequence[str], draft: Draft, why: str) -> Draft:
    """The draft, dropped where its words are those of a known question."""
    same = any(tokens(draft.row["question"]) == tokens(text) for text in known)
    return replace(draft, dropped=why) if same and draft.dropped is None else draft


def _answered(
    lm: "LM", task: "Task", rows: list[Row], drafts: list[Draft], settings: Settings, agree: float
) -> list[Attempt]:
    """The drafts' questions answered `settings.samples` times each; what most say stands for the right answer."""
    asked = [draft.row for draft in drafts if draft.dropped is None]
    prompts = [lm.render(task.messages(row, settings.strategy)) for row in asked]
    answers = iter(zip(prompts, sampled(lm, asked, prompts, settings), strict=True))
    attempts = []
    for row, draft in zip(rows, drafts, strict=True):
        if draft.dropped is not None:
            nothing = {"text": NOTHING, "correct": False, "extracted": None, "tokens_in": 0, "tokens_out": 0}
            attempts.append(_attempt(task, draft, "", [nothing | {"finished": False, "by": "agreement"}]))
            continue
        prompt, found = next(answers)
        read = [extract(task.kind, g.text, row["answer"]) if g.finished else None for g in found]
        best = majority(read, agree)
        share = round(read.count(best) / len(read), 3) if best is not None else 0.0
        samples = [
            _sample(g, g.text.strip()) | {"correct": best is not None and said == best, "extracted": said,
                                          "by": "agreement", "share": share}
            for g, said in zip(found, read, strict=True)
        ]  # fmt: skip
        cost = {name: n + draft.cost[name] for name, n in spent(found).items()}
        why = None if best is not None else "no agreement between answers"
        solved = replace(draft, row=draft.row | {"answer": best or ""}, cost=cost, dropped=why)
        attempts.append(_attempt(task, solved, prompt, samples))
    return attempts


def _sample(generation: "Generation", text: str) -> dict[str, Any]:
    return {
        "text": text, "correct": False, "extracted": None, "tokens_in": generation.tokens_in,
        "tokens_out": generation.tokens_out, "finished": generation.finished,
    }  # fmt: skip


def _attempt(task: "Task", draft: Draft, prompt: str, samples: list[dict[str, Any]]) -> Attempt:
    attempt = attempt_of(draft.row, task, prompt, samples) | {"cost": draft.cost}
    attempt |= {"source": draft.about} if draft.about else {}
    return attempt | ({"dropped": draft.dropped} if draft.dropped is not None else {})


__all__ = ["evolve", "from_corpus", "magpie", "self_instruct"]
