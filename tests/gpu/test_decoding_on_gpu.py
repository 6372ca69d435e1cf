"""Tokens made by a replayed CUDA graph are those of the steps one by one; a replay waits for nothing.

`pytest -m gpu` on a machine with a GPU; elsewhere all are skipped.
"""

from typing import Any

import pytest
import torch

from new_llm.config import PythiaConfig
from new_llm.models import create_model, generation

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
def test_captured_tokens_are_those_of_single_steps(
    kind: str,
    segment: int | None,
    options: dict[str, Any],
    rows: int,
    dtype: torch.dtype,
    draws: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model = create_model(kind, SHAPE, segment_length=segment, **options).to("cuda", dtype).eval()
    with torch.no_grad():
        model.embed_out.weight.mul_(20)  # so that rounding decides no choice
    prompt = torch.randint(512, (rows, 40), generator=torch.Generator().manual_seed(1))
    settings: dict[str, Any] = {"max_new_tokens": 70, "do_sample": draws, "seed": 3}
    captured, _ = model.generate(prompt, **settings)
    again, _ = model.generate(prompt, **settings)
    monkeypatch.setattr(generation, "STEPS_IN_PLACE", set())
    expected, _ = model.generate(prompt, **settings)
    assert torch.equal(captured, again)
    if dtype == torch.float32:
        assert torch.equal(captured, expected)
    else:
        assert (captured == expected)[:, :48].float().mean() > 0.9  # rounding may choose later ones


@pytest.mark.parametrize(("kind", "options"), [("pythia", {}), ("infini", ALL_MEMORY), ("token_memory", {})])
def test_logits_of_replayed_steps_are_the_stream_s(kind: str, options: dict[str, Any]) -> None:
    from new_llm.models.captured import CapturedCall

    model = create_model(kind, SHAPE, segment_length=32, **options).cuda().eval()
    ids = torch.randint(512, (8, 100), device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    expected = model.open_stream(8).feed(ids)
    stream, token, logits = model.open_stream(8), ids[:, :1].clone(), torch.empty_like(expected[:, :1])
    stream.feed(ids[:, :40])
    stream.begin_steps(60)
    step = CapturedCall(ids.device)

    def read() -> None:
        logits.copy_(model.embed_out(stream.read_token(token)))

    with torch.no_grad():
        for t in range(40, 100):
            token.copy_(ids[:, t : t + 1])
            if step.graph is not None:
                torch.cuda.set_sync_debug_mode("error")  # from here on nothing waits but the comparison
            step(read)
            torch.cuda.set_sync_debug_mode("default")
            assert stream.count_token()
            torch.testing.assert_close(logits, expected[:, t : t + 1], atol=1e-5, rtol=1e-5)
