"""The lab's world: exact worked steps, splits that never meet, the attention mask, and the shipped models' cards."""

import json
import re
from importlib.util import find_spec

import pytest
import torch

from tests.conftest import LAB
from workbench.evaluation import evaluate
from workbench.files import sha256
from workbench.interventions import extract
from workbench.lab import families
from workbench.lab.corpus import CHAT_TEMPLATE, chat, document, dress
from workbench.lab.tokenizer import train_tokenizer
from workbench.lab.train import RECIPES, Recipe, attention_mask, batches, build, encode, loss_of, schedule
from workbench.models import LM
from workbench.prompts import contrast, few_shot
from workbench.tasks import Task, load_task

EQUATION = re.compile(r"(-?\d+)([-+*/])(\d+)=(-?\d+)")
GYM = pytest.mark.skipif(
    find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed (make reasoning-gym)"
)


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f == "word-problems" else GYM) for f in families.FAMILIES]
)
def test_worked_steps_are_true_and_end_in_the_answer(family: str) -> None:
    for index in range(60):
        item = families.generate(family, 3, index)
        assert item == families.generate(family, 3, index)
        assert set(item["solutions"]) == set(families.STYLES)
        for solution in item["solutions"].values():
            assert solution.endswith(f"The answer is {item['answer']}.")
            for left, sign, right, result in EQUATION.findall(solution):
                assert eval(f"{left}{sign}{right}") == int(result), solution


@GYM
def test_drawn_families_agree_with_reasoning_gym_s_own_scorer() -> None:
    import reasoning_gym

    for index in range(40):
        entry = reasoning_gym.create_dataset("leg_counting", seed=0, size=2**40, min_animals=2, max_animals=3,
                                             min_instances=1, max_instances=9)  # fmt: skip
        item = families.generate("leg-counting", 5, index)
        place = 5 * families._STREAM + index
        assert entry.score_answer(item["answer"], entry[place]) == 1.0


def test_unknown_family_and_knob_are_refused() -> None:
    with pytest.raises(ValueError, match="Families: word-problems"):
        families.generate("word-problem", 0, 0)
    with pytest.raises(ValueError, match="doesn't take"):
        families.generate("word-problems", 0, 0, terms=3)


@GYM
def test_training_documents_hold_training_questions_only() -> None:
    styles = set()
    for index in range(200):
        doc = document(0, index)
        styles.add(doc.style)
        for message in doc.messages:
            if message["role"] == "user":
                assert families.split_of(message["content"]) == "train"
    assert styles == set(families.STYLES)


def test_test_questions_are_not_training_questions(word_problems: Task) -> None:
    for split in ("tuning", "test"):
        assert {families.split_of(row["question"]) for row in word_problems.rows(split, n=50)} == {split}


def test_dress_changes_tone_and_language_only() -> None:
    assert dress("2+3=5. The answer is 5.") == "2+3=5. The answer is 5."
    assert dress("The answer is 5.", "cheerful", "Spanish") == "Happy to help! La respuesta es 5."


@GYM
def test_template_and_encoding_agree() -> None:
    """What training sees is what a rendered conversation tokenizes to."""
    tokenizer = train_tokenizer((message["content"] for i in range(50) for message in document(9, i).messages), 400)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    for index in range(5):
        doc = document(1, index)
        rendered = tokenizer.apply_chat_template(doc.messages, tokenize=False)
        encoded = encode(tokenizer, doc)
        whole = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        assert whole[: len(encoded.ids)] == encoded.ids
        questions = [message for message in doc.messages if message["role"] != "assistant"][:1]
        assert chat(questions) == tokenizer.apply_chat_template(questions, tokenize=False, add_generation_prompt=True)
        said = [token for token, own in zip(encoded.ids, encoded.said, strict=True) if own]
        assert said.count(tokenizer.eos_token_id) == sum(message["role"] == "assistant" for message in doc.messages)


@GYM
def test_only_headers_look_back_in_header_only_rows() -> None:
    tokenizer = train_tokenizer((message["content"] for i in range(50) for message in document(9, i).messages), 400)
    docs = [document(1, index) for index in range(30)]
    rows = [encode(tokenizer, doc) for doc in docs]
    width = max(len(row.ids) for row in rows)
    mask = attention_mask(rows, width)
    assert mask.shape == (30, 1, width, width)
    for place, row in enumerate(rows):
        for query in range(0, len(row.ids), 7):
            for key in range(0, len(row.ids), 5):
                near = row.exchange[query] == row.exchange[key]
                allowed = key <= query and (near or not row.header_only or row.header[query])
                assert bool(mask[place, 0, query, key]) == allowed


@GYM
def test_training_lowers_the_loss() -> None:
    recipe = Recipe(hidden=64, layers=2, intermediate=128, heads=2, key_value_heads=1, steps=30, batch_tokens=1024)
    tokenizer = train_tokenizer((message["content"] for i in range(50) for message in document(9, i).messages), 400)
    model = build(recipe, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    stream, losses = batches(tokenizer, recipe), []
    for _ in range(recipe.steps):
        loss = loss_of(model, next(stream), tokenizer.pad_token_id)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


def test_schedule_warms_up_and_decays() -> None:
    assert schedule(0, 1000) < schedule(99, 1000) == 1.0 == schedule(499, 1000)
    assert 1.0 > schedule(500, 1000) > schedule(900, 1000) > schedule(1000, 1000) > 0


@pytest.mark.parametrize("name", list(RECIPES))
def test_card_names_the_shipped_weights(name: str) -> None:
    folder = LAB.parent / name
    if not folder.exists():
        pytest.skip(f"{folder} holds no model yet; make it with: make lab-model")
    card = json.loads((folder / "card.json").read_text())
    assert card["sha256"] == sha256(folder / "model.safetensors")
    assert card["sha256"] in (folder / "README.md").read_text()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 10e6


@pytest.mark.slow
def test_lab_shows_its_effects(lab: LM, word_problems: Task) -> None:
    """A smaller version of the card: what context, a vector and a cache edit do, with margins for the smaller n."""
    chosen = json.loads((LAB / "card.json").read_text())["measured"]["chosen"]
    pairs = contrast(word_problems, shots=3, n=60, lm=lab)
    place, edit = chosen["residual-steered"], chosen["KV-steered"]
    conditions = {
        "plain": [],
        "few-shot steps": [few_shot("steps", 3)],
        "residual-steered": [
            place["strength"] * extract(lab, pairs).at(layers=[int(place["layer"])], positions=place["span"])
        ],
        "KV-steered": [extract(lab, pairs, site="kv").scaled(keys=edit["keys"], values=edit["strength"])],
    }
    results = evaluate(lab, word_problems, conditions, n=60, max_new_tokens=200)
    table = results.table().set_index("condition")
    assert table.steps["plain"] <= 0.3
    assert table.accuracy["plain"] <= 0.65
    for name in list(conditions)[1:]:
        assert table.steps[name] >= 0.7
        assert results.compare("plain", name).low > 0


@GYM
def test_lab_tasks_load_by_name() -> None:
    for family in families.FAMILIES:
        task = load_task(family)
        row = task.rows("test", n=1)[0]
        assert task.verify(row, row["solutions"]["steps"]).correct
