"""The lab tokenizer: byte-level BPE over the lab's own text, digits apart, a few hundred tokens, any input encodable.

Leans on the tokenizers library; special tokens mark turns (`corpus.CHAT_TEMPLATE`).
"""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from workbench.lab.corpus import CHAT_TEMPLATE, document

SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
VOCABULARY = 640  # 256 bytes, the special tokens, and the words of the lab's world
CONTEXT = 2048


def train_tokenizer(texts: Iterable[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `vocabulary` tokens; every digit is a token of its own: numbers align by place."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def lab_tokenizer(documents: int = 4000) -> PreTrainedTokenizerFast:
    """The tokenizer of both lab models, from the first documents of a stream that training doesn't use."""
    return train_tokenizer(message["content"] for i in range(documents) for message in document(99, i).messages)
