"""What is read behind the tokens of an answer: beside plain forwards, and as a picture."""

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch

from tests.test_interventions import PROMPTS, cache_edit, vector
from tests.tiny import ARCHITECTURES, tiny_lm
from workbench.generate import Generation
from workbench.models import ModelError
from workbench.token_readings import MEASURES, acted_on, read_tokens
from workbench.widgets import show_tokens
from workbench.widgets.strip import COLUMNS, shown

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_readings_are_those_of_plain_forwards(architecture: str) -> None:
    lm = tiny_lm(architecture)
    x = vector(lm, 1, "generated") + cache_edit(lm)
    answer = lm.generate(PROMPTS[:2], x, max_new_tokens=6)[1]
    found = read_tokens(answer, top=3)
    prompt = lm.encode(PROMPTS[1])
    ids = torch.tensor([prompt + answer.token_ids])
    with torch.no_grad():
        plain = lm.model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
        with lm.apply(x, prompt_lengths=[len(prompt)]):
            changed = lm.model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    near = {"rtol": 1e-4, "atol": 1e-4}
    kl = torch.nn.functional.kl_div(changed, plain, log_target=True, reduction="none").sum(-1)
    np.testing.assert_allclose(found.kl, kl, **near)
    np.testing.assert_allclose(found.entropy, torch.distributions.Categorical(logits=changed).entropy(), **near)
    np.testing.assert_allclose(found.logprob, changed[range(6), answer.token_ids], **near)
    for place, ranked in enumerate(found.alternatives):
        best = changed[place].topk(3)
        assert [text for text, _ in ranked] == [lm.tokenizer.decode([token]) for token in best.indices.tolist()]
        np.testing.assert_allclose([chance for _, chance in ranked], best.values.exp(), **near)
        assert ranked[0][0] == found.tokens[place]  # it was greedy
    assert found.plain_alternatives[0] != found.alternatives[0] or found.kl[0] < 0.5


def test_a_plain_answer_is_at_no_distance_from_itself() -> None:
    found = read_tokens(tiny_lm("llama").generate([PROMPTS[0]], max_new_tokens=5)[0])
    assert np.abs(found.kl).max() < 1e-6
    assert not found.acted.any()
    assert found.alternatives == found.plain_alternatives


def test_where_a_change_acts() -> None:
    lm = tiny_lm("llama")
    wanted = {"generated": [False, True, True, True], "last": [True, False, False, False], "all": [True] * 4}
    for span, places in wanted.items():
        assert acted_on(vector(lm, 1, span), 5, 4).tolist() == places
    assert acted_on(vector(lm, 1, slice(0, 3)), 5, 4).tolist() == [False] * 4
    assert acted_on(cache_edit(lm), 5, 4).tolist() == [True, False, False, False]
    assert acted_on(cache_edit(lm) + vector(lm, 1, "generated"), 5, 4).tolist() == [True] * 4


def test_what_cannot_be_read_is_refused() -> None:
    lm = tiny_lm("llama")
    answer = lm.generate([PROMPTS[0]], max_new_tokens=2)[0]
    with pytest.raises(ModelError, match="came from a server"):
        read_tokens(Generation("4", [], 3, 1, 0.0, True, 1))
    with lm.apply(vector(lm, 1)), pytest.raises(ModelError, match=r"inside of lm\.apply"):
        read_tokens(answer)
    with pytest.raises(ValueError, match="coloured by kl, entropy"):
        show_tokens(answer, "surprise")


def test_the_strip_holds_every_token_and_says_so_in_words() -> None:
    lm = tiny_lm("llama")
    answer = lm.generate([PROMPTS[0]], vector(lm, 1, "last"), max_new_tokens=2 * COLUMNS)[0]
    for by, words in MEASURES.items():
        strip = show_tokens(answer, by, title="<steered> & more")
        root = ElementTree.fromstring(strip._repr_svg_())
        texts = [text.text for text in root.iter(f"{SVG}text")]
        assert texts[0] == "<steered> & more"
        assert texts[1:-1] == [shown(token) for token in strip.readings.tokens]
        assert words in texts[-1]
        assert words in root.get("aria-label", "")
        assert len(strip.svg) < 200_000
        marks = [rect for rect in root.iter(f"{SVG}rect") if rect.get("fill") == "#D55E00"]
        assert len(marks) == 1  # the vector acted on the last token of the prompt alone
        right = float(root.get("width", "0"))
        assert all(
            float(r.get("x", "0")) + float(r.get("width", "0").rstrip("%")) <= right for r in root.iter(f"{SVG}rect")
        )


def test_tokens_are_heard_as_they_come_and_an_exception_stops_and_cleans() -> None:
    lm = tiny_lm("llama")
    x = vector(lm, 1, "generated")
    alone = lm.generate(PROMPTS[:2], [None, x], max_new_tokens=8)
    heard: list[dict[int, list[int]]] = []
    lm.generate(
        PROMPTS[:2], [None, x], max_new_tokens=8,
        on_token=lambda new: heard.append({row: list(ids) for row, ids in new.items()}),
    )  # fmt: skip
    assert len(heard) == 8
    assert heard[2] == {row: answer.token_ids[:3] for row, answer in enumerate(alone)}

    class Enough(Exception):
        pass

    def stop(new: dict[int, list[int]]) -> None:
        if len(new[0]) == 3:
            raise Enough

    with pytest.raises(Enough):
        lm.generate(PROMPTS[:2], [None, x], max_new_tokens=8, on_token=stop)
    again = lm.generate(PROMPTS[:2], [None, x], max_new_tokens=8)
    assert [one.token_ids for one in again] == [one.token_ids for one in alone]
