"""`new-llm export`: a run's model for Hugging Face's tools, with a card of the run's figures."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from model_cases import text_ids
from new_llm.cli.main import main
from new_llm.config import PythiaConfig
from new_llm.data.tokenizer import padded_vocab_size
from new_llm.experiments.subject import export_run
from new_llm.models import create_model, load_model, save_model
from new_llm.models.hf import load_pythia
from new_llm.models.model_file import describe_model
from tokenizer_families import FAMILIES, train_family

END = "<|endoftext|>"
SENTENCE_PIECE = ["<s>", "</s>", "<pad>", "<unk>"]
SPECIAL_TOKENS = {
    "byte-level": [END, END, END, None],  # it has none: one of the model's unused rows is taken
    "gpt-neox": [END, END, "<|padding|>", None],
    "wordpiece": [END, END, END, "[UNK]"],
    "bert": ["[CLS]", "[SEP]", "[PAD]", "[UNK]"],
    **dict.fromkeys(("metaspace", "llama", "gemma"), SENTENCE_PIECE),
}
RESULT = {
    "training": {"tokens": 482619, "steps": 120, "best_epoch": 3, "seconds": 99.9},
    "evaluation": {
        "sliding": {"perplexity": 184.06, "bits_per_byte": 1.694, "num_tokens": 54886},
        "streaming": {"perplexity": 181.2, "bits_per_byte": 1.68, "num_tokens": 54886},
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def run_folder(untrained_run, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "tiny"
    shutil.copytree(untrained_run, run)
    (run / "infini" / "result.json").write_text(json.dumps(RESULT))
    (run / "data.json").write_text(json.dumps({"source": "sotu", "train": {"num_documents": 234}}))
    (run / "environment.json").write_text(json.dumps({"command": "new-llm experiment --config /home/ada/a.yaml"}))
    return run


def test_a_memory_model_with_its_card(run_folder, tmp_path, capsys):
    out = tmp_path / "out" / "infini"
    assert main(["export", "--run", str(run_folder), "--model", "infini", "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    loaded = AutoModelForCausalLM.from_pretrained(out)
    best = load_model(run_folder / "infini" / "best").eval()
    ids = text_ids(2, 40)
    with torch.no_grad():
        assert torch.equal(loaded(ids, use_cache=False).logits, best(ids))
    assert AutoTokenizer.from_pretrained(out).eos_token_id == 0
    card = (out / "README.md").read_text()
    for line in (
        "library_name: transformers",
        "import new_llm.models.hf",
        "| tokens read | 482,619 |",
        "| trained on | sotu |",
        "| command | `new-llm experiment --config ~/a.yaml` |",
        "| streaming perplexity | 181.2 |",
        f"| parameters | {best.num_parameters()['total']:,} |",
        f"| memory | {best.memory_info()['total_bytes']:,} bytes |",
    ):
        assert line in card


def test_a_pythia_as_gpt_neox(run_folder, tmp_path):
    out = tmp_path / "pythia"
    command = ["export", "--run", str(run_folder), "--model", "pythia", "--out", str(out), "--format", "gpt_neox"]
    assert main(command) == 0
    loaded = AutoModelForCausalLM.from_pretrained(out).eval()
    assert type(loaded).__name__ == "GPTNeoXForCausalLM"
    again = load_pythia(out)
    best = load_model(run_folder / "pythia" / "best")
    assert all(torch.equal(value, best.state_dict()[name]) for name, value in again.state_dict().items())
    assert "perplexity" not in (out / "README.md").read_text()  # this model of the run was not measured


@pytest.mark.parametrize(
    ("family", "kind", "layout", "tied"),
    [
        *((family, "token_memory", "auto", True) for family in FAMILIES),
        ("gpt-neox", "selective", "auto", False),
        ("llama", "pythia", "gpt_neox", True),
        ("bert", "pythia", "gpt_neox", False),
    ],
)
def test_settings_tied_weights_and_special_tokens_survive(tmp_path, family, kind, layout, tied):
    tokenizer = train_family(family)
    shape = PythiaConfig(vocab_size=padded_vocab_size(tokenizer), hidden_size=16, num_hidden_layers=2,
                         num_attention_heads=2, intermediate_size=24, initializer_range=0.3, layer_norm_eps=1e-3,
                         rotary_pct=0.5, rotary_emb_base=500, max_position_embeddings=90,
                         tie_word_embeddings=tied)  # fmt: skip
    torch.manual_seed(0)
    model = create_model(kind, shape, segment_length=80).eval()
    save_model(model, tmp_path / "run" / kind / "best")
    tokenizer.save(str(tmp_path / "run" / "tokenizer.json"))
    export_run(tmp_path / "run", kind, tmp_path / "out", layout=layout)

    hf, wrapped = (auto.from_pretrained(tmp_path / "out") for auto in (AutoModelForCausalLM, AutoTokenizer))
    again = load_pythia(tmp_path / "out") if layout == "gpt_neox" else hf.model
    assert describe_model(again) == describe_model(model)
    assert (hf.get_output_embeddings().weight is hf.get_input_embeddings().weight) == tied
    assert (hf.config.initializer_range, hf.config.tie_word_embeddings) == (0.3, tied)
    found = [wrapped.bos_token, wrapped.eos_token, wrapped.pad_token, wrapped.unk_token]
    assert found == SPECIAL_TOKENS[family]
    assert max(wrapped.all_special_ids) < model.vocab_size
    assert (hf.generation_config.eos_token_id, hf.config.pad_token_id) == (wrapped.eos_token_id, wrapped.pad_token_id)

    text = "Four score and seven years"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert wrapped(text).input_ids == ids  # as in training, without tokens around it
    prompts = wrapped(["Four", text], return_tensors="pt", padding=True)
    whole = hf.generate(**prompts, max_new_tokens=6, do_sample=False)[1]
    new, statistics = model.generate(torch.tensor([ids]), max_new_tokens=6, tokenizer=tokenizer,
                                     eos_token_id=wrapped.eos_token_id)  # fmt: skip
    assert whole.tolist() == new[0].tolist()
    assert wrapped.decode(whole, skip_special_tokens=True) == tokenizer.decode(ids) + statistics.texts[0]
