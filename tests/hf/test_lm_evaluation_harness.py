"""lm-evaluation-harness on exported memory models, through `new-llm lm-eval`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from new_llm.cli.main import main
from new_llm.models import TransformerLM
from new_llm.models.hf import export_auto
from tiny import make_model

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


def test_without_the_harness_one_line_says_how_to_get_it(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name))
    assert main(["lm-eval", "--tasks", "x"]) == 2
    assert capsys.readouterr().err == (
        "new-llm: lm-evaluation-harness is not installed: pip install 'new-llm[lm-eval]'\n"
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tokenizer) -> tuple[Path, TransformerLM]:
    model = make_model("infini", 384, spread=0.2).eval()
    folder = tmp_path_factory.mktemp("exported")
    export_auto(model, folder, tokenizer)
    return folder, model


@needs_harness
def test_a_local_task_of_every_request_type(tmp_path, exported):
    """Log-likelihoods, rolling log-likelihoods over several segments and generation, as the command runs them."""
    folder, model = exported
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({**question, "page": PAGE}) + "\n" for question in QUESTIONS))
    for name, text in TASKS.items():
        head = f"task: local_{name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        (tmp_path / f"{name}.yaml").write_text(f"{head}test_split: test\n{text}")
    command = [sys.executable, "-m", "new_llm.cli.main", "lm-eval", "--model", "hf", "--device", "cpu",
               "--model_args", f"pretrained={folder}", "--tasks", ",".join(f"local_{name}" for name in TASKS),
               "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out.json"), "--log_samples",
               "--batch_size", "2"]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
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
