"""A character-level tokenizer: every character one token, so that text and token ids are the same thing.

Knows nothing of models. Neighbours: `checkpoint.py` saves it beside the weights.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIALS = ("<pad>", "<bos>", "<eos>")  # ids 0, 1, 2, as in `ReasonerConfig.small`

# A turn is its content and a newline; an assistant's turn ends with <eos> instead. The generation prompt adds nothing.
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)


def char_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """One token for each character of `alphabet` and for the newline, after <pad>, <bos> and <eos>.

    `decode(encode(text)) == text` for every text over the alphabet; a character outside it raises.
    Encoding adds nothing.

    Example:
        char_tokenizer("0123456789+= ")("1+2 =\\n").input_ids
    """
    if not alphabet:
        raise ValueError("alphabet is empty: give the characters that prompts and answers are written in")
    characters = sorted({*alphabet, "\n"})
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))  # not in the vocabulary: unknown raises
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    pad, bos, eos = SPECIALS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE,
    )
