"""The tiny reasoner's tokenizer: one token a word, one token a digit.

Words carry their leading space (``▁buys``), a number's first digit does and its others do not (``▁1`` ``9``), so
decoding gives back the exact text. Built from the world's own word list; nothing is learnt.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mechreward.tiny.world import DAYS, NAMES, THEMES

BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"


def words() -> list[str]:
    """Every word a problem or a chain can hold, in a fixed order."""
    texts = [text for theme in THEMES for text in (theme.opening, *theme.gains, *theme.losses, theme.ask)]
    plain = {word for text in texts for word in text.split() if "{" not in word}
    return sorted(plain | {*DAYS, *NAMES} | set("on , . : + - = ####".split()))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A fresh tokenizer for the tiny world; adds BOS in front, pads on the left."""
    digits = [str(d) for d in range(10)]
    pieces = [BOS, EOS, PAD, UNK, *digits, *("▁" + d for d in digits), *("▁" + w for w in words())]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
            pre_tokenizers.Split(Regex("▁?[0-9]"), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, pieces.index(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, unk_token=UNK, padding_side="left"
    )
