"""Log-likelihoods with shared prefixes are those of each request alone, with every kind of model and intervention."""

from random import Random

import pytest
import torch

from tests.test_kinds import KINDS, edit, models, residual
from tests.tiny import tiny_lm
from workbench.interventions import Intervention
from workbench.likelihood import Scored, loglikelihoods
from workbench.likelihood.requests import encode_requests
from workbench.likelihood.tree import grow
from workbench.models import LM, ModelError

HEAD = "Some sums, for a start. 1+1=2. 2+2=4. 3+5=8. 4+4=8.\n"
FAMILIES = (
    "llama", "gpt2", "gemma3", "qwen3_next", "mistral_sliding", "opt", "falcon", "granite", "gpt_oss", "gemma4",
)  # fmt: skip


def requests() -> list[tuple[str, str]]:
    """Questions behind one head, each with options of one or more tokens, and some texts that share little."""
    draws = Random(0)
    found = []
    for _ in range(5):
        context = HEAD + "What is " + "".join(draws.choice("ab c") for _ in range(draws.randint(3, 30))) + "? "
        found += [(context, option) for option in ("yes", "no", "maybe so", "y", "ye")]
    return [*found, ("", "Hello you"), ("", "Hello me"), ("Other", " k"), ("Other text" + "z" * 40, " k"), found[0]]


def by_hand(lm: LM, request: tuple[str, str], x: Intervention | None = None) -> list[float]:
    """The reference: one whole forward of the model."""
    (one,) = encode_requests(lm, [request])
    ids = torch.tensor([one.context + one.continuation])
    with torch.no_grad():
        if x is None:
            logits = lm.model(ids[:, :-1], use_cache=False).logits[0]
        else:
            with lm.apply(x, prompt_lengths=[len(one.context)]):
                logits = lm.model(ids[:, :-1], use_cache=False).logits[0]
    scores = logits.log_softmax(-1)[len(one.context) - 1 :]
    return scores.gather(1, ids[0, len(one.context) :, None])[:, 0].tolist()


def assert_close(found: list[Scored], expected: list[list[float]], within: float = 1e-4) -> None:
    for one, scores in zip(found, expected, strict=True):
        assert one.token_logprobs == pytest.approx(scores, abs=within)
        assert one.logprob == pytest.approx(sum(scores), abs=2 * within)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_each_request_alone(family: str) -> None:
    lm, asked = tiny_lm(family), requests()
    together = loglikelihoods(lm, asked)
    assert_close(together, [by_hand(lm, request) for request in asked])
    order = Random(1).sample(range(len(asked)), len(asked))
    for size in (1, 7, 64) if family == "llama" else (7,):
        again = loglikelihoods(lm, [asked[place] for place in order], batch_size=size)
        assert_close(again, [list(together[place].token_logprobs) for place in order])
        assert [one.greedy for one in again] == [together[place].greedy for place in order]


@pytest.mark.parametrize(
    ("family", "kind"),
    [*(("llama", kind) for kind in KINDS), *(("gemma3", kind) for kind in ("add", "clamp", "prefix", "gate"))],
)
def test_scores_under_each_kind_are_those_of_each_request_alone(family: str, kind: str) -> None:
    lm, other, folder = models(family)
    asked = [("<|user|>" + context, option) for context, option in requests() if context][:7]
    try:
        x = KINDS[kind](lm, other, folder)
        expected = [by_hand(lm, request, x) for request in asked]
    except ModelError as error:
        pytest.skip(f"{family} refuses {kind}: {error}")
    plain = [by_hand(lm, request) for request in asked]
    size = 1 if kind == "compress, knorm" else 4  # equal keys tie, and a batch rounds their lengths otherwise
    assert_close(loglikelihoods(lm, asked, x, batch_size=None if size > 1 else 1), expected, 3e-4)
    mixed = [x if number % 3 else None for number in range(len(asked))]
    wanted = [(expected if number % 3 else plain)[number] for number in range(len(asked))]
    assert_close(loglikelihoods(lm, asked, mixed, batch_size=size), wanted, 3e-4)
    far = [abs(sum(one) - sum(two)) for one, two in zip(expected, plain, strict=True)]
    assert max(far) > 1e-3 or kind == "gate"


@pytest.mark.parametrize("span", ["all", "prompt", "last", "generated", slice(-4, None), slice(2, 60), 3, (-2, 5)])
def test_each_row_has_its_own_strength_in_one_pass(span: object) -> None:
    lm, asked = tiny_lm("llama"), requests()[:10]
    strengths = [0.0, 0.5, -1.0, 2.0]
    rows = [(request, s * residual(lm, span)) for s in strengths for request in asked]
    found = loglikelihoods(lm, [request for request, _ in rows], [x for _, x in rows])
    assert_close(found, [by_hand(lm, request, x) for request, x in rows])
    plain = loglikelihoods(lm, asked)
    assert_close(found[: len(asked)], [list(one.token_logprobs) for one in plain], 1e-5)
    assert [one.greedy for one in found[: len(asked)]] == [one.greedy for one in plain]


def test_a_cache_edit_and_steering_share_what_they_do_not_change() -> None:
    lm, asked = tiny_lm("llama"), requests()[:10]
    x = edit(lm) + residual(lm, "generated")
    rows = [(request, s * x) for s in (0.0, 0.2, 0.4) for request in asked]
    counted: list[int] = []
    handle = lm.blocks[0].register_forward_hook(
        lambda module, inputs, output: counted.append(inputs[0][..., 0].numel())
    )
    try:
        found = loglikelihoods(lm, [request for request, _ in rows], [x for _, x in rows])
    finally:
        handle.remove()
    assert_close(found, [by_hand(lm, request, x) for request, x in rows])
    whole = sum(len(one.context) + len(one.continuation) for one in encode_requests(lm, [r for r, _ in rows]))
    assert sum(counted) < whole / 4


def test_an_enclosing_block_counts() -> None:
    lm, asked = tiny_lm("llama"), requests()[:6]
    outer, inner = residual(lm, "generated"), residual(lm, "last")
    with lm.apply(outer):
        found = loglikelihoods(lm, asked, inner)
    assert_close(found, [by_hand(lm, request, outer + inner) for request in asked])
    assert_close(loglikelihoods(lm, asked), [by_hand(lm, request) for request in asked])


def test_greedy_is_what_generation_says() -> None:
    lm = tiny_lm("gpt2")
    contexts = ["One text", "Another one"]
    answers = lm.generate(contexts, max_new_tokens=4)
    pairs = [(lm.encode(context), answer.token_ids) for context, answer in zip(contexts, answers, strict=True)]
    other = [(context, [*answer[:-1], (answer[-1] + 1) % 90]) for context, answer in pairs]
    assert [one.greedy for one in loglikelihoods(lm, pairs + other)] == [True, True, False, False]


def test_long_requests_lose_tokens_on_the_left() -> None:
    lm = tiny_lm("llama")
    ids = [7 + number % 80 for number in range(5000)]
    found, short = loglikelihoods(lm, [(ids[:4500], ids[4500:4510]), (ids[4510 - 4097 : 4500], ids[4500:4510])])
    assert found.token_logprobs == pytest.approx(short.token_logprobs)
    with pytest.raises(ModelError, match="more than the 4096 positions"):
        loglikelihoods(lm, [([5], ids)])


@pytest.mark.parametrize(
    ("bad", "said"), [(["ab"], "two strings"), ([("a", [1])], "two strings"), ([("a", "")], "no token of its own")]
)
def test_bad_requests_are_refused(bad: list, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        loglikelihoods(tiny_lm("llama"), bad)
    assert loglikelihoods(tiny_lm("llama"), []) == []


def test_every_token_of_every_row_is_in_the_tree_once_on_its_path() -> None:
    import numpy as np

    draws = Random(3)
    rows = sorted({tuple(draws.choice((1, 2)) for _ in range(draws.randint(1, 12))) for _ in range(200)})
    covered = {row: [] for row in range(len(rows))}
    waiting = grow([np.array(row) for row in rows])
    while waiting:
        node = waiting.pop()
        waiting += node.children
        same = {rows[number][node.start : node.stop] for number in range(node.first, node.last)}
        assert len({each[: min(map(len, same))] for each in same}) == 1
        for number in range(node.first, node.last):
            covered[number] += range(node.start, min(node.stop, len(rows[number])))
    assert all(sorted(covered[number]) == list(range(len(row))) for number, row in enumerate(rows))
