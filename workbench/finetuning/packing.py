"""Turn chat records into token ids with a loss mask, and make sure that packed records can't see each other.

The mask is the difference of two renderings: the prompt (with the generation header) must be a prefix of prompt plus
answer, in text and in tokens, and only the last answer is learnt, up to and including its stop token. Nothing is taken
from markers inside a chat template, because many templates have none or place the stop token outside of them.

Packing puts several records in one row, each with positions from 0. It is exact without flash attention only when *no*
attention mask goes beside the position ids: transformers then builds a block-diagonal mask from the restarts, while a
mask of ones silently lets every record read the ones before it. `leak` measures that on the model at hand.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from workbench.synthesis.records import Record, RecordError

if TYPE_CHECKING:
    from workbench.models import LM

IGNORED = -100  # label of a token without loss, the convention of torch.nn.functional.cross_entropy


@dataclass(frozen=True)
class Example:
    """One record as tokens: `labels` repeats `input_ids` where the loss counts and is -100 elsewhere.

    weights: how much each token counts in the loss, one a token; empty where all count alike. phase: records of a lower
    one come first; within one they are shuffled.
    """

    input_ids: list[int]
    labels: list[int]
    weights: tuple[float, ...] = ()
    phase: int = 0

    @property
    def learnt(self) -> list[int]:
        """Places of the tokens that the loss counts."""
        return [place for place, label in enumerate(self.labels) if label != IGNORED]


def stop_tokens(lm: "LM") -> set[int]:
    """Ids of the tokens that end an answer: the tokenizer's end of text and the model's own end tokens."""
    found = lm.model.generation_config.eos_token_id if lm.model.generation_config else None
    extra = found if isinstance(found, list) else [found]
    return {token for token in (lm.tokenizer.eos_token_id, *extra) if token is not None}


def encode(lm: "LM", record: Record, where: str) -> Example:
    """Tokens and labels of one record.

    Raises `RecordError`, starting with `where`, when the template refuses the messages or leaves words of the answer
    out, when it changes the prompt once an answer follows, when the answer merges with the prompt into other tokens,
    and when no stop token ends the answer.
    """
    prompt, text = _rendered(lm, record["messages"], where)
    if given := _given(record, where):
        prompt += given if lm.tokenizer.chat_template else f" {given}"
    start = lm.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    if ids[: len(start)] != start:
        same = next((i for i, (a, b) in enumerate(zip(start, ids, strict=False)) if a != b), len(ids))
        raise RecordError(
            f"{where}: the tokenized prompt is not the beginning of prompt plus answer; they part after {same} of "
            f"{len(start)} prompt tokens, at {lm.tokenizer.decode(start[same:])[:60]!r} against "
            f"{lm.tokenizer.decode(ids[same:])[:60]!r}. The model would learn another prompt than it is asked with. "
            "Use a chat template whose generation prompt begins an assistant turn, and strip blanks from the answer; "
            "where that prompt opens a block for thoughts, the answer has to bring thoughts."
        )
    answer, written = _unspaced(record["messages"][-1]["content"]), _unspaced(text)
    place = written.rfind(answer)
    if place < 0 or place + len(answer) <= len(_unspaced(prompt)):  # its first words may stand in the prompt: <think>
        raise RecordError(
            f"{where}: the chat template leaves words of the answer {record['messages'][-1]['content'][:60]!r} out; it "
            f"wrote {text[len(prompt) :][:60]!r}. Templates of models that also see pictures may take lists of parts "
            "only, others drop thoughts: use a template that writes plain text as it is."
        )
    stops = stop_tokens(lm)
    last = next((i for i in reversed(range(len(start), len(ids))) if ids[i] in stops), None)
    if last is None:
        names = ", ".join(repr(lm.tokenizer.decode([token])) for token in sorted(stops)) or "none is set"
        raise RecordError(
            f"{where}: the rendered answer {lm.tokenizer.decode(ids[len(start) :])[-60:]!r} holds no stop token "
            f"({names}), so a model trained on it would never stop. Set tokenizer.eos_token to the token that the chat "
            "template puts at the end of an assistant turn."
        )
    # templates may write a line break after the stop token; generation never gets there, so it is not learnt
    labels = [IGNORED] * len(start) + ids[len(start) : last + 1] + [IGNORED] * (len(ids) - last - 1)
    return Example(ids, labels, phase=record.get("phase", 0))


def _given(record: Record, where: str) -> str:
    """What of the answer is given and not learnt: a control text that it begins with (see `conditioning`)."""
    given = record.get("given", "")
    if not isinstance(given, str) or not record["messages"][-1]["content"].startswith(given):
        raise RecordError(
            f'{where}: the field "given" is the text that the answer begins with and that is not learnt; found '
            f"{given!r:.80} before {record['messages'][-1]['content']!r:.80}. Make such records with condition(...)."
        )
    return given


def _rendered(lm: "LM", messages: list[dict[str, str]], where: str) -> tuple[str, str]:
    """The prompt as a model is asked with it, and prompt plus answer as the template writes them."""
    from jinja2 import TemplateError

    try:
        prompt = lm.render(messages[:-1])
        if lm.tokenizer.chat_template:
            return prompt, str(lm.tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise RecordError(
            f"{where}: the chat template refuses the messages ({roles}): {error}. Leave out roles that the model does "
            "not know, or set a tokenizer.chat_template that takes messages of plain text."
        ) from None
    return prompt, f"{prompt} {messages[-1]['content']}{lm.tokenizer.eos_token}"


def _unspaced(text: str) -> str:
    """Without white space, which templates trim and set anew around blocks of thoughts."""
    return "".join(text.split())


def encode_all(
    lm: "LM",
    records: Sequence[Record],
    where: str,
    max_length: int,
    weigh: "Callable[[LM, Record, Example, str], tuple[float, ...]] | None" = None,
) -> tuple[list[Example], dict[str, int]]:
    """Examples of all records, and how many were left out by reason. A record is never cut: its stop token would go.

    weigh: weights of an example's tokens, () for all alike; a record without any weight is left out.
    """
    if not records:
        raise RecordError(
            f"{where} holds no record to learn from. Ask more questions (n=), allow more samples, choose a strategy "
            "that the model gets right, or take the task's own solutions (recipe='oracle')."
        )
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    for number, record in enumerate(records, start=1):
        place = f"{where}, kept record {number} ({record.get('id', 'no id')})"
        example = encode(lm, record, place)
        if len(example.input_ids) > max_length:
            dropped[f"longer than {max_length} tokens"] += 1
            continue
        example = example if weigh is None else replace(example, weights=weigh(lm, record, example, place))
        if example.weights and not any(example.weights[learnt] for learnt in example.learnt):
            dropped["weight 0"] += 1
        else:
            examples.append(example)
    if not examples and dropped["weight 0"]:
        raise RecordError(f"{where}: no record has a weight above 0 ({dict(dropped)}). Leave the weights out.")
    if not examples:
        raise RecordError(
            f"{where}: all {len(records)} kept records are longer than max_length={max_length} tokens. "
            "Raise max_length, or shorten the answers."
        )
    return examples, dict(dropped)


def leak(model: PreTrainedModel, examples: Sequence[Example]) -> float:
    """Largest change in the logits of a packed record when *another* record packed before it changes its words.

    Exactly 0.0 where packing is exact, whatever the dtype: the compared positions, shapes and kernels are the same.
    """
    first, second = (example.input_ids[:32] for example in (examples[0], examples[-1]))
    other = first[1:] + first[:1] if len(set(first)) > 1 else [first[0] + 1 if first[0] == 0 else 0] * len(first)
    positions = torch.tensor([[*range(len(first)), *range(len(second))]], device=model.device)
    table = model.get_input_embeddings()

    def logits(ids: list[int]) -> torch.Tensor:
        # embeddings that want gradients keep bitsandbytes from repacking its 4-bit weights for inference on a CPU
        embeddings = table(torch.tensor([ids], device=model.device)).detach().requires_grad_()
        output = model(inputs_embeds=embeddings, position_ids=positions, use_cache=False)
        return output.logits[0, len(first) :].detach().float()

    was_training = model.training
    model.eval()  # dropout would differ between the two calls
    try:
        return float((logits(first + second) - logits(other + second)).abs().max())
    finally:
        model.train(was_training)
