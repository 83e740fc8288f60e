"""A second turn in which the model is asked to look at its answer again, with or without being told that it is wrong.

Without an outside verifier reviewing does not help reasoning (Huang et al., arXiv 2310.01798). With verifier='exact'
the gold answer decides which answers are asked about: an upper bound, no method that could be used, because right
answers are never touched. Not covered: a model as the verifier, critiques in words (Self-Refine, arXiv 2303.17651).
"""

from dataclasses import dataclass

from workbench.evaluation.asking import Answer, Ask
from workbench.evaluation.judging import judge
from workbench.prompts import Message
from workbench.tasks.answers import final_text, reopened

__all__ = ["Correct"]

REVIEW = "Review your answer and correct it. Then give the final answer."
WRONG = "Your answer is wrong. Answer the question again."


@dataclass(frozen=True)
class Correct:
    """Ask `rounds` times for a corrected answer, each in the same chat behind all earlier turns; 0 is plain.

    verifier: None reviews every answer each round, 'exact' only those that are wrong, which it knows from the gold
    answer. words: what is said instead of the module's own. Facts: first_correct, right_to_wrong, wrong_to_right (the
    first answer against the last, by the task's verifier), changed (another answer was read), asked (rounds used). The
    first answer is the row's sample.
    """

    rounds: int = 1
    verifier: str | None = None
    words: str | None = None
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if self.rounds < 0 or self.temperature < 0 or self.verifier not in (None, "exact"):
            raise ValueError(
                f"rounds={self.rounds}, verifier={self.verifier!r}, temperature={self.temperature}: rounds and "
                "temperature are 0 or more, verifier is None or 'exact'."
            )

    def solve(self, ask: Ask) -> list[Answer]:
        """See `evaluation.Solver`."""
        rows = range(len(ask.rows))
        chats = [ask.messages(row) for row in rows]
        texts = _said(ask, chats, list(rows), 0.0, 0)
        first, asked = list(texts), [0] * len(texts)
        words = self.words or (REVIEW if self.verifier is None else WRONG)
        verdicts = before = [judge(ask.task, row, text)[0] for row, text in zip(ask.rows, texts, strict=True)]
        for number in range(1, self.rounds + 1):
            open = [row for row in rows if self.verifier is None or not verdicts[row].correct]
            for row in open:
                said = {"role": "assistant", "content": final_text(texts[row])}  # this turn alone, without thoughts
                chats[row] = [*chats[row], said, {"role": "user", "content": words}]
                asked[row] = number
            found = _said(ask, [chats[row] for row in open], open, self.temperature, number)
            for row, text in zip(open, found, strict=True):
                texts[row] = text
            verdicts = [judge(ask.task, row, text)[0] for row, text in zip(ask.rows, texts, strict=True)]
        answers = []
        for row, (old, new) in enumerate(zip(before, verdicts, strict=True)):
            facts = {"first_correct": old.correct, "changed": old.extracted != new.extracted, "asked": asked[row]}
            facts |= {"right_to_wrong": old.correct and not new.correct}
            facts |= {"wrong_to_right": new.correct and not old.correct}
            answers.append(Answer(texts[row], samples=(first[row],), facts=facts))
        return answers


def _said(ask: Ask, chats: list[list[Message]], rows: list[int], temperature: float, number: int) -> list[str]:
    """Answers to chats, with the thinking block that a prompt opened."""
    prompts = [ask.lm.render(chat) for chat in chats]
    found = ask.generate(prompts, rows, temperature=temperature, draws=[number] * len(rows))
    return [reopened(prompt, one.text) for prompt, one in zip(prompts, found, strict=True)]
