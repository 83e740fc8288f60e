"""The residual stream taken apart, and its pictures, on blocks of many kinds."""

import pytest
import torch

from tests.tiny import FAMILIES, tiny_lm
from workbench.interventions.heads import heads_of
from workbench.models import LM
from workbench.plots import inside as drawn
from workbench.plots.drawing import PlotError
from workbench.report.svg import alt_text, figure_to_svg
from workbench.teaching import inside

PROMPT = "2 + 3 = 5, 4 + 4 ="


@pytest.mark.parametrize("family", [*FAMILIES, "opt", "gpt_oss", "gptj"])
def test_parts_add_up_to_the_last_state(family: str) -> None:
    lm = tiny_lm(family)
    stream = inside.residual_stream(lm, PROMPT)
    total = torch.stack(list(stream.parts.values())).sum(0)
    assert (total - stream.states[-1]).norm() < 2e-3 * stream.states[-1].norm()
    expected = list(range(len(lm.blocks))) if family == "granite" else []  # it multiplies what is added
    assert stream.unsplit == expected
    assert stream.norms()[-1]["stream"] == pytest.approx(float(stream.states[-1][-1].norm()), rel=2e-3)


def test_parts_are_what_attention_and_mlp_wrote(lab: LM) -> None:
    hooks = [len(block._forward_hooks) + len(block._forward_pre_hooks) for block in lab.blocks]
    stream = inside.residual_stream(lab, PROMPT)
    assert hooks == [len(block._forward_hooks) + len(block._forward_pre_hooks) for block in lab.blocks]
    seen = []
    handle = heads_of(lab, 2).module.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    with torch.no_grad():
        ids = torch.tensor([lab.encode(PROMPT)])
        states = lab.model(ids, output_hidden_states=True).hidden_states
    handle.remove()
    torch.testing.assert_close(stream.parts["attention 2"], seen[0])
    torch.testing.assert_close(stream.parts["embedding"], states[0][0])
    torch.testing.assert_close(stream.states[2], states[3][0])
    torch.testing.assert_close(torch.stack(list(stream.parts.values())).sum(0), stream.states[-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_whole_matrix_is_the_layers_own_weight(family: str) -> None:
    lm = tiny_lm(family)
    name, module = inside.writing_matrix(lm, 1)
    assert name.endswith(("mlp.down_proj", "mlp.c_proj"))
    weight = lm.model.get_parameter(f"{name}.weight")
    torch.testing.assert_close(inside.whole_matrix(lm, module), weight.T if family == "gpt2" else weight)


def test_pictures_have_words_and_can_be_printed(lab: LM) -> None:
    tokens = [lab.tokenizer.decode([token]) for token in lab.encode(" The\n4")]
    figures = [
        drawn.stream_norms(inside.residual_stream(lab, PROMPT).norms()),
        drawn.forwarded_tokens([{"way": w, "step": s, "forwarded": s} for w in ("with", "without") for s in (1, 2)]),
        drawn.token_effects(tokens, [0.1] * len(tokens), "Effect", "nats"),
        drawn.adapter_sizes([1, 4, 16], 256, 128),
    ]
    for figure in figures:
        assert len(alt_text(figure)) > 40
        assert "<svg" in figure_to_svg(figure)
    assert "rotate" in figure_to_svg(figures[2])
    assert figures[2].layout.xaxis.ticktext[:2] == ("·The", "↵")
    with pytest.raises(PlotError, match="as many numbers"):
        drawn.token_effects(["a"], [], "Effect", "nats")
