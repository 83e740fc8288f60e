"""One reading pass against loops from the definition: spans, layers, padding, shared beginnings, probes."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.test_extract import PAIRS
from tests.tiny import ARCHITECTURES, FAMILIES, greedy, tiny_lm
from workbench.interventions import extract, probes
from workbench.interventions.reading import Reading, read_pairs
from workbench.interventions.reading_batches import LEAST_SAVED, SHORTEST_PREFIX, TextRow, groups_of
from workbench.interventions.reading_pass import ReadingPass
from workbench.models import LM, ModelError

SHOTS = ["What is one and one? two. What is two and two? four. ", "A dog barks, and a cat says: meow. A cow says moo, "]
SHARED = SimpleNamespace(  # two sets of examples on each side, questions of several lengths
    positive=[f"+ {SHOTS[number % 2]}{'so ' * number}q{number}:" for number in range(6)],
    negative=[f"- {SHOTS[number % 2]}{'so ' * number}q{number}:" for number in range(6)],
)


def alone(lm: LM, text: str) -> tuple[list[torch.Tensor], object]:
    """All states (tokens, d_model) of every block and the cache, from one text alone without any padding."""
    states: list[torch.Tensor] = []
    handles = [
        block.register_forward_hook(
            lambda module, inputs, output: states.append((output[0] if isinstance(output, tuple) else output)[0])
        )
        for block in lm.blocks
    ]
    with torch.no_grad():
        cache = lm.model(torch.tensor([lm.encode(text)]), use_cache=True).past_key_values
    for handle in handles:
        handle.remove()
    return states, cache


def same(found: Reading, wanted: Reading, bound: float = 1e-5) -> None:
    """States, keys and values equal within `bound` of the largest of their kind."""
    stores = [(found.states, wanted.states), (found.keys, wanted.keys), (found.values, wanted.values)]
    for mine, theirs in stores:
        assert mine.keys() == theirs.keys()
        scale = max(tensor.abs().max() for tensor in theirs.values())  # keys of equal tokens have no difference
        for layer, tensor in theirs.items():
            assert (mine[layer] - tensor).abs().max() <= bound * scale


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("positions", "pick"),
    [
        ("last", lambda states: states[-1]),
        ("prompt", lambda states: states.mean(0)),
        (-2, lambda states: states[-2]),
        (0, lambda states: states[0]),
        ((0, -1, -2), lambda states: states[[0, -1, -2]].mean(0) if len(states) > 2 else states.mean(0)),
        (slice(-4, -1), lambda states: states[max(len(states) - 4, 0) : -1].mean(0)),
        (slice(0, None, 2), lambda states: states[::2].mean(0)),
    ],
)
def test_states_are_the_definition(architecture: str, positions: object, pick: Callable[..., torch.Tensor]) -> None:
    lm = tiny_lm(architecture)
    reading = read_pairs(lm, PAIRS, positions=positions, kv=False)
    for side, texts in enumerate((PAIRS.positive, PAIRS.negative)):
        for number, text in enumerate(texts):
            for layer, states in enumerate(alone(lm, text)[0]):
                expected, found = pick(states), reading.states[layer][side, number]
                assert (found - expected).abs().max() <= 2e-5 * states.abs().max()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pairs", [PAIRS, SHARED])
def test_batches_padding_and_order_change_nothing(architecture: str, pairs: SimpleNamespace) -> None:
    lm = tiny_lm(architecture)
    wanted = read_pairs(lm, pairs, batch_size=1)
    for batch_size in (3, None):
        same(read_pairs(lm, pairs, batch_size=batch_size), wanted)
    order = list(range(len(pairs.positive)))[::-1]
    turned = SimpleNamespace(
        positive=[pairs.positive[number] for number in order], negative=[pairs.negative[number] for number in order]
    )
    found = read_pairs(lm, turned)
    for layer, states in wanted.states.items():
        assert (found.states[layer][:, order] - states).abs().max() <= 1e-5 * states.abs().max()
    same(Reading(wanted.states, found.keys, found.values), wanted)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pairs", [PAIRS, SHARED])
def test_every_family_is_read_as_alone(family: str, pairs: SimpleNamespace) -> None:
    lm = tiny_lm(family)
    plain = family != "qwen3_next"  # linear attention has no key and value a token
    reading = read_pairs(lm, pairs, kv=plain)
    for side, texts in enumerate((pairs.positive, pairs.negative)):
        every = [alone(lm, text)[0] for text in texts]
        for layer, states in reading.states.items():
            expected = torch.stack([each[layer][-1] for each in every])
            assert (states[side] - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_left_padded_forwards_of_transformers_agree(architecture: str) -> None:
    lm = tiny_lm(architecture)
    rows = [lm.encode(text) for text in (*PAIRS.positive, *PAIRS.negative)]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    kept = []
    handle = lm.blocks[-1].register_forward_hook(
        lambda module, inputs, output: kept.append((output[0] if isinstance(output, tuple) else output)[:, -1])
    )
    with torch.no_grad():
        lm.model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    handle.remove()
    found = read_pairs(lm, PAIRS, kv=False).states[len(lm.blocks) - 1].flatten(0, 1)
    assert (found - kept[0]).abs().max() <= 1e-5 * kept[0].abs().max()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("batch_size", [1, 2, None])
def test_a_shared_beginning_is_run_once_and_changes_nothing(
    architecture: str, batch_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_lm(architecture)
    tokens, prefixes = [], []
    forward, prefix = ReadingPass._forward, ReadingPass.prefix

    def count(self: ReadingPass, ids: torch.Tensor, cache: object) -> None:
        tokens.append(ids.numel())
        forward(self, ids, cache)

    def note(self: ReadingPass, ids: list[int]) -> object:
        prefixes.append(len(ids))
        return prefix(self, ids)

    monkeypatch.setattr(ReadingPass, "_forward", count)
    monkeypatch.setattr(ReadingPass, "prefix", note)
    shared = read_pairs(lm, SHARED, batch_size=batch_size)
    assert len(prefixes) == 4  # two sets of examples on two sides
    together = sum(tokens)
    monkeypatch.setattr(ReadingPass, "sharable", lambda self: False)
    tokens.clear()
    same(shared, read_pairs(lm, SHARED, batch_size=batch_size))
    assert len(prefixes) == 4
    assert together < 0.6 * sum(tokens)


def test_beginnings_that_are_read_or_depend_on_length_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_lm("llama")
    monkeypatch.setattr(ReadingPass, "prefix", lambda self, ids: pytest.fail("shared"))
    read_pairs(lm, SHARED, positions="prompt")
    read_pairs(lm, SHARED, positions=[3, -1])
    read_pairs(lm, PAIRS)
    for kind in ("dynamic", "longrope"):
        with monkeypatch.context() as patch:
            patch.setattr(lm.model.config, "rope_parameters", {"full_attention": {"rope_type": kind}})
            read_pairs(lm, SHARED)


def test_grouping_saves_the_most_tokens() -> None:
    def rows(*texts: list[int]) -> list[TextRow]:
        return [TextRow(number, ids, (len(ids) - 1,), None) for number, ids in enumerate(texts)]

    first, second, header = list(range(100, 200)), list(range(200, 300)), list(range(40))
    texts = rows(*([*header, *start, 5, number] for number in range(4) for start in (first, second)))
    groups = groups_of(texts, share=True)
    assert sorted((group.prefix, len(group.rows)) for group in groups) == [(141, 4), (141, 4)]
    assert sorted(row.number for group in groups for row in group.rows) == list(range(8))
    assert all(row.ids[: group.prefix] == group.rows[0].ids[: group.prefix] for group in groups for row in group.rows)
    assert [group.prefix for group in groups_of(texts, share=False)] == [0]
    short = rows(*([*range(SHORTEST_PREFIX - 1), 90 + number, number] for number in range(4)))
    assert [group.prefix for group in groups_of(short, share=True)] == [0]
    tail = int(SHORTEST_PREFIX / LEAST_SAVED)
    little = rows(*([*range(SHORTEST_PREFIX), *[90 + number] * tail] for number in range(2)))
    assert [group.prefix for group in groups_of(little, share=True)] == [0]


@pytest.mark.parametrize("seed", range(20))
def test_grouping_is_as_good_as_trying_every_split(seed: int) -> None:
    draw = np.random.default_rng(seed)
    stems = [draw.integers(0, 9, 60).tolist() for _ in range(3)]
    texts = []
    for number in range(7):
        stem = stems[draw.integers(3)][: draw.integers(30, 60)]
        texts.append(TextRow(number, [*stem, *draw.integers(0, 9, 6).tolist()], (len(stem) + 5,), None))
    order = sorted(texts, key=lambda row: row.ids)

    def saved(run: list[TextRow]) -> int:
        prefix = next(
            (k for k, column in enumerate(zip(*(r.ids for r in run), strict=False)) if len(set(column)) > 1), 0
        )
        prefix = min([prefix, *(row.free for row in run)])
        gain = (len(run) - 1) * prefix
        return gain if prefix >= SHORTEST_PREFIX and gain >= LEAST_SAVED * sum(len(row.ids) for row in run) else 0

    best = [0]
    for stop in range(1, len(order) + 1):
        best.append(max(best[start] + saved(order[start:stop]) for start in range(stop)))
    found = sum((len(group.rows) - 1) * group.prefix for group in groups_of(texts, share=True))
    assert found == best[-1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("pairs", [PAIRS, SHARED])
def test_stopping_early_is_bit_equal_and_leaves_the_model_whole(architecture: str, pairs: SimpleNamespace) -> None:
    lm = tiny_lm(architecture)
    hooks = [len(module._forward_hooks) for module in lm.model.modules()]
    state = {name: tensor.clone() for name, tensor in lm.model.state_dict().items()}
    answer = greedy(lm, "one two")
    ran = []
    handle = lm.blocks[-1].register_forward_hook(lambda *_: ran.append(1))
    few, every = read_pairs(lm, pairs, layers=[1, 0]), read_pairs(lm, pairs)
    handle.remove()
    depth = len(ran)
    assert list(few.states) == list(few.keys) == list(few.values) == [0, 1]
    for mine, theirs in ((few.states, every.states), (few.keys, every.keys), (few.values, every.values)):
        for layer in mine:
            assert torch.equal(mine[layer], theirs[layer])
    handle = lm.blocks[-1].register_forward_hook(lambda *_: ran.append(1))
    read_pairs(lm, pairs, layers=0, kv=False)
    handle.remove()
    assert len(ran) == depth
    assert greedy(lm, "one two") == answer
    assert all(torch.equal(tensor, state[name]) for name, tensor in lm.model.state_dict().items())
    assert [len(module._forward_hooks) for module in lm.model.modules()] == hooks


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("deepest", [1, 2])
def test_the_deepest_block_ends_with_its_keys_where_no_state_is_read(architecture: str, deepest: int) -> None:
    lm = tiny_lm(architecture)
    ended: list[int] = []
    handle = lm.blocks[deepest].register_forward_hook(lambda module, inputs, output: ended.extend(inputs[0].shape[1:2]))
    try:
        kv = extract(lm, SHARED, site="kv", layers=range(deepest + 1))
        assert set(ended) <= {1}  # one token alone, to see which keys are rotated
        wanted = read_pairs(lm, SHARED, layers=range(deepest + 1), batch_size=1).kv()
    finally:
        handle.remove()
    assert sum(length > 1 for length in ended) == 12  # one a text, none for the shared beginnings
    for mine, theirs in ((kv.keys, wanted.keys), (kv.values, wanted.values)):
        for layer, tensor in theirs.items():
            torch.testing.assert_close(mine[layer], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_extract_is_a_part_of_the_one_reading(architecture: str) -> None:
    lm = tiny_lm(architecture)
    reading, edit = read_pairs(lm, PAIRS), extract(lm, PAIRS, site="kv")
    for method in probes.METHODS:
        v = extract(lm, PAIRS, method=method)
        for layer, vector in reading.vector(method).vectors.items():
            torch.testing.assert_close(v.vectors[layer], vector, atol=1e-4, rtol=1e-4)
        assert v.details == reading.vector(method).details
    for layer in edit.keys:
        torch.testing.assert_close(reading.kv().keys[layer], edit.keys[layer], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(reading.kv().values[layer], edit.values[layer], atol=1e-4, rtol=1e-4)
    assert reading.kv().rotated == edit.rotated
    assert reading.kv().details == edit.details
    assert list(extract(lm, PAIRS, layers=1).vectors) == [1]
    assert list(extract(lm, PAIRS, site="kv", layers=[2, 1]).values) == [1, 2]


def test_both_ways_of_pca_find_one_direction_up_to_sign() -> None:
    torch.manual_seed(0)
    for pairs in (2, 7, 40):
        states = torch.randn(2, pairs, 24) + torch.randn(24)
        first, second = probes._principal(states), probes._pairwise(states)
        assert torch.cosine_similarity(first, second, dim=0).abs() > 1 - 1e-5
        torch.testing.assert_close(probes.direction_of(states, "pca"), probes.direction_of(states, "pca_pairwise"),
                                   atol=1e-4, rtol=1e-3)  # fmt: skip


def test_auroc_is_held_out_and_counts_the_right_pairs() -> None:
    torch.manual_seed(0)
    states = torch.randn(2, 60, 8)
    states[0, :, 0] += 2.0
    noise = torch.randn(2, 60, 200)  # more dimensions than pairs: every fit on all of it separates
    found = Reading({0: noise, 1: states}).auroc()
    assert list(found.columns) == ["layer", "auroc", "low", "high", "n"]
    assert found.n.tolist() == [60, 60]
    assert found.low[0] < 0.5 < found.high[0] < 0.7
    assert found.low[1] > 0.7
    assert (found.low <= found.auroc).all() and (found.auroc <= found.high).all()
    for layer, each in enumerate((noise, states)):  # the definition: every held-out positive beside every negative
        wins, fold = [], torch.arange(60) % 5
        for number in range(5):
            direction, centre = probes._probe(each[:, fold != number])
            scores = (each[:, fold == number] - centre) @ direction
            wins += [float(a > b) for a in scores[0] for b in scores[1]]
        assert found.auroc[layer] == pytest.approx(np.mean(wins))


def test_auroc_interval_is_the_bootstrap_of_whole_pairs() -> None:
    generator = np.random.default_rng(0)
    shared = generator.normal(size=80)  # a pair's two scores go together
    scores = torch.tensor(np.stack([shared + generator.normal(size=80) + 0.8, shared + generator.normal(size=80)]))
    values = probes._components(scores)

    def share(rows: np.ndarray) -> float:
        return float((scores[0, rows][:, None] > scores[1, rows][None, :]).double().mean())

    assert values.mean().item() == pytest.approx(share(np.arange(80)))
    resampled = [share(generator.integers(0, 80, 80)) for _ in range(2000)]
    found = probes.bootstrap_mean(values.numpy())
    low, high = np.percentile(resampled, [2.5, 97.5])
    assert found.low == pytest.approx(low, abs=0.02)
    assert found.high == pytest.approx(high, abs=0.02)


def test_perfect_separation_is_not_called_certain_and_clusters_widen() -> None:
    torch.manual_seed(0)
    states = torch.randn(2, 20, 4) + torch.tensor([50.0, -50.0])[:, None, None]
    row = Reading({0: states}).auroc().iloc[0]
    assert (row.auroc, row.high) == (1.0, 1.0)
    assert 0.8 < row.low < 0.85  # Wilson's limit of 20 in 20
    few = Reading({0: states}).auroc(folds=2, clusters=[number % 4 for number in range(20)]).iloc[0]
    assert 0.5 < few.low < 0.52  # of 4 in 4
    with pytest.raises(ModelError, match="folds=5 for 4 independent pairs: give 2 to 4"):
        Reading({0: states}).auroc(clusters=[number % 4 for number in range(20)])


def test_reading_under_a_residual_intervention_sees_its_effect() -> None:
    lm = tiny_lm("llama")
    v = extract(lm, SHARED).at(layers=0, positions="last")
    plain = read_pairs(lm, SHARED, kv=False)
    with lm.apply(2 * v):
        found = read_pairs(lm, SHARED, kv=False)
    for layer in (0, 1, 2):
        for side, texts in enumerate((SHARED.positive, SHARED.negative)):
            with lm.apply(2 * v):
                expected = torch.stack([alone(lm, text)[0][layer][-1] for text in texts])
            assert (found.states[layer][side] - expected).abs().max() <= 1e-5 * expected.abs().max()
    moved = plain.states[0] + 2 * v.vectors[0]
    assert (found.states[0] - moved).abs().max() <= 1e-5 * moved.abs().max()
    with lm.apply(extract(lm, SHARED, site="kv")), pytest.raises(ModelError, match="under a KV edit"):
        read_pairs(lm, SHARED)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"positions": "generated"}, "'last', 'prompt', ints or a slice"),
        ({"positions": -3}, "positions=-3 of a prompt of 2 tokens"),
        ({"positions": slice(5, 9)}, "or a slice that holds some"),
        ({"layers": [0, 9]}, r"layers 0 to 2 .*; got \[9\]"),
        ({"layers": []}, r"layers=\[\] asked for"),
    ],
)
def test_what_cannot_be_read_is_explained(arguments: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_pairs(tiny_lm("llama"), PAIRS, **arguments)


def test_what_was_not_read_is_explained() -> None:
    lm = tiny_lm("llama")
    reading = read_pairs(lm, PAIRS, layers=1, kv=False)
    with pytest.raises(ModelError, match=r"layers \[1\] were read"):
        reading.vector(layers=0)
    with pytest.raises(ModelError, match="mean_diff, pca"):
        reading.vector("svm")
    with pytest.raises(ModelError, match="kv=True"):
        reading.kv()
    with pytest.raises(ModelError, match="or kv=False"):
        read_pairs(lm, SimpleNamespace(positive=["a"], negative=["b"]))
    with pytest.raises(ModelError, match="counts from the end"):
        extract(lm, PAIRS, token=0)
    seen: list[tuple[int, int]] = []
    read_pairs(lm, PAIRS, batch_size=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 8), (6, 8), (8, 8)]
