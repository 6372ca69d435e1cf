import pytest

from new_llm.config import TrainConfig
from new_llm.training.optimizer import make_schedule


def test_the_rate_rises_linearly_then_falls_as_a_half_cosine() -> None:
    config = TrainConfig(num_epochs=4, warmup_fraction=0.1, min_lr_ratio=0.1)
    share = make_schedule(config, steps_per_epoch=100)
    assert [share(step) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert share(10) == pytest.approx(1.0)
    assert share(10 + 195) == pytest.approx(0.55)
    assert share(400) == pytest.approx(0.1)
    assert share(10_000) == pytest.approx(0.1)


def test_without_warm_up_the_first_step_has_the_whole_rate() -> None:
    share = make_schedule(TrainConfig(num_epochs=1, warmup_fraction=0.0), steps_per_epoch=10)
    assert share(0) == 1.0
