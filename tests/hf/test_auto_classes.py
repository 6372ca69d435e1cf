"""Save, load, train and place models through `transformers`' own classes."""

import copy
import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import tiny
from model_cases import MIXED_STACKS, assert_states_equal, build_selective, get_model, randomize, text_ids
from new_llm.cli.main import main
from new_llm.config import PythiaConfig, UserError
from new_llm.data.tokenizer import padded_vocab_size
from new_llm.experiments.subject import export_run
from new_llm.models import TransformerLM, create_model, load_model, save_model
from new_llm.models.hf import NewLLMForCausalLM, StreamCache, load_pythia
from new_llm.models.layers import LAYER_KINDS, InfiniLayer, PythiaLayer, register_layer
from new_llm.models.layers.infini import InfiniOptions
from new_llm.models.model_file import describe_model
from tokenizer_families import FAMILIES, train_family

make_model = functools.partial(tiny.make_model, segment_length=8, spread=0.2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["pythia", "infini", "multi_memory", "hierarchical", "selective", "token_memory"])
def test_save_and_load_bit_for_bit(tmp_path, kind, dtype):
    model = make_model(kind).to(dtype)
    randomize(model)
    NewLLMForCausalLM.from_model(model, max_position_embeddings=99).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, torch_dtype="auto")
    assert type(loaded) is NewLLMForCausalLM
    assert not loaded.training
    assert type(loaded.model) is type(model)
    assert loaded.config.max_position_embeddings == 99
    assert loaded.config.segment_length == loaded.model.segment_length == 8
    torch.testing.assert_close(loaded.model.state_dict(), model.state_dict(), rtol=0, atol=0)
    ids = text_ids(2, 20)
    with torch.no_grad():
        assert torch.equal(loaded(ids, use_cache=False).logits, model.eval()(ids))


def test_layers_of_another_make_are_saved_and_loaded_and_missing_weights_refused(tmp_path):
    @register_layer("doubled", options=InfiniOptions)
    class DoubledLayer(InfiniLayer):
        def __init__(self, hidden_size: int, factor: float = 2.0, **options) -> None:
            super().__init__(hidden_size, 1, 2 * hidden_size, **options)
            self.factor = factor

        def _add(self, hidden, mixed):
            return hidden + self.factor * mixed

    model = TransformerLM([DoubledLayer(16, factor=3.0), PythiaLayer(16, 2, 24)], 128, 5)
    randomize(model)
    NewLLMForCausalLM.from_model(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded.model.layers[0]) is DoubledLayer
    ids = text_ids(2, 12)
    expected, _ = model.generate(ids, max_new_tokens=7)
    assert torch.equal(loaded.generate(input_ids=ids, max_new_tokens=7, do_sample=False), expected)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.attention.gate"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"weights are missing: model\.layers\.0\.attention\.gate"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    LAYER_KINDS.pop("doubled")
    with pytest.raises(UserError, match=r"unknown layer kind 'doubled'; known are .*pythia"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_loss_is_ours_and_honours_the_number_of_items():
    model = get_model("mixed")
    hf = NewLLMForCausalLM.from_model(model)
    ids = text_ids(2, 17)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, 3] = -100
    expected, statistics = model.compute_loss(ids, labels, mask)
    assert statistics.num_tokens == 16 - 1 + 11
    found = hf(ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(found.loss, expected)
    assert found.logits.shape == (2, 17, 128)
    assert found.past_key_values is None
    for items in (50, torch.tensor(50)):
        shared = hf(ids, attention_mask=mask, labels=labels, num_items_in_batch=items).loss
        torch.testing.assert_close(shared, expected * statistics.num_tokens / 50)
    loss, logits = hf(ids, attention_mask=mask, labels=labels, return_dict=False)
    torch.testing.assert_close(loss, expected)
    assert torch.equal(logits, found.logits)


def arguments(folder, **changes) -> TrainingArguments:
    settings = {
        "per_device_train_batch_size": 4, "max_steps": 30, "learning_rate": 3e-3, "report_to": [], "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "seed": 1, "use_cpu": True, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**settings, **changes})


def test_gradient_checkpointing_is_exact_and_open_to_the_trainer(tmp_path):
    data, steps = [{"input_ids": row, "labels": row} for row in text_ids(2, 24)], []
    for checkpoints in (True, False):
        model = NewLLMForCausalLM.from_model(make_model("multi_memory"))
        settings = arguments(tmp_path, max_steps=2, gradient_checkpointing=checkpoints)
        Trainer(model=model, args=settings, train_dataset=data).train()
        assert model.model.gradient_checkpointing == checkpoints
        steps.append(model.state_dict())
    assert all(torch.equal(value, steps[1][name]) for name, value in steps[0].items())


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_can_grow(tmp_path, tied):
    model = NewLLMForCausalLM.from_model(make_model("token_memory", tied=tied))
    assert model.get_input_embeddings() is model.model.embed_in
    assert model.get_output_embeddings() is model.model.embed_out
    before = model.model.embed_in.weight.detach().clone()
    model.resize_token_embeddings(400)
    assert (model.model.vocab_size, model.config.vocab_size) == (400, 400)
    assert torch.equal(model.model.embed_in.weight[:384], before)
    assert model(torch.tensor([[399, 1]])).logits.shape == (1, 2, 400)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).model
    assert loaded.embed_out.weight.shape == (400, 32)
    assert (loaded.embed_out.weight is loaded.embed_in.weight) == tied


def test_lora_trains_the_linear_layers_alone(tmp_path):
    peft = pytest.importorskip("peft")
    base = NewLLMForCausalLM.from_model(make_model())
    before = {name: value.clone() for name, value in base.state_dict().items()}
    targets = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets))
    data = [{"input_ids": row, "labels": row} for row in text_ids(4, 24)]
    trainer = Trainer(model=model, args=arguments(tmp_path, max_steps=15, learning_rate=1e-2), train_dataset=data)
    first = trainer.evaluate(data)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(data)["eval_loss"] < first - 0.5
    ids = text_ids(2, 13)
    expected = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
    model.save_pretrained(tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(NewLLMForCausalLM.from_model(make_model()), tmp_path / "lora")
    assert torch.equal(loaded.generate(input_ids=ids, max_new_tokens=6, do_sample=False), expected)
    merged = loaded.merge_and_unload().state_dict()
    changed = {name for name, value in before.items() if not torch.equal(merged[name], value)}
    assert changed == {name for name in before if name.removesuffix(".weight").endswith(tuple(targets))}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "where",
    [
        {"target_modules": ["embed_out"]},
        {"target_modules": ["embed_in", "query"]},
        {"target_modules": ["embed_out"], "use_dora": True},
        {"target_modules": ["query"], "modules_to_save": ["embed_out"]},
    ],
    ids=str,
)
def test_an_adapted_head_merges_to_the_same_model(tmp_path, where, tied):
    """A token memory reads the head: unmerged, merged, taken off, saved and loaded it must be the same one."""
    peft = pytest.importorskip("peft")
    base = NewLLMForCausalLM.from_model(make_model("token_memory", tied=tied).double().eval())
    ids = text_ids(2, 30)
    with torch.no_grad():
        before = base(ids, use_cache=False).logits
        options = peft.LoraConfig(task_type="CAUSAL_LM", r=4, init_lora_weights=False, **where)
        model = peft.get_peft_model(base, options).double().eval()
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter) * parameter.requires_grad)
        adapted = model(ids, use_cache=False).logits
        assert not torch.allclose(adapted, before, atol=0.1)
        torch.testing.assert_close(model(ids).logits, adapted)  # by the cache
        with model.disable_adapter():
            torch.testing.assert_close(model(ids, use_cache=False).logits, before)
        model.merge_adapter()
        torch.testing.assert_close(model(ids, use_cache=False).logits, adapted)
        model.unmerge_adapter()
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(ids, use_cache=False).logits, adapted)
        merged.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, torch_dtype=torch.float64)
        torch.testing.assert_close(loaded(ids, use_cache=False).logits, adapted)


# `generate()` of Hugging Face against this project's own, and against itself without a cache


STACKS = ("pythia", *MIXED_STACKS, "selective")
GREEDY = {"do_sample": False, "pad_token_id": 0}


def wrap(name: str, dtype: torch.dtype = torch.float64) -> NewLLMForCausalLM:
    model = build_selective("mixed", 2).to(dtype) if name == "selective" else get_model(name, dtype=dtype)
    return NewLLMForCausalLM.from_model(model).eval()


def padded(side: str, length: int = 13) -> tuple[torch.Tensor, torch.Tensor]:
    """Three prompts of 13, 9 and 4 tokens; a padded place holds another token than 0, which must not be read."""
    ids = text_ids(3, length)
    mask = torch.ones_like(ids)
    for row, missing in ((1, 4), (2, 9)):
        mask[row, slice(None, missing) if side == "left" else slice(-missing, None)] = 0
    return ids.masked_fill(mask == 0, 7), mask


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", STACKS)
def test_greedy_equals_our_own_token_for_token(name, side, dtype):
    """Segments of 5: prompts and what follows cross several segment ends, each row at its own place."""
    hf = wrap(name, dtype=dtype)
    ids, mask = padded(side)
    ours, _ = hf.model.generate(ids, mask, max_new_tokens=17)
    for use_cache in (True, False):
        theirs = hf.generate(input_ids=ids, attention_mask=mask, max_new_tokens=17, use_cache=use_cache, **GREEDY)
        assert torch.equal(theirs, ours), use_cache


def test_greedy_begins_from_the_held_memory_and_leaves_it():
    hf = wrap("mixed")
    ids = text_ids(1, 7)
    empty = hf.generate(input_ids=ids, max_new_tokens=12, **GREEDY)
    hf.model(text_ids(1, 40, start=9), update_memory=True)
    before = hf.model.get_memory_state()
    filled = hf.generate(input_ids=ids, max_new_tokens=12, **GREEDY)
    assert torch.equal(filled, hf.model.generate(ids, max_new_tokens=12)[0])
    assert not torch.equal(filled, empty)
    assert_states_equal(hf.model.get_memory_state(), before)
    hf(ids, update_memory=True)
    written = hf.model.get_memory_state()
    hf.model.set_memory_state(before)
    hf.model(ids, update_memory=True)
    assert_states_equal(written, hf.model.get_memory_state())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", STACKS)
def test_beams_with_the_cache_equal_beams_without(name, side):
    hf = wrap(name)
    ids, mask = padded(side)
    found = [
        hf.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=11, num_beams=4, num_return_sequences=2,
            use_cache=use_cache, **GREEDY,
        )
        for use_cache in (True, False)
    ]  # fmt: skip
    assert torch.equal(*found)
    alone = hf.generate(input_ids=ids[1:2, mask[1] == 1], max_new_tokens=11, num_beams=4, **GREEDY)
    assert torch.equal(found[0][2, 13:], alone[0, 9:])


def test_a_cache_is_read_on_copied_and_selected_and_what_it_can_not_do_is_refused():
    hf = wrap("mixed")
    ids = text_ids(3, 23)
    with torch.no_grad():
        whole = hf(ids, use_cache=False).logits
        first = hf(ids[:, :9])
        assert isinstance(first.past_key_values, StreamCache)
        copied = copy.deepcopy(first.past_key_values)
        rest = hf(ids[:, 9:], past_key_values=first.past_key_values).logits
        torch.testing.assert_close(torch.cat([first.logits, rest], 1), whole, atol=1e-9, rtol=1e-9)
        again = hf(ids[:, 9:], past_key_values=copy.deepcopy(copied)).logits  # as if nothing had been read meanwhile
        assert torch.equal(again, rest)
        copied.batch_select_indices(torch.tensor([2, 0]))
        copied.batch_repeat_interleave(2)
        assert copied.batch_size == 4
        chosen = hf(ids[[2, 2, 0, 0], 9:], past_key_values=copied).logits
        torch.testing.assert_close(chosen, rest[[2, 2, 0, 0]], atol=1e-9, rtol=1e-9)
        with pytest.raises(ValueError, match="can't be shortened"):
            copied.crop(3)
        copied.reset()
        assert copied.get_seq_length() == 0
        with pytest.raises(ValueError, match="leave out past_key_values"):
            hf(ids, past_key_values=copied, update_memory=True)
    with pytest.raises(ValueError, match="stateful"):
        hf.generate(input_ids=ids, max_new_tokens=4, prompt_lookup_num_tokens=2, **GREEDY)
    with pytest.raises(ValueError, match="output_attentions: not supported"):
        hf(ids, output_attentions=True)


def test_a_row_whose_next_columns_are_all_padding_goes_on_from_its_last_token():
    hf = wrap("mixed")
    ids, mask = padded("right", 12)
    with torch.no_grad():
        whole = hf(ids, attention_mask=mask, use_cache=False).logits[:, -1]
        cache = hf(ids[:, :6], attention_mask=mask[:, :6]).past_key_values
        order = torch.tensor([2, 0, 1])
        cache.reorder_cache(order)
        pieces = hf(ids[order, 6:], attention_mask=mask[order], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(pieces, whole[order], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(whole[2], hf.model(ids[2:, :3]).detach()[0, -1], atol=1e-9, rtol=1e-9)


# `new-llm export`: a run's model for Hugging Face's tools, with a card of the run's figures


END = "<|endoftext|>"
SPECIAL_TOKENS = {
    "byte-level": [END, END, END, None],  # it has none: one of the model's unused rows is taken
    "gpt-neox": [END, END, "<|padding|>", None],
    "wordpiece": [END, END, END, "[UNK]"],
    "bert": ["[CLS]", "[SEP]", "[PAD]", "[UNK]"],
    **{family: ["<s>", "</s>", "<pad>", "<unk>"] for family in ("metaspace", "llama", "gemma")},
}


def test_a_run_s_models_with_their_cards(untrained_run, tmp_path, capsys):
    run = shutil.copytree(untrained_run, tmp_path / "tiny")
    result = {
        "training": {"tokens": 482619, "steps": 120, "best_epoch": 3, "seconds": 99.9},
        "evaluation": {
            "sliding": {"perplexity": 184.06, "bits_per_byte": 1.694, "num_tokens": 54886},
            "streaming": {"perplexity": 181.2, "bits_per_byte": 1.68, "num_tokens": 54886},
        },
    }  # fmt: skip
    (run / "infini" / "result.json").write_text(json.dumps(result))
    (run / "data.json").write_text(json.dumps({"source": "sotu", "train": {"num_documents": 234}}))
    (run / "environment.json").write_text(json.dumps({"command": "new-llm experiment --config /home/ada/a.yaml"}))

    out = tmp_path / "out" / "infini"
    assert main(["export", "--run", str(run), "--model", "infini", "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    best = load_model(run / "infini" / "best")
    loaded = AutoModelForCausalLM.from_pretrained(out).model
    torch.testing.assert_close(loaded.state_dict(), best.state_dict(), rtol=0, atol=0)
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

    out = tmp_path / "pythia"
    command = ["export", "--run", str(run), "--model", "pythia", "--out", str(out), "--format", "gpt_neox"]
    assert main(command) == 0
    assert type(AutoModelForCausalLM.from_pretrained(out).eval()).__name__ == "GPTNeoXForCausalLM"
    best = load_model(run / "pythia" / "best")
    torch.testing.assert_close(load_pythia(out).state_dict(), best.state_dict(), rtol=0, atol=0)
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
    assert [wrapped.bos_token, wrapped.eos_token, wrapped.pad_token, wrapped.unk_token] == SPECIAL_TOKENS[family]
    assert max(wrapped.all_special_ids) < model.vocab_size
    assert (hf.generation_config.eos_token_id, hf.config.pad_token_id) == (wrapped.eos_token_id, wrapped.pad_token_id)
    assert wrapped.padding_side == "left"

    text = "Four score and seven years"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert wrapped(text).input_ids == ids  # as in training, without tokens around it
    prompts = wrapped(["Four", text], return_tensors="pt", padding=True)
    whole = hf.generate(**prompts, max_new_tokens=6, do_sample=False)[1]
    new, statistics = model.generate(torch.tensor([ids]), max_new_tokens=6, tokenizer=tokenizer,
                                     eos_token_id=wrapped.eos_token_id)  # fmt: skip
    assert whole.tolist() == new[0].tolist()
    assert wrapped.decode(whole, skip_special_tokens=True) == tokenizer.decode(ids) + statistics.texts[0]
