"""Random combinations of model kind, options, recipe, tokenizer and default dtype keep the contract of a model.

`pytest -m slow tests/properties/test_random_combinations.py` draws for ten minutes; `NEW_LLM_DRAWS=20` draws twenty
instead. A failure names the seed of its draw: `NEW_LLM_DRAW=17` repeats draw 17 alone.
"""

import copy
import os
import random
import time
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch

from model_cases import assert_states_equal
from new_llm import TransformerLM, create_model
from new_llm.config import PythiaConfig, TrainConfig, UserError
from new_llm.models import load_model, save_model
from new_llm.models.factory import MODEL_KINDS, RECIPES
from new_llm.models.generation import encode_prompts, generate
from new_llm.testing import check_model, check_precision, draw_ids
from new_llm.training.preparation import make_optimizer
from tokenizer_families import FAMILIES, TEXT, train_family

MINUTES = 10
SHAPE = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
VALUES = {
    "memory_layers": ((0,), (1,), (0, 1)),
    "segments_per_bank": (1, 3),
    "skip_interval": (0, 1, 2),
    "memory_tokens": (0, 3, 9),
    "memory_key_size": (None, 3),  # a key of width 1 at length 1 is a sign, which rounding may turn
    "convolution_size": (0, 1, 4),
    "earlier_pass_weight": (0.0, 0.5),
}
"""What is drawn for options whose type does not say it; other counts are 1 or 2, other floats stay as they are."""


def list_values(kind: str) -> dict[str, tuple[Any, ...]]:
    found = {}
    for options in MODEL_KINDS[kind].options:
        for name, hint in get_type_hints(options).items():
            if name in VALUES:
                found[name] = VALUES[name]
            elif get_origin(hint) is Literal:
                found[name] = get_args(hint)
            elif hint is bool:
                found[name] = (True, False)
            elif int in (hint, *get_args(hint)):
                found[name] = (1, 2)
    return found


def draw_model(rng: random.Random) -> TransformerLM:
    kind = rng.choice([kind for kind in MODEL_KINDS if ":" not in kind])
    options = {name: rng.choice(values) for name, values in list_values(kind).items() if rng.random() < 0.6}
    if options.get("use_normalizer") is False:  # with keys longer than 1 the delta rule diverges
        options |= {"key_features": "unit", "normalize_keys": False}
    if recipe := rng.choice([None, *(name for name, kinds in RECIPES.items() if kind in kinds)]):
        options["recipe"] = recipe
    shape = PythiaConfig(**SHAPE, intermediate_size=24, initializer_range=0.3, tie_word_embeddings=rng.random() < 0.3)
    length = rng.choice([2, 4, 7, 16])
    print(kind, options, length)  # shown where the draw fails
    try:
        model = create_model(kind, shape, segment_length=length, **options)
    except UserError:  # options that exclude one another
        model = create_model(kind, shape, segment_length=length)
    with torch.no_grad():
        for parameter in model.parameters():  # gates, norms and biases too
            parameter.add_(0.1 * torch.randn(parameter.shape, dtype=torch.float32).to(parameter.dtype))
    return model.double().eval()


def check_text(model: TransformerLM, family: str) -> None:
    """Greedy generation follows the logits, and the text shown while it is made is the text of all tokens."""
    tokenizer = train_family(family)
    ids, mask = encode_prompts(tokenizer, [TEXT[:20]])
    shown: list[str] = []
    options = {"tokenizer": tokenizer, "on_text": lambda _, piece: shown.append(piece), "max_new_tokens": 12}
    made, statistics = generate(model, ids, mask, **options)
    assert statistics.texts == ("".join(shown),)
    logits = model(made[:, :-1])[:, ids.shape[1] - 1 :]
    chosen = logits.gather(-1, made[:, ids.shape[1] :, None]).squeeze(-1)
    torch.testing.assert_close(chosen, logits.amax(-1), atol=1e-8, rtol=1e-8)


def check_training(model: TransformerLM, folder: Any, *, carries: bool) -> None:
    """A memory written in any mode trains afterwards; training resumed, and a model saved, go on bit for bit."""
    ids = draw_ids(model, 2, 2 * model.segment_length + 2)
    model.reset_memory(2)
    with torch.inference_mode():
        model(ids, update_memory=True)
    trained = [(model.train(), make_optimizer(model, TrainConfig(learning_rate=0.01)))]
    for step in range(2):
        for one, optimizer in trained:
            if not carries:
                one.reset_memory(2)
            loss, statistics = one.compute_loss(ids, ids, update_memory=True)
            assert bool(loss.isfinite())
            assert statistics.num_tokens == 2 * (ids.shape[1] - 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if step == 0:
            resumed = copy.deepcopy(model)
            resumed.set_memory_state(model.get_memory_state())
            again = make_optimizer(resumed, TrainConfig(learning_rate=0.01))
            again.load_state_dict(copy.deepcopy(trained[0][1].state_dict()))
            trained.append((resumed, again))
    torch.testing.assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert_states_equal(resumed.get_memory_state(), model.get_memory_state())
    save_model(model, folder)
    loaded = load_model(folder).eval()
    assert loaded.tie_word_embeddings == model.tie_word_embeddings
    loaded.set_memory_state(model.get_memory_state())
    assert torch.equal(loaded(ids), model.eval()(ids))


def check_draw(seed: int, folder: Any) -> None:
    rng, before = random.Random(seed), torch.get_default_dtype()
    torch.manual_seed(seed)
    print(f"draw {seed}")
    model = draw_model(rng)
    try:
        torch.set_default_dtype(rng.choice([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
        check_model(model)
        with torch.no_grad():
            check_precision(model, draw_ids(model, 3, 3 * model.segment_length))
            model.reset_memory()
            check_text(model, rng.choice(FAMILIES))
        check_training(model, folder / str(seed), carries=rng.random() < 0.5)
    finally:
        torch.set_default_dtype(before)


def test_some_combinations(tmp_path):
    for seed in range(8):
        check_draw(seed, tmp_path)


@pytest.mark.slow
def test_ten_minutes_of_combinations(tmp_path):
    if "NEW_LLM_DRAW" in os.environ:
        check_draw(int(os.environ["NEW_LLM_DRAW"]), tmp_path)
        return
    limit = int(os.environ.get("NEW_LLM_DRAWS", "0"))
    begin, seed = time.monotonic(), 1000
    while (seed - 1000 < limit) if limit else time.monotonic() - begin < 60 * MINUTES:
        check_draw(seed, tmp_path)
        seed += 1
    print(f"{seed - 1000} combinations")
