"""Tokens made by replays of a CUDA graph are those of single steps.

`pytest -m gpu` on a machine with a GPU, or `pytest --noconftest -m gpu tests/gpu` where the data and charts of other
tests are missing; elsewhere all are skipped.
"""

import contextlib
import copy

import pytest
import torch

from new_llm.config import PythiaConfig
from new_llm.models import create_model, generation
from new_llm.models.decoding import CapturedCall, DecodingWeights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]
SHAPE = PythiaConfig(vocab_size=512, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512)
ALL_MEMORY = {"memory_layers": (0, 1), "num_memory_heads": 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize(
    ("kind", "segment", "options"),
    [
        ("pythia", None, {}),
        ("pythia", 32, {}),
        ("infini", 32, ALL_MEMORY),
        ("infini", 32, {"use_alibi": True, "use_delta_rule": False}),
        ("hierarchical", 32, {}),
        ("transformer_xl", 32, {}),
        ("gated_delta", 32, {}),
        ("token_memory", 32, {}),
        ("selective", 32, {}),
    ],
)
@pytest.mark.parametrize("draws", [False, True])
def test_captured_tokens_are_those_of_single_steps(kind, segment, options, rows, dtype, draws, monkeypatch):
    torch.manual_seed(0)
    model = create_model(kind, SHAPE, segment_length=segment, **options).to("cuda", dtype).eval()
    with torch.no_grad():
        model.embed_out.weight.mul_(20)  # so that draws are not all of the same chance
    prompt = torch.randint(512, (rows, 40), generator=torch.Generator().manual_seed(1))
    settings = {"max_new_tokens": 70, "do_sample": draws, "seed": 3}
    captured, _ = model.generate(prompt, **settings)
    again, _ = model.generate(prompt, **settings)
    monkeypatch.setattr(generation, "STEPS_IN_PLACE", set())
    expected, _ = model.generate(prompt, **settings)
    assert torch.equal(captured, again)
    if dtype == torch.float32:
        assert torch.equal(captured, expected)
    elif not draws:  # rounding may choose another token, but in float32 none is much better
        with torch.no_grad():
            chances = copy.deepcopy(model).float()(captured[:, :-1].cuda())[:, 39:].softmax(-1)
        chosen = chances.gather(-1, captured[:, 40:, None].cuda())
        assert (chosen > 0.7 * chances.amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize(("kind", "options"), [("pythia", {}), ("infini", ALL_MEMORY), ("token_memory", {})])
def test_a_replay_gives_the_logits_of_a_single_step_and_waits_for_nothing(kind, options, is_fused):
    model = create_model(kind, SHAPE, segment_length=32, **options).cuda().eval()
    ids = torch.randint(512, (8, 100), generator=torch.Generator().manual_seed(1)).cuda()
    stream, single = model.open_stream(8), model.open_stream(8)
    for reader in (stream, single):
        reader.feed_hidden(ids[:, :40])
    stream.begin_steps(60)
    token, step = ids[:, :1].clone(), CapturedCall(ids.device)
    logits = torch.empty(8, 1, SHAPE.vocab_size, device="cuda")
    weights = DecodingWeights(model, num_rows=8, packs=False)
    assert (kind == "token_memory") or len(weights.replaced) == 2  # both layers run in three launches
    fused = weights.in_use() if is_fused else contextlib.nullcontext()

    def read() -> None:
        logits.copy_(model.embed_out(stream.read_token(token)))

    with torch.no_grad(), fused:
        for t in range(40, 100):
            token.copy_(ids[:, t : t + 1])
            if step.graph is not None:
                torch.cuda.set_sync_debug_mode("error")
            step(read)
            is_still = stream.count_token()
            torch.cuda.set_sync_debug_mode("default")
            assert is_still
            torch.testing.assert_close(logits, single.feed(token), atol=1e-5, rtol=1e-5)
    assert step.graph is not None
