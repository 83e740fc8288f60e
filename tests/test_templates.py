"""Every chat template that TRL ships with assistant markers: its mask beside ours, which needs no markers.

The tokenizer is made from the template's own text: one token for each special token, one for each run of line breaks
(as the models' tokenizers have it), else one a character. Where the two masks differ, the difference is named below and
asserted to the token; where `encode` refuses, so is the reason.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import chat_template_utils

from workbench.finetuning.packing import IGNORED, encode
from workbench.models import LM, load_model
from workbench.synthesis.records import RecordError

FOLDER = Path(chat_template_utils.__file__).parent / "chat_templates"
ALL = {file.stem: file.read_text(encoding="utf-8") for file in sorted(FOLDER.glob("*.jinja"))}
MARKED = [name for name, text in ALL.items() if chat_template_utils.has_generation_markers(text)]
ORIGINALS = [name for name in ALL if f"{name}_training" in ALL]

# Tokens that end generation, from the models' own generation configs; the first is the tokenizer's end of text.
ENDS = {
    "cohere": ["<|END_OF_TURN_TOKEN|>"], "deepseek": ["<｜end▁of▁sentence｜>"], "diffusion_gemma": ["<turn|>"],
    "gemma4": ["<turn|>"], "gemma": ["<eos>", "<end_of_turn>"], "glm": ["<|endoftext|>", "<|user|>", "<|observation|>"],
    "gptoss": ["<|return|>", "<|call|>"], "idefics3": ["<end_of_utterance>"], "smolvlm": ["<end_of_utterance>"],
    "lfm2": ["<|im_end|>"], "llama3": ["<|eot_id|>"], "llava": ["</s>"], "muse": ["<|eot|>"],
    "nemotron": ["<|im_end|>"], "phi3": ["<|endoftext|>", "<|end|>"], "qwen": ["<|im_end|>"],
}  # fmt: skip
USER, ANSWER = {"role": "user", "content": "7*8?"}, {"role": "assistant", "content": "It is 56."}
EARLIER = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "It is 2."}]
THOUGHTS = {"role": "assistant", "content": "<think>\n50+6\n</think>\n\nIt is 56."}
CHATS = {
    "plain": [USER, ANSWER],
    "system": [{"role": "system", "content": "Be short."}, USER, ANSWER],
    "turns": [*EARLIER, USER, ANSWER],
    "thoughts": [USER, THOUGHTS],
}
NEMOTRON = ("nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra", "nemotron_3_5_lightning")

# 1. TRL also learns the line break after the stop token. Generation has stopped by then, so we do not.
LINE_BREAK = (
    "diffusion_gemma", "gemma", "gemma3", "lfm2", "lfm2_v2", "lfm2_2_5", "lfm2_2_5_v2", "lfm2_2_5_vl", *NEMOTRON,
    "qwen2_5", "qwen2_5_vl", "qwen3", "qwen3_vl", "qwen3_instruct_2507", "qwen3_5_nothink", "qwen3_5_think", "qwen3_6",
    "qwen3_8",
)  # fmt: skip
# 2. TRL's markers begin before the end of the generation prompt: what the model is given it need not learn to write.
GIVEN = {
    "deepseek_r1_distill": "<｜Assistant｜><think>\n",
    **dict.fromkeys(("gptoss", "muse_glimmer"), "<|start|>assistant"),
    "qwen2_5": "\n", "qwen3_5_nothink": "<think>\n\n</think>\n\n", "qwen3_5_think": "<think>\n", "qwen3_6": "<think>\n",
    **dict.fromkeys(NEMOTRON, "<think>\n"),
}  # fmt: skip
# 3. Refused by encode, and rightly: the training text would be another than the one that the model is asked with.
PARTS = "not the beginning of prompt plus answer"
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    # the generation prompt opens a block for thoughts, the answer is rendered without one
    "deepseek_r1_distill": (("plain", "system", "turns"), PARTS),
    "deepseekv3": (tuple(CHATS), PARTS),  # and it drops thoughts from answers
    **dict.fromkeys(NEMOTRON, (("plain", "system", "turns"), PARTS)),
    "qwen3_5_think": (("plain", "system", "turns"), PARTS),  # the prompt's line break merges with the empty block's
    "qwen3_6": (("plain", "system", "turns"), PARTS),
    "qwen3_8": (tuple(CHATS), PARTS),  # reads thoughts from a field of their own and writes an empty block
    "qwen3_5_nothink": (("thoughts",), PARTS),  # the prompt holds an empty block, the answer brings a full one
    "gemma": (("system",), r"refuses the messages \(system, user, assistant\): System role not supported"),
    # templates for pictures, which take lists of parts only: plain text is dropped, or an error of the template
    "idefics3": (tuple(CHATS), r"leaves words of the answer '.*' out; it wrote ' <end_of_utterance>"),
    "smolvlm": (tuple(CHATS), r"leaves words of the answer '.*' out; it wrote ' <end_of_utterance>"),
    "llava_next": (tuple(CHATS), r"refuses the messages \(.*\): 'str object' has no attribute 'text'"),
}
# 4. Only in the original templates, those that a user's tokenizer has
ONLY_ORIGINAL: dict[str, tuple[tuple[str, ...], str]] = {
    "deepseek_r1_distill": (tuple(CHATS), PARTS),  # drops the thoughts that the training template keeps
    "glm4moe": (tuple(CHATS), "holds no stop token"),  # the next turn's role ends an answer, and there is none
}


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    text, ends = ALL[name], ends_of(name)
    tags = re.findall(r"<[|｜]?/?[A-Za-z_▁|｜]+[|｜]?>|\[/?[A-Z]\w+\]", text)
    special = list(dict.fromkeys(["<pad>", "<s>", *ends, *tags]))
    other = ["\n", "\n\n", "\n\n\n", "\t", *map(chr, range(32, 127)), *(sign for sign in text if ord(sign) > 126)]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*special, *other]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("\n+|[\\s\\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    named = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": ends[0]}
    rest = [token for token in special if token not in named.values()]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named, extra_special_tokens=rest)
    fast.chat_template = text
    return fast


def ends_of(name: str) -> list[str]:
    return next(ends for family, ends in ENDS.items() if name.startswith(family))


@pytest.fixture(scope="module")
def model_of(tiny: Callable[[str], Path]) -> Callable[[str], LM]:
    """A model whose tokenizer and stop tokens are those of a template; its weights are never used."""
    base = load_model(tiny("llama"))

    def make(name: str) -> LM:
        lm = replace(base, tokenizer=tokenizer_of(name))
        lm.model.generation_config.eos_token_id = [lm.tokenizer.convert_tokens_to_ids(end) for end in ends_of(name)]
        return lm

    return make


def learnt(lm: LM, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """All tokens, and the places of those that `encode` learns."""
    example = encode(lm, {"messages": messages}, "here")
    return example.input_ids, [place for place, label in enumerate(example.labels) if label != IGNORED]


def marked(lm: LM, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """All tokens, and the places that TRL's markers learn after the last question."""
    found = lm.tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, question = found["input_ids"], lm.tokenizer(messages[-2]["content"], add_special_tokens=False)["input_ids"]
    start = max(place for place in range(len(ids)) if ids[place : place + len(question)] == question)
    return ids, [place for place, mark in enumerate(found["assistant_masks"]) if mark and place > start]


def refusal(name: str, case: str, original: bool = False) -> str | None:
    tables = [ONLY_ORIGINAL, REFUSED] if original else [REFUSED]
    return next((why for table in tables for cases, why in [table.get(name, ((), ""))] if case in cases), None)


@pytest.mark.parametrize("case", CHATS)
@pytest.mark.parametrize("template", MARKED)
def test_the_mask_is_that_of_the_markers(template: str, case: str, model_of: Callable[[str], LM]) -> None:
    lm, messages, name = model_of(template), CHATS[case], template.removesuffix("_training")
    if why := refusal(name, case):
        with pytest.raises(RecordError, match=why):
            encode(lm, {"messages": messages}, "here")
        return
    ids, ours = learnt(lm, messages)
    same_ids, theirs = marked(lm, messages)
    assert ids == same_ids
    assert lm.tokenizer.decode([ids[place] for place in ours]).endswith(tuple(ends_of(name)))
    assert ours == list(range(ours[0], ours[-1] + 1))
    before = [place for place in theirs if place < ours[0]]
    after = [place for place in theirs if place > ours[-1]]
    assert theirs == [*before, *ours, *after]
    assert lm.tokenizer.decode([ids[place] for place in before]) == GIVEN.get(name, "")
    assert lm.tokenizer.decode([ids[place] for place in after]) == ("\n" if name in LINE_BREAK else "")


@pytest.mark.parametrize("case", CHATS)
@pytest.mark.parametrize("name", ORIGINALS)
def test_a_models_own_template_teaches_what_the_marked_one_does(
    name: str, case: str, model_of: Callable[[str], LM]
) -> None:
    """Users have the original in their tokenizer; TRL swaps it for the marked one, we read it as it is."""
    lm, messages = model_of(name), CHATS[case]
    if why := refusal(name, case, original=True):
        with pytest.raises(RecordError, match=why):
            encode(lm, {"messages": messages}, "here")
        return
    texts = []
    for template in (name, f"{name}_training"):
        lm = model_of(template)
        ids, places = learnt(lm, messages)
        texts.append(lm.tokenizer.decode([ids[place] for place in places]))
    assert texts[0] == texts[1]
    assert chat_template_utils.get_training_chat_template(model_of(name).tokenizer) == ALL[f"{name}_training"]


def test_every_family_of_the_installed_trl_was_looked_at() -> None:
    """A template that a later release adds has to be named here."""
    assert len(MARKED) >= 34
    named = {*LINE_BREAK, *GIVEN, *REFUSED, *ONLY_ORIGINAL}
    assert named <= {name.removesuffix("_training") for name in ALL}
    plain = {name.removesuffix("_training") for name in MARKED} - named
    assert plain == {"cohere", "cohere2", "llama3", "phi3", "phi3_5"}, "neither compared as equal before nor explained"


def test_the_last_of_two_stop_tokens_is_learnt(model_of: Callable[[str], LM]) -> None:
    """Phi 3 writes one at the end of a turn and one at the end of the text; TRL learns both, and so do we."""
    lm: Any = model_of("phi3")
    ids, places = learnt(lm, CHATS["plain"])
    assert lm.tokenizer.decode([ids[place] for place in places]) == "It is 56.<|end|>\n<|endoftext|>"


def test_a_long_answer_that_a_template_drops_is_refused(model_of: Callable[[str], LM]) -> None:
    answer = {"role": "assistant", "content": "It is 56. " * 50}
    with pytest.raises(RecordError, match="leaves words of the answer"):
        encode(model_of("smolvlm"), {"messages": [USER, answer]}, "here")
