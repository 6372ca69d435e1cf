"""Text shown while it is made is the final text, and continues the prompt, whatever the tokenizer."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from new_llm.models.text_decoding import CONTEXT_TOKENS, StoppingText

TEXTS = [
    "The Congress of the United States met in December. It was cold – 3 °C – and snow fell.",
    "Naïve façades, 你好世界, 🙂🙃 and a family: 👩‍👩‍👧. Then nothing.",
    'He said: "Don\'t!" (twice), and left; the end...',
]


def make_tokenizer(family: str) -> Tokenizer:
    options = {"vocab_size": 420, "show_progress": False}
    if family == "byte-level":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)
    elif family == "llama":  # SentencePiece with bytes for what its vocabulary lacks
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        trainer = trainers.BpeTrainer(special_tokens=["<unk>"], limit_alphabet=40, **options)
    elif family == "metaspace":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", special_tokens=["<unk>"], **options)
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(special_tokens=["[UNK]"], **options)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    if family == "llama":  # the bytes are tokens, but not special ones
        trained = json.loads(tokenizer.to_str())
        vocabulary = trained["model"]["vocab"]
        vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
        tokenizer = Tokenizer.from_str(json.dumps(trained))
    return tokenizer


@pytest.mark.parametrize("family", ["byte-level", "llama", "metaspace", "wordpiece"])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_after_the_prompt(family: str, text: str) -> None:
    tokenizer = make_tokenizer(family)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    whole = tokenizer.decode(ids)
    for cut in range(1, len(ids)):
        prompt = tokenizer.decode(ids[:cut])
        if "\ufffd" in prompt[-4:]:  # within a character
            continue
        decoder = StoppingText(tokenizer, context=ids[:cut][-CONTEXT_TOKENS:])
        pieces = [decoder.push(token) for token in ids[cut:]]
        shown = "".join([*pieces, decoder.finish()])
        assert prompt + shown == whole
