"""A small byte-level BPE of the project's own, trained on the text the small language model will read."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from regiongpt.prompts import IMAGE_TOKEN, REGION_TOKEN, chat_template, closed_set_suffix


def train_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Trains the tokenizer: bytes, so that nothing is unknown; digits alone, so that ``Region [12]`` can be read off.

    The closed-set suffix ends so many prompts that it has a token of its own.

    Args:
        texts: Lines to learn merges from.
        vocab_size: Tokens in all, the special ones included.
        max_length: Positions of the language model.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", IMAGE_TOKEN, REGION_TOKEN]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([" " + closed_set_suffix()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=[IMAGE_TOKEN, REGION_TOKEN],
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = chat_template("plain")
    return fast
