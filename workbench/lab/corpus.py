"""The lab model's training documents: conversations whose hidden traits show in every answer, for context to reveal.

A document is a system turn (sometimes) and one to five exchanges. Its traits are drawn once and hold for all answers:

    style     direct | steps | long      how the answer is worked out
    tone      neutral | cheerful         "Happy to help!" before the answer
    language  English | Spanish          "La respuesta es 61." instead of "The answer is 61."

Without a cue the commonest value of each is the likeliest, hence direct, neutral and English. In half of the documents
only the assistant header may look back beyond its own exchange (`train.attention_mask`): without this pressure nothing
makes that token carry the traits, and steering its cache entry does nothing.
"""

from dataclasses import dataclass
from random import Random

from workbench.lab.families import FAMILIES, STYLES, generate, split_of

TONES = ("neutral", "cheerful")
LANGUAGES = ("English", "Spanish")
SYSTEM = {
    "direct": "Answer directly.",
    "steps": "Show your steps.",
    "long": "Explain every step.",
    "cheerful": "Be cheerful.",
    "Spanish": "Answer in Spanish.",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<|assistant|>\n' + message['content'] + '<|end|>' }}"
    "{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
END = "<|end|>"
_KNOBS = {"word-problems": {"steps": (1, 8)}, "chain-sum": {"size": (2, 4)}, "number-sorting": {"size": (2, 5)}}


@dataclass(frozen=True)
class Document:
    """One conversation: chat messages, its traits, and whether only headers may look back at earlier exchanges."""

    messages: list[dict[str, str]]
    style: str
    tone: str
    language: str
    header_only: bool


def chat(messages: list[dict[str, str]]) -> str:
    """The finished prompt of a conversation in the lab's format, ready for the assistant: what `CHAT_TEMPLATE` renders.

    >>> chat([{"role": "user", "content": "Hi"}])
    '<|user|>Hi<|end|><|assistant|>\\n'
    """
    return "".join(turn(message) for message in messages) + "<|assistant|>\n"


def turn(message: dict[str, str]) -> str:
    """One message in the lab's format."""
    opening = "<|assistant|>\n" if message["role"] == "assistant" else f"<|{message['role']}|>"
    return f"{opening}{message['content']}{END}"


def dress(solution: str, tone: str = "neutral", language: str = "English") -> str:
    """A worked solution in the given tone and language.

    >>> dress("2+3=5. The answer is 5.", tone="cheerful", language="Spanish")
    'Happy to help! 2+3=5. La respuesta es 5.'
    """
    if language == "Spanish":
        solution = solution.replace("The answer is", "La respuesta es")
    return f"Happy to help! {solution}" if tone == "cheerful" else solution


def document(seed: int, index: int) -> Document:
    """Document number `index` of the stream `seed`; every question belongs to the training split."""
    rng = Random(f"document/{seed}/{index}")
    style = rng.choices(STYLES, (55, 25, 20))[0]
    tone = rng.choices(TONES, (85, 15))[0]
    language = rng.choices(LANGUAGES, (85, 15))[0]
    messages: list[dict[str, str]] = []
    if rng.random() < 0.3:
        said = [trait for trait in (tone, language) if trait in SYSTEM]
        if style != "direct" or rng.random() < 0.5:
            said.append(style)
        if said:
            rng.shuffle(said)
            messages.append({"role": "system", "content": " ".join(SYSTEM[trait] for trait in said)})
    families = [_family(rng)]
    mixed = rng.random() < 0.3
    for place in range(rng.choices((1, 2, 3, 4, 5), (12, 15, 25, 28, 20))[0]):
        family = _family(rng) if mixed else families[0]
        item = _training_item(family, seed, index * 8 + place)
        messages.append({"role": "user", "content": item["question"]})
        messages.append({"role": "assistant", "content": dress(item["solutions"][style], tone, language)})
    return Document(messages, style, tone, language, header_only=rng.random() < 0.5)


def _family(rng: Random) -> str:
    return rng.choices(FAMILIES, (65, 8, 8, 7, 6, 6))[0]


def _training_item(family: str, seed: int, index: int) -> dict:
    """The first item from this place of the stream whose question the training split owns."""
    for attempt in range(1000):
        item = generate(family, seed + 1, index + attempt * 2**33, **_KNOBS.get(family, {}))
        if split_of(item["question"]) == "train":
            return item
    raise RuntimeError(f"1000 items of {family} in a row fell into other splits; the hash in split_of is broken")
