"""Zero-shot chain of thought as its paper asks: the answer is begun for the model, then the result is asked for.

Kojima et al., arXiv 2205.11916: first the chain behind a trigger, then, behind question and chain, the words that
introduce the answer. The paper's words for numbers, "the answer (arabic numerals) is", aren't read as a statement by
`tasks.answers`, so the default leaves the brackets out. Two calls a question. For a wording in the user's turn, in one
call: `prompts.zero_shot`.
"""

from dataclasses import dataclass

from workbench.evaluation.asking import Answer, Ask, begun
from workbench.tasks.answers import reopened, this_turn


@dataclass(frozen=True)
class ThinkThenAnswer:
    """Chain behind `trigger`, then at most `answer_tokens` behind `conclusion`."""

    trigger: str = "Let's think step by step."
    conclusion: str = "Therefore, the answer is"
    answer_tokens: int = 32

    def solve(self, ask: Ask) -> list[Answer]:
        """See `Solver`. The text is the whole answer: trigger, chain, conclusion. Facts: `finished`, of the chain."""
        places = range(len(ask.rows))
        prompts = [ask.prompt(place) for place in places]
        started = [begun(ask.lm, prompt, self.trigger) for prompt in prompts]
        chains = ask.generate(started, places)
        middles = []
        for prompt, chain in zip(prompts, chains, strict=True):
            whole = this_turn(self.trigger + chain.text).rstrip()  # a model without a template asks itself the next one
            seen = reopened(prompt, whole)
            thinking = seen.count("<think>") > seen.count("</think>")  # the answer must stand outside of the thoughts
            middles.append(whole + ("\n</think>\n\n" if thinking else "\n") + self.conclusion)
        leads = [text.removesuffix(self.trigger) for text in started]
        continued = [lead + middle for lead, middle in zip(leads, middles, strict=True)]
        ends = ask.generate(continued, places, max_new_tokens=self.answer_tokens, draws=[1] * len(prompts))
        return [
            Answer(reopened(prompt, middle + end.text.rstrip()), facts={"finished": chain.finished, "prompt": prompt})
            for prompt, middle, end, chain in zip(prompts, middles, ends, chains, strict=True)
        ]
