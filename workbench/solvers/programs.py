"""Program-aided answers: the model writes a Python program, a sandbox runs it, and the last printed line is the answer.

PAL (arXiv 2211.10435), PoT (arXiv 2211.12588): the model plans, the interpreter calculates. Isolation and limits are
`workbench.sandbox`'s; where programs can't be isolated nothing is asked. Not covered: votes among several programs.
"""

from dataclasses import dataclass

from workbench.evaluation.asking import Answer, Ask
from workbench.prompts import INSTRUCTIONS, Strategy
from workbench.sandbox import Limits, run_many
from workbench.sandbox.jail import required
from workbench.synthesis.programs import printed, program_task
from workbench.tasks.answers import reopened
from workbench.tasks.unit_tests import code_in


@dataclass(frozen=True)
class Program:
    """Ask for a program and answer with what it prints.

    shots: examples whose worked steps are rendered as programs; 0 for tasks without worked steps. told: the
    instruction in the system turn ("" for none). limits: of each program; None for `Limits()`. A condition's own
    strategy is not used beside this, and refused.
    """

    shots: int = 3
    told: str = INSTRUCTIONS["program"]
    limits: Limits | None = None

    def check(self, ask: Ask) -> None:
        """Raise ValueError beside a strategy, and SandboxError where programs can't be isolated."""
        required()
        if ask.strategy is not None:
            raise ValueError(
                f"Program asks in its own way, so the strategy {ask.strategy.name!r} can't go with it. Leave the "
                "strategy out: Program(shots=3, told='Write a Python program that prints the answer.')."
            )

    def prompts(self, ask: Ask) -> list[str]:
        """What the model is asked, examples included."""
        asking = program_task(ask.task)
        strategy = Strategy("program", self.told or None, self.shots, "program")
        return [ask.lm.render(asking.messages(row, strategy)) for row in ask.rows]

    def solve(self, ask: Ask) -> list[Answer]:
        """See `Solver`. Facts: `prompt`, `program` (what the model wrote), `ran` (how it ended, or why it failed)."""
        self.check(ask)
        prompts = self.prompts(ask)
        found = ask.generate(prompts, range(len(prompts)))
        texts = [reopened(*each) for each in zip(prompts, (one.text for one in found), strict=True)]
        codes = [code_in(text) for text in texts]
        outcomes = run_many([code or "" for code in codes], limits=self.limits)
        answers = []
        for prompt, text, code, outcome in zip(prompts, texts, codes, outcomes, strict=True):
            answer, ran = printed(outcome), outcome.reason
            if answer is None and outcome.exit_code == 0:
                ran = "printed nothing" if code else "no program in the answer"
            answers.append(Answer(answer or "", facts={"prompt": prompt, "program": text, "ran": ran}))
        return answers
