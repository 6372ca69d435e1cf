"""A tiny tokenizer of each family, with the special tokens and the decoder that the family has."""

import functools
import json

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import model_cases

TEXT = model_cases.TEXT[:358] + "It isn't over. Grüße, 世界! ☕"
SENTENCE_PIECE = ["<unk>", "<s>", "</s>", "<pad>"]
BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
FAMILIES = ("byte-level", "gpt-neox", "metaspace", "llama", "gemma", "wordpiece", "bert")


@functools.cache
def train_family(family: str) -> Tokenizer:
    """A tokenizer of one family, of at most 300 entries: byte-level has no special token, wordpiece only [UNK]."""
    if family in ("byte-level", "gpt-neox"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        special = ["<|endoftext|>", "<|padding|>"] if family == "gpt-neox" else []
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False
        )
    elif family == "metaspace":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=SENTENCE_PIECE, unk_token="<unk>", show_progress=False
        )
    elif family in ("llama", "gemma"):
        return train_byte_fallback(marks_first_word=family == "llama")
    else:
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        special = BERT if family == "bert" else ["[UNK]"]
        trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    if family == "bert":
        ends = [(name, tokenizer.token_to_id(name)) for name in ("[SEP]", "[CLS]")]
        tokenizer.post_processor = processors.BertProcessing(*ends)
    return tokenizer


def train_byte_fallback(*, marks_first_word: bool) -> Tokenizer:
    """Characters outside the vocabulary are bytes; with marks as Llama's, else as Gemma's."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    space = normalizers.Replace(" ", "▁")
    first = normalizers.Prepend("▁")
    tokenizer.normalizer = normalizers.Sequence([first, space]) if marks_first_word else space
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if marks_first_word else [])])
    plain = "".join(character for character in TEXT if character.isascii())
    data = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[*SENTENCE_PIECE, *data], show_progress=False)
    tokenizer.train_from_iterator(plain.split(), trainer)
    description = json.loads(tokenizer.to_str())
    description["added_tokens"] = description["added_tokens"][: len(SENTENCE_PIECE)]  # bytes have a text
    tokenizer = Tokenizer.from_str(json.dumps(description))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer
