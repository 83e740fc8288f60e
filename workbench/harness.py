"""Any task of lm-evaluation-harness on a steered, cache-edited or tuned model: `HarnessModel` is one of its models.

Log-likelihoods come from `workbench.likelihood`, texts from `lm.generate`; tokenization, windows and stop strings are
those of the harness's own `hf` model, so that scores without an intervention are equal to it. Needs lm_eval 0.4.13 or
later, which is no dependency. Leaves out what the harness offers for several processes, images and thinking tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from workbench.likelihood.requests import Request, encode_requests, encode_texts, longest_input, prefix_token
from workbench.likelihood.rolling import windows
from workbench.likelihood.scoring import loglikelihoods
from workbench.models import LM, ModelError

if TYPE_CHECKING:
    from workbench.interventions import Intervention

NEW_TOKENS = 256  # the harness's own limit where a task names none
GENERATION = ("until", "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens", "do_sample",
              "temperature", "top_p")  # fmt: skip


def __getattr__(name: str) -> Any:
    """`HarnessModel` is made when it is first asked for: its base is part of lm_eval."""
    if name != "HarnessModel":
        raise AttributeError(f"workbench.harness has no {name!r}. It has HarnessModel.")
    return _model_class()


@cache
def _model_class() -> Any:
    try:
        from lm_eval.api.model import TemplateLM
    except ImportError as error:
        raise ModelError(
            f"lm-evaluation-harness is not installed ({error}). Next: pip install 'lm_eval>=0.4.13', or score without "
            "it: workbench.likelihood."
        ) from error

    class HarnessModel(_Answers, TemplateLM):
        """A model for `lm_eval.simple_evaluate(model=HarnessModel(lm, x), tasks=[...])`: `lm` under one intervention.

        batch_size: rows a forward at most; None fills forwards by a token budget. max_length: tokens a forward; None
        is what the model has positions for. max_new_tokens: where a task names none. seed: of sampled texts.
        """

        def __init__(
            self,
            lm: LM,
            interventions: "Intervention | None" = None,
            *,
            batch_size: int | None = None,
            max_length: int | None = None,
            max_new_tokens: int = NEW_TOKENS,
            seed: int = 0,
        ) -> None:
            TemplateLM.__init__(self)
            self.set_up(lm, interventions, batch_size, max_length, max_new_tokens, seed)

    return HarnessModel


class _Answers:
    """What the harness asks of a model; its requests have `args`."""

    cache_hook: Any

    def set_up(
        self,
        lm: LM,
        interventions: "Intervention | None",
        batch_size: int | None,
        max_length: int | None,
        max_new_tokens: int,
        seed: int,
    ) -> None:
        self.lm, self.interventions, self.tokenizer = lm, interventions, lm.tokenizer
        self.batch_size, self.max_gen_toks, self.seed = batch_size, max_new_tokens, seed
        self.max_length = max_length or longest_input(lm)
        self._device = lm.device

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        return prefix_token(self.lm)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return encode_texts(self.lm, [string], add_special_tokens)[string]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages as one string, by the tokenizer's template, else as `lm.render` does."""
        if not self.tokenizer.chat_template:
            return self.lm.render(chat_history)
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs: list[Request] = [(context, continuation) for context, continuation in (each.args for each in requests)]
        found = self._scores(pairs)
        for pair, answer in zip(pairs, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, answer)
        return found

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        return self._scores([(context, continuation) for _, context, continuation in requests])

    def _scores(self, pairs: Sequence[Request]) -> list[tuple[float, bool]]:
        """What is longer than `max_length` loses tokens of its context; the very last token is never read."""
        cut: list[Request] = []
        for one in encode_requests(self.lm, pairs):
            most = self.max_length + 1 - len(one.continuation)
            if most < 1:
                raise ModelError(
                    f"A continuation of {len(one.continuation)} tokens is more than max_length={self.max_length}."
                )
            cut.append((one.context[-most:], one.continuation))
        scored = loglikelihoods(self.lm, cut, self.interventions, batch_size=self.batch_size)
        return [(one.logprob, one.greedy) for one in scored]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        texts = [each.args[0] for each in requests]
        ids = encode_texts(self.lm, texts)
        cut = [list(windows(ids[text], self.prefix_token_id, self.max_length)) for text in texts]
        scored = iter(self._scores([window for own in cut for window in own]))
        found = []
        for text, own in zip(texts, cut, strict=True):
            found.append(sum(next(scored)[0] for _ in own))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        found: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for number, each in enumerate(requests):
            groups.setdefault(repr(sorted(each.args[1].items(), key=str)), []).append(number)
        for members in groups.values():
            options = self._options(requests[members[0]].args[1])
            texts = self._generate([requests[number].args[0] for number in members], options)
            for number, text in zip(members, texts, strict=True):
                found[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
        return [found[number] for number in range(len(requests))]

    def _options(self, asked: dict[str, Any]) -> dict[str, Any]:
        """The harness's generation arguments as those of `lm.generate`; others are refused by name."""
        unknown = sorted({name for name, value in asked.items() if value is not None} - {*GENERATION})
        if unknown:
            raise ModelError(
                f"generation_kwargs {', '.join(unknown)}: not known here. Allowed: {', '.join(GENERATION)}."
            )
        until = asked.get("until") or []
        stop = [until] if isinstance(until, str) else list(until)
        named = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        limit = next((int(asked[name]) for name in named if asked.get(name) is not None), self.max_gen_toks)
        # as the harness has it, a temperature counts only where do_sample is asked for
        temperature = float(asked.get("temperature") or 1.0) if asked.get("do_sample") else 0.0
        return {
            "stop": tuple(word for word in stop if word), "max_new_tokens": limit, "temperature": temperature,
            "top_p": float(asked.get("top_p") or 1.0),
        }  # fmt: skip

    def _generate(self, contexts: Sequence[str], options: dict[str, Any]) -> list[str]:
        """Texts up to the first stop string or end of text; contexts too long for the model lose tokens on the left."""
        from workbench.choosing import Decoding
        from workbench.generate import generate

        room = self.max_length - options["max_new_tokens"]
        if room < 1:
            raise ModelError(
                f"max_gen_toks={options['max_new_tokens']} leaves no room for a prompt in {self.max_length} tokens. "
                "Lower it in the task's generation_kwargs."
            )
        ids = encode_texts(self.lm, contexts)
        reader = _Tokenized(**vars(self.lm))
        reader.known.update({text: ids[text][-room:] for text in contexts})
        answers = generate(
            reader, contexts, self.interventions, Decoding(**options), seed=self.seed, batch_size=self.batch_size
        )
        return [answer.text for answer in answers]


@dataclass(frozen=True, eq=False)
class _Tokenized(LM):
    """The same model, with prompts tokenized beforehand: the harness adds special tokens and cuts on the left."""

    known: dict[str, list[int]] = field(default_factory=dict)

    def encode(self, prompt: Any) -> list[int]:
        return self.known[prompt]
