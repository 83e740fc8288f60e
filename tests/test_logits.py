"""Logit arithmetic against recomputing every model in full for each token, one prompt at a time."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.test_interventions import PROMPTS, TOKENS, assert_same, cache_edit, fingerprint, tokens, vector
from tests.tiny import greedy, make_tiny, tiny_config, tiny_lm, tiny_tokenizer
from workbench.interventions import Logits, load_intervention
from workbench.models import LM, ModelError, load_model


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> list[LM]:
    """Two more models with the base's vocabulary: other weights, and another architecture."""
    folder = tmp_path_factory.mktemp("others")
    return [load_model(make_tiny("llama", folder / "a", seed=1)), load_model(make_tiny("gpt2", folder / "b", seed=2))]


def loop(lm: LM, prompt: str, x: Logits) -> list[int]:
    """From the definition: no cache, batch 1, all models on the whole text."""
    ids = lm.encode(prompt)
    length = len(ids)
    with torch.no_grad():
        while len(ids) < length + TOKENS and ids[-1] != 1:
            base, expert, amateur = (
                model.model(torch.tensor([ids]), use_cache=False).logits[0, -1]
                for model in (lm, x.expert or lm, x.amateur or lm)
            )
            logits = base + x.strength * (expert - amateur)
            if x.plausible:
                share = expert.softmax(-1)
                logits[share < x.plausible * share.max()] = -torch.inf
            ids.append(int(logits.argmax()))
    return ids[length:]


def test_proxy_tuning_and_contrast_are_the_definition(others: list[LM]) -> None:
    lm = tiny_lm("llama")
    cases = [
        Logits(*others), 0.5 * Logits(*others), Logits(None, others[1]), Logits(others[0], None, 2.0),
        Logits(None, others[0], 1.0, plausible=0.1),
    ]  # fmt: skip
    changed = 0
    for x in cases:
        expected = [loop(lm, prompt, x) for prompt in PROMPTS]
        assert tokens(lm, PROMPTS, x) == expected
        with lm.apply(x):
            assert [greedy(lm, prompt, TOKENS) for prompt in PROMPTS] == expected
            assert greedy(lm, PROMPTS[0], TOKENS, use_cache=False) == expected[0]
        changed += expected != tokens(lm, PROMPTS)
    assert changed == len(cases)


def test_expert_alone_at_full_strength_speaks_for_itself(others: list[LM]) -> None:
    lm = tiny_lm("llama")
    assert tokens(lm, PROMPTS, Logits(others[0], None)) == tokens(others[0], PROMPTS)


def test_rows_of_a_mixture_equal_each_row_alone(others: list[LM]) -> None:
    lm = tiny_lm("llama")
    x = Logits(*others)
    mixture = [None, x, 2 * x, x + vector(lm, 1, "generated"), cache_edit(lm) - 0.5 * x, 0 * x]
    prompts = [PROMPTS[row % 4] for row in range(6)]
    together = tokens(lm, prompts, mixture)
    assert together == [tokens(lm, [prompt], each)[0] for prompt, each in zip(prompts, mixture, strict=True)]
    assert together == tokens(lm, prompts, mixture, batch_size=4)
    assert together[0] == tokens(lm, prompts[:1])[0]
    assert together[5] == tokens(lm, prompts[5:])[0]


def test_rows_that_end_early_leave_the_others_alone(others: list[LM]) -> None:
    lm = tiny_lm("llama")
    prompts, x = [PROMPTS[row % 4] + "x" * row for row in range(12)], Logits(*others)
    found = lm.generate(prompts, x, 40)
    assert len({row.tokens_out for row in found}) > 1
    alone = [lm.generate([prompt], x, 40)[0] for prompt in prompts]
    assert [row.token_ids for row in found] == [row.token_ids for row in alone]
    assert found[0].forward_passes == 3 * found[0].tokens_out  # three models


def test_the_models_come_back_bit_for_bit(others: list[LM]) -> None:
    lm = tiny_lm("llama")
    before = [fingerprint(model) for model in (lm, *others)]
    with pytest.raises(ZeroDivisionError), lm.apply(Logits(*others)):
        tokens(lm, PROMPTS)[1 // 0]
    for old, model in zip(before, (lm, *others), strict=True):
        assert_same(old, fingerprint(model))
        assert "forward" not in vars(model.model)


def test_saved_by_name_and_loaded_at_the_same_revision(others: list[LM], tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    x = 0.5 * Logits(*others)
    file = (x + vector(lm)).save(tmp_path / "x.safetensors")
    assert tokens(lm, PROMPTS, load_intervention(file)) == tokens(lm, PROMPTS, x + vector(lm))
    folder = make_tiny("llama", tmp_path / "moving", seed=3)
    Logits(load_model(folder)).save(file)
    make_tiny("llama", folder, seed=4)
    with pytest.raises(ModelError, match="at revision"):
        load_intervention(file)


def test_mistakes_are_explained(others: list[LM], tmp_path: Path) -> None:
    lm = tiny_lm("llama")
    with pytest.raises(ModelError, match="needs another model"):
        Logits()
    with pytest.raises(ModelError, match="None stands for it"):
        tokens(lm, PROMPTS, Logits(lm))
    lab = load_model("lab-small")
    with pytest.raises(ModelError, match=r"do not share a vocabulary \(\d+ entries"):
        tokens(lm, PROMPTS, Logits(lab))
    ids = torch.tensor([lm.encode(PROMPTS[0])])
    with torch.no_grad():
        cache = lm.model(ids[:, :-1]).past_key_values
        with pytest.raises(ModelError, match="has not read the"), lm.apply(Logits(*others)):
            lm.model(ids[:, -1:], past_key_values=cache)


def test_several_pairs_add_up_in_any_order(others: list[LM]) -> None:
    """None stands for the base by itself, not for what another part made of it."""
    lm, (a, b) = tiny_lm("llama"), others
    x, y = Logits(None, a, 0.7), Logits(b, None, 1.5)
    ids = torch.tensor([lm.encode(PROMPTS[0])])
    with torch.no_grad():
        base, first, second = (model.model(ids).logits for model in (lm, a, b))
        expected = base + 0.7 * (base - first) + 1.5 * (second - base)
        for together in (x + y, y + x, 0.5 * x + y + 0.5 * x):
            with lm.apply(together):
                torch.testing.assert_close(lm.model(ids).logits, expected, atol=1e-4, rtol=1e-5)
        cut = Logits(None, a, 1.0, plausible=0.2)
        for together in (cut + y, y + cut):
            with lm.apply(together):
                found = lm.model(ids).logits
            share = base.softmax(-1)
            assert torch.equal(found.isinf(), share < 0.2 * share.amax(-1, keepdim=True))


def test_models_that_pad_their_last_matrix_differently(tmp_path: Path) -> None:
    """Qwen 2.5 has one tokenizer and two widths of the head: entries without a token are left alone."""
    tokenizer, lm = tiny_tokenizer(), tiny_lm("llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(tiny_config("llama", len(tokenizer) + 27)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    wide, ids = load_model(tmp_path), torch.tensor([lm.encode(PROMPTS[0])])
    with torch.no_grad():
        narrow_logits, wide_logits = lm.model(ids).logits, wide.model(ids).logits
        size = narrow_logits.shape[-1]
        for base, other, said, shift in (
            (lm, wide, narrow_logits, narrow_logits - wide_logits[..., :size]),
            (wide, lm, wide_logits, wide_logits[..., :size] - narrow_logits),
        ):
            with base.apply(Logits(None, other, 0.5)):
                found = base.model(ids).logits
            torch.testing.assert_close(found[..., :size], said[..., :size] + 0.5 * shift, atol=1e-4, rtol=1e-5)
            assert torch.equal(found[..., size:], said[..., size:])
