"""Spans and the arithmetic of interventions against an oracle in plain Python, on cases that hypothesis draws."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny import tiny_lm
from workbench.interventions import Intervention, Residual, load_intervention
from workbench.interventions.residual import Positions, span_mask
from workbench.interventions.residual_plan import plan_residual

WIDTH = 64
VECTORS = [torch.randn(WIDTH, generator=torch.Generator().manual_seed(number)) for number in range(3)]
SMALL = st.integers(-9, 9)
SPANS: st.SearchStrategy[Positions] = st.one_of(
    st.sampled_from(["last", "prompt", "generated", "all"]),
    SMALL,
    st.lists(SMALL, max_size=3).map(tuple),
    st.builds(slice, st.none() | SMALL, st.none() | SMALL, st.none() | st.integers(1, 3)),
)


def inside(positions: Positions, place: int, length: int) -> bool:
    """The oracle: is a token at `place` of its text, whose prompt has `length` tokens, in the span?"""
    if place < 0:
        return False
    if isinstance(positions, str):
        return {"all": True, "prompt": place < length, "last": place == length - 1, "generated": place >= length}[
            positions
        ]
    if isinstance(positions, slice):
        start = positions.start or 0
        start = start + length if start < 0 else start
        stop = positions.stop
        stop = float("inf") if stop is None else stop + length if stop < 0 else stop
        return start <= place < stop and (place - max(start, 0)) % (positions.step or 1) == 0
    places = (positions,) if isinstance(positions, int) else positions
    return any(place == (each + length if each < 0 else each) for each in places)


@settings(max_examples=5000, deadline=None)
@given(SPANS, st.lists(st.tuples(st.integers(1, 8), st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=3))
def test_span_masks_agree_with_the_oracle(positions: Positions, rows: list[tuple[int, int, int]]) -> None:
    """rows: prompt length, padding before the text, tokens that earlier forwards have seen."""
    width = 7
    text = torch.tensor([[seen + column - pad if column >= pad else -1 for column in range(width)]
                         for _, pad, seen in rows])  # fmt: skip
    lengths = torch.tensor([length for length, _, _ in rows])
    expected = [
        [inside(positions, place, length) for place in line]
        for line, (length, _, _) in zip(text.tolist(), rows, strict=True)
    ]
    assert span_mask(positions, text, lengths).tolist() == expected


Spec = tuple[int, int, Positions, str, float, float]
SPECS = st.tuples(
    st.integers(0, 1), st.integers(0, 2), SPANS, st.sampled_from(["add", "ablate", "clamp"]), st.floats(-2, 2),
    st.sampled_from([0.0, -1.0, 0.5, 1.0, 3.0]),
)  # fmt: skip


def made(spec: Spec) -> Residual:
    """The intervention that a draw stands for; made outside of the draw, since the shape checks draw numbers too."""
    layer, number, positions, kind, level, strength = spec
    x = Residual({layer: VECTORS[number]}, positions)
    return strength * (x if kind == "add" else x.ablate() if kind == "ablate" else x.clamp(level))  # type: ignore[return-value]


def moved(rows: list[Intervention | None], hidden: torch.Tensor, text: torch.Tensor, lengths: torch.Tensor) -> list:
    """What the plan makes of the hidden states of both layers."""
    lm = tiny_lm("llama")
    plans, spans = plan_residual(
        [[p for p in (row.parts if row else ()) if isinstance(p, Residual)] for row in rows], lm
    )
    masks = torch.stack([span_mask(span, text, lengths) for span in spans], -1) if spans else None
    numbers = torch.arange(len(hidden))
    return [plans[layer].change(hidden, masks, numbers) if layer in plans else hidden for layer in (0, 1)]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(SPECS, max_size=4), min_size=1, max_size=4))
def test_plans_agree_with_the_definition_and_order_is_no_matter(specs: list[list[Spec]]) -> None:
    rows = [[made(spec) for spec in row] for row in specs]
    hidden = torch.randn(len(rows), 6, WIDTH, generator=torch.Generator().manual_seed(len(rows)))
    text = torch.tensor([[place - row if place >= row else -1 for place in range(6)] for row in range(len(rows))])
    lengths = torch.full((len(rows),), 3)
    sums = [sum(row[1:], row[0]) if row else None for row in rows]
    found = moved(sums, hidden, text, lengths)
    for layer in (0, 1):
        expected = hidden.double().clone()
        for number, row in enumerate(rows):
            for x in row:
                if layer not in x.vectors:
                    continue
                v = x.vectors[layer].double()
                u = v / v.norm()
                for column, place in enumerate(text[number].tolist()):
                    if inside(x.positions, place, 3):
                        h = hidden[number, column].double()
                        change = {"add": v, "ablate": -(h @ u) * u, "clamp": x.level * v - (h @ u) * u}[x.operation]
                        expected[number, column] += x.strength * change
        torch.testing.assert_close(found[layer].double(), expected, atol=1e-4, rtol=1e-4)
    again = moved([sum(row[-2::-1], row[-1]) if row else None for row in rows], hidden, text, lengths)
    for one, other in zip(found, again, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@settings(max_examples=200, deadline=None)
@given(SPECS, st.floats(-3, 3), st.floats(-3, 3))
def test_strengths_add_up_and_saving_keeps_them(spec: Spec, a: float, b: float) -> None:
    x = made(spec)
    hidden = torch.randn(1, 6, WIDTH, generator=torch.Generator().manual_seed(1))
    text, lengths = torch.arange(6)[None], torch.tensor([3])

    def of(change: Intervention) -> torch.Tensor:
        return torch.stack(moved([change], hidden, text, lengths))

    torch.testing.assert_close(of(a * x + b * x), of((a + b) * x), atol=1e-4, rtol=1e-4)
    assert torch.equal(of(0 * x), torch.stack([hidden, hidden]))
    torch.testing.assert_close(of(x - x), torch.stack([hidden, hidden]), atol=1e-4, rtol=1e-4)
    with TemporaryDirectory() as folder:
        back = load_intervention((a * x).save(Path(folder) / "x.safetensors"))
    assert torch.equal(of(back), of(a * x))
