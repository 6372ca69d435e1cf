"""Save, load, train and place models through `transformers`' own classes."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline

from model_cases import get_model, randomize, text_ids
from new_llm.config import UserError
from new_llm.models import TransformerLM, create_model
from new_llm.models.hf import NewLLMForCausalLM, export_auto
from new_llm.models.layers import LAYER_KINDS, InfiniLayer, PythiaLayer, register_layer
from new_llm.models.layers.infini import InfiniOptions
from tiny import make_shape


def make_model(kind: str = "infini", seed: int = 0, tie_word_embeddings: bool = False, **options: Any) -> TransformerLM:
    torch.manual_seed(seed)
    shape = make_shape(
        vocab_size=384, intermediate_size=48, initializer_range=0.2, tie_word_embeddings=tie_word_embeddings
    )
    return create_model(kind, shape, segment_length=8, **options)


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
    expected = model.state_dict()
    assert loaded.model.state_dict().keys() == expected.keys()
    for name, value in loaded.model.state_dict().items():
        assert value.dtype == dtype
        assert torch.equal(value, expected[name]), name
    ids = text_ids(2, 20)
    with torch.no_grad():
        assert torch.equal(loaded(ids, use_cache=False).logits, model.eval()(ids))


def test_layers_of_another_make_are_saved_and_loaded(tmp_path):
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
    beams = [loaded.generate(input_ids=ids, max_new_tokens=7, num_beams=2, do_sample=False, use_cache=use_cache)
             for use_cache in (True, False)]  # fmt: skip
    assert torch.equal(loaded.generate(input_ids=ids, max_new_tokens=7, do_sample=False), expected)
    assert torch.equal(*beams)
    LAYER_KINDS.pop("doubled")
    with pytest.raises(UserError, match=r"unknown layer kind 'doubled'; known are .*pythia"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_folder_without_some_weights_is_refused(tmp_path):
    NewLLMForCausalLM.from_model(make_model()).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.attention.gate"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"weights are missing: model\.layers\.0\.attention\.gate"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_whole_folder_serves_a_pipeline(tmp_path, tokenizer):
    model = make_model("multi_memory").eval()
    export_auto(model, tmp_path, tokenizer)
    wrapped = AutoTokenizer.from_pretrained(tmp_path)
    assert (wrapped.eos_token, wrapped.pad_token_id, wrapped.padding_side) == ("<|endoftext|>", 0, "left")
    prompts = ["The Congress", "Fellow-citizens of the Senate and of the House of Representatives"]
    speak = pipeline("text-generation", model=str(tmp_path))
    for batch_size in (1, 2):
        found = speak(prompts, max_new_tokens=9, do_sample=False, batch_size=batch_size)
        for prompt, answer in zip(prompts, found, strict=True):
            ids = torch.tensor([tokenizer.encode(prompt).ids])
            _, statistics = model.generate(ids, max_new_tokens=9, tokenizer=tokenizer, eos_token_id=0)
            assert answer[0]["generated_text"] == prompt + statistics.texts[0]


# Losses and training


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


def arguments(folder, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4, "max_steps": 30, "learning_rate": 3e-3, "report_to": [], "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "seed": 1, "use_cpu": True, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return TrainingArguments(output_dir=str(folder), **{**settings, **changes})


def rows_of(ids: torch.Tensor, lengths: list[int] | None = None) -> list[dict[str, Any]]:
    lengths = [ids.shape[1]] * len(ids) if lengths is None else lengths
    rows = []
    for row, length in zip(ids, lengths, strict=True):
        mask = (torch.arange(len(row)) < length).long()
        rows.append({"input_ids": row, "attention_mask": mask, "labels": row.masked_fill(mask == 0, -100)})
    return rows


def test_accumulated_batches_weigh_every_token_alike(tmp_path):
    """Two batches of unequal lengths make the step that one batch of both makes."""
    ids = text_ids(4, 24)
    data = rows_of(ids, [24, 5, 11, 3])
    steps = []
    for size, accumulation in ((4, 1), (1, 4)):
        model = NewLLMForCausalLM.from_model(make_model().double())
        settings = arguments(
            tmp_path, max_steps=1, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation,
            optim="sgd", learning_rate=1.0, max_grad_norm=0.0,
        )  # fmt: skip
        Trainer(model=model, args=settings, train_dataset=data).train()
        steps.append(model.state_dict())
    for name, value in steps[0].items():
        torch.testing.assert_close(steps[1][name], value, atol=1e-9, rtol=1e-7, msg=name)


def test_gradient_checkpointing_is_exact_and_open_to_the_trainer(tmp_path):
    data, steps = rows_of(text_ids(2, 24)), []
    for checkpoints in (True, False):
        model = NewLLMForCausalLM.from_model(make_model("multi_memory"))
        settings = arguments(tmp_path, max_steps=2, gradient_checkpointing=checkpoints)
        Trainer(model=model, args=settings, train_dataset=data).train()
        assert model.model.gradient_checkpointing == checkpoints
        steps.append(model.state_dict())
    assert all(torch.equal(value, steps[1][name]) for name, value in steps[0].items())


@pytest.mark.parametrize("tied", [True, False])
def test_the_vocabulary_can_grow(tmp_path, tied):
    model = NewLLMForCausalLM.from_model(make_model("token_memory", tie_word_embeddings=tied))
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
    data = rows_of(text_ids(4, 24))
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
    base = NewLLMForCausalLM.from_model(make_model("token_memory", tie_word_embeddings=tied).double().eval())
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
