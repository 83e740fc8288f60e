"""Contexts and continuations as token ids, cut where lm-evaluation-harness 0.4 cuts them, so that scores can be equal.

Trailing white space of a context belongs to its continuation; both are tokenized as one text, with the special tokens
that the tokenizer adds by itself, and split behind the context's own tokens. Does not score anything.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from workbench.models import LM, ModelError

Side = str | Sequence[int]
Request = tuple[Side, Side]


@dataclass(frozen=True)
class Encoded:
    """Tokens of a request: `context` has at least one, `continuation` is what is scored; `text` is its string."""

    context: list[int]
    continuation: list[int]
    text: str


def prefix_token(lm: LM) -> int:
    """What stands before a text that has no context: the token that begins texts, else the one that ends them."""
    tokenizer = lm.tokenizer
    token = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if token is None:
        raise ModelError(
            f"The tokenizer of {lm.name!r} has neither a token that begins nor one that ends texts, so an empty "
            "context cannot be scored. Give a context of at least one token."
        )
    return int(token)


def longest_input(lm: LM) -> int:
    """Tokens that one forward may have: the model's positions, else the tokenizer's limit, else 2048."""
    config = lm.model.config.get_text_config()
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if isinstance(found := getattr(config, name, None), int):
            return found
    found = lm.tokenizer.model_max_length
    return int(found) if found < 10**9 else 2048  # transformers writes 1e30 where nothing is known


def encode_texts(lm: LM, texts: Iterable[str], special: bool | None = None) -> dict[str, list[int]]:
    """Token ids of every distinct text, in one call. special: whether special tokens are added; None leaves it to the
    tokenizer, but adds none to a text that brings its own first one.
    """
    found: dict[str, list[int]] = {}
    distinct = dict.fromkeys(texts)
    start = None
    if special is None and (lm.tokenizer.bos_token_id is not None or lm.tokenizer.eos_token_id is not None):
        start = lm.tokenizer.decode(prefix_token(lm))
    bare = [text for text in distinct if start is not None and text.startswith(start)] if special is None else []
    rest = [text for text in distinct if text not in set(bare)] if bare else list(distinct)
    for group, options in (
        (bare, {"add_special_tokens": False}),
        (rest, {} if special is None else {"add_special_tokens": special}),
    ):
        if group:
            # the limit of the tokenizer is not ours: what is too long is cut, or rolls, later
            ids = lm.tokenizer(group, return_attention_mask=False, verbose=False, **options)["input_ids"]
            found.update(zip(group, ids, strict=True))
    return found


def encode_requests(lm: LM, requests: Sequence[Request], special: bool | None = None) -> list[Encoded]:
    """Tokens of every request; `special` as in `encode_texts`.

    Raises ModelError where a request is no pair of two strings or two lists of ids, or its continuation has no token.
    """
    for number, request in enumerate(requests):
        if isinstance(request, str) or len(request) != 2 or isinstance(request[0], str) != isinstance(request[1], str):
            raise ModelError(
                f"Request {number} is {request!r}. A request is (context, continuation): two strings, or two lists of "
                "token ids."
            )
    texts = {number: _moved(*each) for number, each in enumerate(requests) if isinstance(each[0], str)}
    alone = encode_texts(lm, (after for before, after in texts.values() if not before), special=False)
    behind = (text for before, after in texts.values() if before for text in (before, before + after))
    joint = encode_texts(lm, behind, special)
    found = []
    for number, (context, continuation) in enumerate(requests):
        if number not in texts:
            first, second = [int(token) for token in context], [int(token) for token in continuation]
            text = lm.tokenizer.decode(second)
            first = first or [prefix_token(lm)]
        else:
            before, after = texts[number]
            text = str(continuation)
            if before:
                first = joint[before] or [prefix_token(lm)]
                second = joint[before + after][len(joint[before]) :]
            else:
                first, second = _behind_nothing(lm, alone[after])
        if not second:
            raise ModelError(f"Request {number}: the continuation {continuation!r} has no token of its own to score.")
        found.append(Encoded(first, second, text))
    return found


def _moved(context: Side, continuation: Side) -> tuple[str, str]:
    """Context and continuation with the white space between them on the continuation's side."""
    assert isinstance(context, str) and isinstance(continuation, str)
    bare = context.rstrip()
    return bare, context[len(bare) :] + continuation


def _behind_nothing(lm: LM, tokens: list[int]) -> tuple[list[int], list[int]]:
    """An empty context is the prefix token; a text that begins with it lends it its own."""
    prefix = prefix_token(lm)
    return (tokens[:1], tokens[1:]) if tokens and tokens[0] == prefix else ([prefix], tokens)
