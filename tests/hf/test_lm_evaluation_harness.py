"""lm-evaluation-harness on exported memory models, through `new-llm lm-eval`."""

import importlib.util
import json
import math
import re

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from new_llm.cli.main import main
from new_llm.models.hf import export_auto
from tiny import make_model, run_python

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
QUESTIONS = [
    {"question": "The Congress of the", "choices": [" United States", " potato"], "answer": " United States"},
    {"question": "Fellow-citizens of the Senate", "choices": [" xylophone", " and House"], "answer": " and House"},
]
PAGE = "It is the duty of the Congress to provide for the common defence. " * 4
TASKS = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{choices.index(answer)}}"
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
""",
    "continued": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["@@"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


@needs_harness
def test_a_local_task_of_every_request_type(tmp_path, tokenizer):
    """Log-likelihoods, rolling log-likelihoods over several segments and generation, as the command runs them."""
    model, folder = make_model("infini", 384, spread=0.2).eval(), tmp_path / "exported"
    export_auto(model, folder, tokenizer)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({**question, "page": PAGE}) + "\n" for question in QUESTIONS))
    for name, text in TASKS.items():
        head = f"task: local_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        (tmp_path / f"{name}.yaml").write_text(f"{head}test_split: test\n{text}")
    flags = ["--model", "hf", "--device", "cpu", "--model_args", f"pretrained={folder}", "--batch_size", "2"]
    flags += ["--tasks", ",".join(f"local_{name}" for name in TASKS), "--include_path", tmp_path, "--log_samples"]
    command = ["-m", "new_llm.cli.main", "lm-eval", *flags, "--output_path", tmp_path / "out.json"]
    run_python(*command, cwd=tmp_path, HF_HUB_OFFLINE="1", HF_DATASETS_CACHE=str(tmp_path / "cache"))
    results = json.loads(next(tmp_path.rglob("out*.json")).read_text())["results"]
    assert results.keys() == {f"local_{name}" for name in TASKS}

    wrapped = AutoTokenizer.from_pretrained(folder)

    def score(context: list[int], text: list[int]) -> float:
        """Our own log-likelihood of a text after its context."""
        ids = torch.tensor([context + text])
        with torch.no_grad():
            losses = model.token_losses(ids, ids)[0]
        return -float(losses[len(context) - 1 : len(context) - 1 + len(text)].sum())

    page = wrapped(PAGE).input_ids
    assert len(page) > 3 * model.segment_length
    bits = -score([0], page) / torch.log(torch.tensor(2.0)).item() / len(PAGE.encode())
    assert results["local_rolling"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    samples = {path.name: path for path in tmp_path.rglob("samples_*.jsonl")}
    chosen = next(path for name, path in samples.items() if "choice" in name)
    for line in map(json.loads, chosen.read_text().splitlines()):
        context = wrapped(line["doc"]["question"]).input_ids
        for choice, response in zip(line["doc"]["choices"], line["filtered_resps"], strict=True):
            whole = wrapped(line["doc"]["question"] + choice).input_ids
            assert float(response[0]) == pytest.approx(score(context, whole[len(context) :]), abs=1e-3)
    continued = next(path for name, path in samples.items() if "continued" in name)
    for line in map(json.loads, continued.read_text().splitlines()):
        ids = torch.tensor([wrapped(line["doc"]["question"]).input_ids])
        new, _ = model.generate(ids, max_new_tokens=6, eos_token_id=0)
        assert line["resps"][0][0] == wrapped.decode(new[0, ids.shape[1] :], skip_special_tokens=True)


# Perplexity of a GPT-NeoX checkpoint on disk against Hugging Face's model alone, and against lm-evaluation-harness


CONTEXT, STRIDE = 256, 128


@pytest.fixture(scope="module")
def checkpoint(shared_data, tmp_path_factory):
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


@pytest.mark.parametrize("max_tokens", [3_000, pytest.param(None, marks=pytest.mark.slow)])
def test_sliding_window_perplexity_equals_hugging_face_s(shared_data, checkpoint, tmp_path, max_tokens):
    path = shared_data / "wikitext-2" / "wiki.test.raw"
    out = tmp_path / "out.json"
    flags = ["--run", str(checkpoint), "--data.source", str(path), "--context", str(CONTEXT), "--stride", str(STRIDE)]
    limit = [] if max_tokens is None else ["--max-tokens", str(max_tokens)]
    assert main(["evaluate-wikitext", *flags, *limit, "--out", str(out)]) == 0
    record = json.loads(out.read_text())
    # The guide's loop: windows of CONTEXT every STRIDE tokens, each token scored in the first that reaches it.
    model = GPTNeoXForCausalLM.from_pretrained(checkpoint).eval()
    ids = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(path.read_text(encoding="utf-8")).ids
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
    assert record["subject"]["kind"] == "gpt_neox"
    assert record["result"]["num_tokens"] == count
    assert record["result"]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


@pytest.mark.slow
@needs_harness
def test_word_perplexity_and_bits_a_byte_equal_the_harness_s(shared_data, checkpoint, tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    text = (shared_data / "wikitext-2" / "wiki.test.raw").read_text(encoding="utf-8")[:60_000]
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
