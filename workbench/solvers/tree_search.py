"""Search over steps of reasoning with a small budget: Monte-Carlo tree search, and beams of steps.

A node is the beginning of an answer, a child has one step more; a step ends at words such as '. ' or a line break.
Selection is UCT (Kocsis and Szepesvari 2006); as in RAP (arXiv 2305.14992) no gold answer and no trained value is used:
a rollout is worth the share of the question's rollouts that end in its answer, or how likely the model finds it. All
questions search side by side: a simulation is one batch of steps and one of rollouts. Not covered: models that judge
steps.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from workbench.evaluation.asking import Answer, Ask
from workbench.evaluation.judging import judge
from workbench.evaluation.stored import ballot
from workbench.models import end_tokens
from workbench.tasks.answers import reopened

__all__ = ["StepBeam", "TreeSearch"]


@dataclass(eq=False)
class _Node:
    """The beginning of an answer; `over` when nothing can follow. rollouts: numbers of those that went through it."""

    ids: list[int]
    depth: int = 0
    over: bool = False
    visits: int = 0
    children: list["_Node"] = field(default_factory=list)
    rollouts: list[int] = field(default_factory=list)


@dataclass(eq=False)
class _Tree:
    """One question's search. draws: samples taken so far, which number its random streams."""

    prompt: str
    root: _Node
    draws: int = 0
    texts: list[str] = field(default_factory=list)
    answers: list[str | None] = field(default_factory=list)
    sure: list[float] = field(default_factory=list)

    def worth(self, rollout: int) -> float:
        """Between 0 and 1: by the model's own likelihood, where that was read, else by agreement."""
        if self.sure:
            return self.sure[rollout]
        answer = self.answers[rollout]
        return 0.0 if answer is None else self.answers.count(answer) / len(self.answers)

    def path(self, explore: float) -> list[_Node]:
        """From the root to a node without children, by the upper confidence bound; an unvisited child comes first."""
        path = [self.root]
        while path[-1].children:
            here = path[-1]

            def bound(child: _Node, total: float = math.log(max(here.visits, 1))) -> float:
                if not child.visits:
                    return math.inf
                mean = sum(map(self.worth, child.rollouts)) / len(child.rollouts)
                return mean + explore * math.sqrt(total / child.visits)

            path.append(max(here.children, key=bound))
        return path

    def best(self, choose: str) -> int:
        """The rollout that answers: of the whole tree, or through the most visited children."""
        node = self.root
        while choose == "visits" and any(child.visits for child in node.children):
            node = max(node.children, key=lambda child: child.visits)
        return max(dict.fromkeys(node.rollouts), key=self.worth)


def _check_temperature(temperature: float, branching: int) -> None:
    if not temperature >= 0 or branching > 1 and temperature == 0:
        raise ValueError(
            f"temperature={temperature} with branching={branching}: give a temperature above 0, else all steps behind "
            "a beginning are the same; 0 with branching=1."
        )


@dataclass(frozen=True)
class TreeSearch:
    """Monte-Carlo tree search: `simulations` rollouts a question, nodes with up to `branching` sampled steps.

    depth: steps below which no node is expanded. step: the words that end a step. value: 'consistency' or 'likelihood'
    (the geometric mean probability a token). choose: the answer of the most visited path ('visits') or the best valued
    rollout ('value', a vote under 'consistency'). Facts: nodes, answers (different ones), worth. All rollouts are the
    row's samples. A node is expanded when it is reached a second time, the root at once.
    """

    simulations: int = 8
    branching: int = 3
    depth: int = 6
    temperature: float = 0.7
    explore: float = 0.5
    step: str = ". "
    value: str = "consistency"
    choose: str = "visits"

    def __post_init__(self) -> None:
        if min(self.simulations, self.branching, self.depth) < 1 or not self.step:
            raise ValueError(
                f"simulations={self.simulations}, branching={self.branching}, depth={self.depth}, step={self.step!r}: "
                "give numbers from 1, and the words that end a step."
            )
        if self.value not in ("consistency", "likelihood") or self.choose not in ("visits", "value"):
            raise ValueError(
                f"value={self.value!r}, choose={self.choose!r}: value is 'consistency' or 'likelihood', choose is "
                "'visits' or 'value'."
            )
        _check_temperature(self.temperature, self.branching)

    def solve(self, ask: Ask) -> list[Answer]:
        """See `evaluation.Solver`."""
        prompts = [ask.prompt(row) for row in range(len(ask.rows))]
        starts = [ask.lm.encode(prompt) for prompt in prompts]
        trees = [_Tree(prompt, _Node(start)) for prompt, start in zip(prompts, starts, strict=True)]
        for _ in range(self.simulations):
            paths = [tree.path(self.explore) for tree in trees]
            self._expand(ask, trees, paths, starts)
            self._roll_out(ask, trees, paths, starts)
        answers = []
        for tree in trees:
            best = tree.best(self.choose)
            facts: dict[str, Any] = {"nodes": _count(tree.root), "answers": len(set(tree.answers) - {None})}
            facts |= {"worth": round(tree.worth(best), 6)}
            answers.append(Answer(tree.texts[best], samples=tuple(tree.texts), facts=facts))
        return answers

    def _expand(self, ask: Ask, trees: list[_Tree], paths: list[list[_Node]], starts: list[list[int]]) -> None:
        """Sample the steps that follow the paths' ends, and go on to the first."""
        ends = [path[-1] for path in paths]
        grown = [
            place
            for place, end in enumerate(ends)
            if not end.over and end.depth < self.depth and (end.visits or not end.depth)
        ]
        places = [place for place in grown for _ in range(self.branching)]
        found = _go_on(ask, trees, places, [ends[place].ids for place in places], starts, self.temperature, self.step)
        for place, (ids, over) in zip(places, found, strict=True):
            if all(child.ids != ids for child in ends[place].children):
                ends[place].children.append(_Node(ids, ends[place].depth + 1, over))
        for place in grown:
            paths[place].append(ends[place].children[0])

    def _roll_out(self, ask: Ask, trees: list[_Tree], paths: list[list[_Node]], starts: list[list[int]]) -> None:
        """Finish the answers that the paths begin, and tell every node on them; a finished one is not asked again."""
        open = [place for place, path in enumerate(paths) if not path[-1].over]
        ended = {place: path[-1].ids for place, path in enumerate(paths) if path[-1].over and not path[-1].rollouts}
        found = _go_on(ask, trees, open, [paths[place][-1].ids for place in open], starts, self.temperature, None)
        done = dict(sorted((ended | {place: ids for place, (ids, _) in zip(open, found, strict=True)}).items()))
        texts = {place: ids[len(starts[place]) :] for place, ids in done.items()}
        for place, ids in texts.items():
            text = reopened(trees[place].prompt, ask.lm.tokenizer.decode(ids, skip_special_tokens=True))
            extracted = judge(ask.task, ask.rows[place], text)[0].extracted
            trees[place].texts.append(text)
            trees[place].answers.append(None if extracted is None else ballot(extracted))  # 0.5 and 1/2 are one answer
        if self.value == "likelihood":
            scored = _likelihood(ask, [starts[place] for place in texts], list(texts.values()), list(texts))
            for place, sure in zip(texts, scored, strict=True):
                trees[place].sure.append(math.exp(sure))
        for place, path in enumerate(paths):
            number = len(trees[place].texts) - 1 if place in done else path[-1].rollouts[0]
            for node in path:
                node.visits += 1
                node.rollouts.append(number)


@dataclass(frozen=True)
class StepBeam:
    """Keep the `width` beginnings that the model finds likeliest a token, of `branching` sampled steps behind each.

    depth: steps after which what is left is written to its end. Facts: likelihood (mean log-probability a token, in
    nats; none where there was no choice). The beginnings that were kept to the end are the row's samples.
    """

    width: int = 2
    branching: int = 3
    depth: int = 12
    temperature: float = 0.7
    step: str = ". "

    def __post_init__(self) -> None:
        if min(self.width, self.branching, self.depth) < 1 or not self.step:
            raise ValueError(f"{self}: give numbers from 1, and the words that end a step.")
        _check_temperature(self.temperature, self.branching)

    def solve(self, ask: Ask) -> list[Answer]:
        """See `evaluation.Solver`."""
        prompts = [ask.prompt(row) for row in range(len(ask.rows))]
        starts = [ask.lm.encode(prompt) for prompt in prompts]
        trees = [_Tree(prompt, _Node(start)) for prompt, start in zip(prompts, starts, strict=True)]
        beams: list[dict[tuple[int, ...], tuple[bool, float]]] = [{tuple(start): (False, 0.0)} for start in starts]
        for number in range(self.depth + 1):
            last = number == self.depth
            open = [(row, ids) for row, beam in enumerate(beams) for ids, (over, _) in beam.items() if not over]
            asked = [each for each in open for _ in range(1 if last else self.branching)]
            rows, begun = [row for row, _ in asked], [list(ids) for _, ids in asked]
            found = _go_on(ask, trees, rows, begun, starts, self.temperature, None if last else self.step)
            for row, ids in open:
                del beams[row][ids]
            new = {(row, tuple(ids)): over for row, (ids, over) in zip(rows, found, strict=True)}
            chosen = [(row, ids) for row, ids in new if max(self.width, self.branching) > 1]
            texts = [list(ids[len(starts[row]) :]) for row, ids in chosen]
            scores = _likelihood(ask, [starts[row] for row, _ in chosen], texts, [row for row, _ in chosen])
            sure = dict(zip(chosen, scores, strict=True))
            for (row, ids), over in new.items():
                beams[row][ids] = (over, sure.get((row, ids), 0.0))
            for row, beam in enumerate(beams):
                kept = sorted(beam.items(), key=lambda item: -item[1][1])[: self.width]
                beams[row] = dict(kept)
        answers = []
        for prompt, start, beam in zip(prompts, starts, beams, strict=True):
            written = [ask.lm.tokenizer.decode(ids[len(start) :], skip_special_tokens=True) for ids in beam]
            told = tuple(reopened(prompt, text) for text in written)
            best = next(iter(beam.values()))[1]
            answers.append(Answer(told[0], samples=told, facts={"likelihood": round(best, 6)}))
        return answers


def _go_on(
    ask: Ask,
    trees: list[_Tree],
    rows: list[int],
    begun: list[list[int]],
    starts: list[list[int]],
    temperature: float,
    step: str | None,
) -> list[tuple[list[int], bool]]:
    """The beginnings with a step more (None: to their end), and whether that was the last; in one batch."""
    draws = []
    for row in rows:
        draws.append(trees[row].draws)
        trees[row].draws += 1
    left = [ask.max_new_tokens - len(ids) + len(starts[row]) for row, ids in zip(rows, begun, strict=True)]
    stop = () if step is None else (step,)
    found = ask.generate(begun, rows, max_new_tokens=left, temperature=temperature, draws=draws, stop=stop)
    return [
        (ids + one.token_ids, one.tokens_out >= most or step is None or one.token_ids[-1] in end_tokens(ask.lm))
        for ids, one, most in zip(begun, found, left, strict=True)
    ]


def _likelihood(ask: Ask, starts: list[list[int]], texts: list[list[int]], rows: list[int]) -> list[float]:
    """Mean log-probability a token of each text."""
    return [float(each.mean()) for each in ask.logprobs(starts, texts, rows)]


def _count(node: _Node) -> int:
    return 1 + sum(map(_count, node.children))
