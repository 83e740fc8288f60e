"""How long a model thinks: a forced length of its chain of thought, and a bias on the decision to end it.

`Budget` is budget forcing (s1, arXiv 2501.19393): past `most` tokens the answer is forced by the words that end
thinking, before `least` tokens those words are replaced by 'Wait'. `StopBias` moves the logit of the token that begins
them, or sets a temperature for that decision alone, and changes nothing else. Thinking ends at '</think>' where the
model has that token, else at 'The answer is'. Not covered: models whose end of thinking is a special token that
decoding leaves out, and training for a length.
"""

import math
import re
from bisect import bisect_left
from dataclasses import dataclass

from workbench.evaluation.asking import Answer, Ask
from workbench.models import LM
from workbench.tasks.answers import reopened

__all__ = ["Budget", "StopBias", "ending"]

THINK, SAID = "</think>", "The answer is"


def ending(lm: LM) -> str:
    """The words that end a model's thinking.

    >>> from workbench.models import load_model
    >>> ending(load_model("lab-small"))
    'The answer is'
    """
    return THINK if THINK in lm.tokenizer.get_vocab() and THINK not in lm.tokenizer.all_special_tokens else SAID


@dataclass
class _Chain:
    """A text on its way: token ids with the prompt's, how many of them are the prompt's, what became of it."""

    prompt: str
    ids: list[int]
    start: int
    ended: bool = False  # by its end token
    stopped: bool = False  # the words that end thinking were said
    forced: bool = False
    waits: int = 0

    @property
    def used(self) -> int:
        return len(self.ids) - self.start

    def text(self, lm: LM) -> str:
        return lm.tokenizer.decode(self.ids[self.start :], skip_special_tokens=True)

    def rewrite(self, lm: LM, said: str, cue: str) -> None:
        """Go on from what was said, with other words at its end."""
        said = said.rstrip()
        self.ids = lm.encode(self.prompt + said + (cue if said else cue.lstrip()))

    def thinking(self, lm: LM, end: str) -> int:
        """Tokens up to and with the words that end thinking; all, where they were not said."""

        def holds(length: int) -> bool:
            return end in lm.tokenizer.decode(self.ids[self.start : self.start + length], skip_special_tokens=True)

        return bisect_left(range(self.used), True, key=holds)


@dataclass(frozen=True)
class Budget:
    """Between `least` and `most` tokens of thinking; None for most leaves its end to the model.

    wait: what replaces an end that comes too early, at most `waits` times. end: the words that end thinking, where
    `ending` does not find them. The answer comes on top of the budget, up to the evaluation's limit in all. Facts:
    thinking (tokens up to and with the end), forced, waits.
    """

    most: int | None = None
    least: int = 0
    wait: str = "Wait"
    waits: int = 4
    end: str | None = None

    def __post_init__(self) -> None:
        if self.least < 0 or (self.most is not None and not max(self.least, 1) <= self.most):
            raise ValueError(f"least={self.least}, most={self.most}: give tokens with 0 <= least <= most, most from 1.")

    def solve(self, ask: Ask) -> list[Answer]:
        """See `evaluation.Solver`."""
        lm, end = ask.lm, self.end or ending(ask.lm)
        limit = min(self.most or ask.max_new_tokens, ask.max_new_tokens)
        prompts = [ask.prompt(row) for row in range(len(ask.rows))]
        chains = [_Chain(prompt, ids := lm.encode(prompt), len(ids)) for prompt in prompts]
        self._think(ask, chains, end, limit)
        facts = [{"thinking": chain.thinking(lm, end), "waits": chain.waits} for chain in chains]
        for chain in chains:
            if not (chain.ended or chain.stopped) and chain.used < ask.max_new_tokens:
                chain.rewrite(lm, chain.text(lm), f"\n{end}\n\n" if end == THINK else f" {end}")
                chain.forced = True
        open = [row for row, c in enumerate(chains) if not c.ended and c.used < ask.max_new_tokens]
        rest = [ask.max_new_tokens - chains[row].used for row in open]
        found = ask.generate([chains[row].ids for row in open], open, max_new_tokens=rest)
        for row, one in zip(open, found, strict=True):
            chains[row].ids = chains[row].ids + one.token_ids
        pairs = zip(chains, facts, strict=True)
        return [
            Answer(reopened(chain.prompt, chain.text(lm)), facts=fact | {"forced": chain.forced})
            for chain, fact in pairs
        ]

    def _think(self, ask: Ask, chains: list[_Chain], end: str, limit: int) -> None:
        """Thinking up to its end or the limit, made longer where it was too short.

        Only a chain that may have to go on is stopped at its end; others write their answer in the same breath.
        """
        stop = (end,) if self.least else ()
        open = list(range(len(chains)))
        while open:
            rest = [limit - chains[row].used for row in open]
            found = ask.generate([chains[row].ids for row in open], open, max_new_tokens=rest, stop=stop)
            again = []
            for row, one in zip(open, found, strict=True):
                chain, before = chains[row], chains[row].text(ask.lm)
                chain.ids = chain.ids + one.token_ids
                chain.stopped = end in chain.text(ask.lm)[len(before) :]
                chain.ended = one.finished and not (stop and chain.stopped)
                if (chain.stopped or chain.ended) and chain.used < self.least and chain.waits < self.waits:
                    chain.rewrite(ask.lm, before + one.text, f" {self.wait}")
                    chain.waits, chain.stopped, chain.ended = chain.waits + 1, False, False
                    if chain.used < limit:
                        again.append(row)
            open = again


@dataclass(frozen=True)
class StopBias:
    """Move the decision to end thinking, until it was taken: `bias` nats, or a temperature of that decision alone.

    bias: added to the logit of the token that begins the end; above 0 the model comes to its answer earlier, below 0
    later. decision: temperature; the odds of ending now become their 1/decision-th power, so that above 1 an end that
    is unlikely comes sooner and a likely one less surely. 0 and 1 change nothing. temperature: of sampling. The token
    may mean something else: 'The' is also how another sentence begins. ends: the words that end thinking, where
    `ending` does not find them; the first tokens of all are moved, which matters below 0, where a model takes another
    way to say it. Facts: finished.
    """

    bias: float = 0.0
    temperature: float = 0.0
    ends: tuple[str, ...] = ()
    decision: float = 1.0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and 0 < self.decision < math.inf and math.isfinite(self.bias)):
            raise ValueError(
                f"bias={self.bias}, decision={self.decision}, temperature={self.temperature}: give a finite bias, a "
                "finite decision above 0, and a temperature from 0."
            )

    def solve(self, ask: Ask) -> list[Answer]:
        """See `evaluation.Solver`."""
        rows = range(len(ask.rows))
        bias = {first_token(ask.lm, end): self.bias for end in self.ends or (ending(ask.lm),)}
        prompts = [ask.prompt(row) for row in rows]
        found = ask.generate(prompts, rows, temperature=self.temperature, bias=bias, bias_temperature=self.decision)
        texts = [reopened(*each) for each in zip(prompts, (one.text for one in found), strict=True)]
        return [Answer(text, facts={"finished": one.finished}) for text, one in zip(texts, found, strict=True)]


def first_token(lm: LM, words: str) -> int:
    """The token by which words begin behind the end of a sentence; white space alone does not count.

    >>> from workbench.models import load_model
    >>> lm = load_model("lab-small")
    >>> lm.tokenizer.decode([first_token(lm, "The answer is")])
    ' The'
    """
    ids = lm.encode(f". {words}")[1:]
    return next((token for token in ids if re.search(r"[^\s▁Ġ.]", lm.tokenizer.decode([token]))), ids[-1])
