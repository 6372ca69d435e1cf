"""Perplexity of a GPT-NeoX checkpoint on disk against Hugging Face's model alone, and against lm-evaluation-harness."""

import importlib.util
import json
import math
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from new_llm.cli.main import main

CONTEXT, STRIDE = 256, 128


@pytest.fixture(scope="module")
def checkpoint(shared_data: Path, tmp_path_factory) -> Path:
    """A small GPT-NeoX with random weights and the GPT-NeoX tokenizer, as save_pretrained writes them."""
    folder = tmp_path_factory.mktemp("gpt_neox")
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=50304, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=CONTEXT, initializer_range=0.3, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_file=str(shared_data / "tokenizer" / "20B_tokenizer.json"),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
    ).save_pretrained(folder)
    return folder


def read_with_hugging_face(checkpoint: Path, text: str, max_tokens: int | None) -> tuple[float, int]:
    """The guide's loop: windows of CONTEXT every STRIDE tokens, each token scored in the first that reaches it."""
    model = GPTNeoXForCausalLM.from_pretrained(checkpoint).eval()
    ids = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(text).ids
    ids = torch.tensor([ids if max_tokens is None else ids[: max_tokens + 1]])
    total, count, previous_end = 0.0, 0, 0
    for begin in range(0, ids.shape[1], STRIDE):
        end = min(begin + CONTEXT, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : max(0, previous_end - begin)] = -100
        with torch.inference_mode():
            loss = model(input_ids=ids[:, begin:end], labels=labels).loss
        scored = int((labels[:, 1:] != -100).sum())
        total += float(loss) * scored
        count += scored
        previous_end = end
        if end == ids.shape[1]:
            break
    return total, count


@pytest.mark.parametrize("max_tokens", [3_000, pytest.param(None, marks=pytest.mark.slow)])
def test_sliding_window_perplexity_equals_hugging_face_s(shared_data, checkpoint, tmp_path, max_tokens):
    path = shared_data / "wikitext-2" / "wiki.test.raw"
    out = tmp_path / "out.json"
    flags = ["--run", str(checkpoint), "--data.source", str(path), "--context", str(CONTEXT), "--stride", str(STRIDE)]
    limit = [] if max_tokens is None else ["--max-tokens", str(max_tokens)]
    assert main(["evaluate-wikitext", *flags, *limit, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    total, count = read_with_hugging_face(checkpoint, path.read_text(encoding="utf-8"), max_tokens)
    assert record["subject"]["kind"] == "gpt_neox"
    assert record["result"]["num_tokens"] == count
    assert record["result"]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
def test_word_perplexity_and_bits_a_byte_equal_the_harness_s(shared_data, checkpoint, tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    whole = (shared_data / "wikitext-2" / "wiki.test.raw").read_text(encoding="utf-8")
    text = whole[:60_000]
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    model = HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=4, max_length=CONTEXT)
    request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
    (found,) = model.loglikelihood_rolling([request], disable_tqdm=True)
    total = -float(found[0] if isinstance(found, tuple) else found)
    out = tmp_path / "out.json"
    flags = ["--run", str(checkpoint), "--data.source", str(path), "--out", str(out)]
    assert main(["eval", "ppl", *flags, "--protocol", "rolling", "--context", str(CONTEXT)]) == 0
    result = json.loads(out.read_text())["result"]
    assert result["word_perplexity"] == pytest.approx(math.exp(total / len(re.split(r"\s+", text))), rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(total / math.log(2) / len(text.encode()), rel=1e-4)
