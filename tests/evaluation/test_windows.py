import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from new_llm.evaluation.scoring import Window, choose_rows, plan_segments, plan_windows

settings = st.integers(2, 40).flatmap(lambda context: st.tuples(st.just(context), st.integers(1, context)))


@given(st.integers(0, 200), settings)
def test_every_token_but_the_first_is_scored_once_with_context(length, setting):
    context, stride = setting
    windows = plan_windows(length, context, stride)
    scored = [index for window in windows for index in range(window.first_scored, window.end)]
    assert scored == list(range(1, length))
    for window in windows:
        assert 0 <= window.begin < window.first_scored < window.end <= length
        assert window.end - 1 - window.begin <= context  # what the model reads
        assert window.begin % stride == 0
        assert window.first_scored - window.begin >= min(window.first_scored, context - stride)


@given(st.integers(0, 200), settings)
def test_a_token_is_scored_in_the_first_window_that_reaches_it(length, setting):
    context, stride = setting
    span = context + (stride == context)
    for window in plan_windows(length, context, stride):
        for index in range(window.first_scored, window.end):
            reaching = [begin for begin in range(0, length, stride) if begin < index < begin + span]
            assert window.begin == reaching[0]


@given(st.integers(0, 200), st.integers(1, 40))
def test_segments_are_consecutive_and_lose_no_target(length, piece_tokens):
    pieces = plan_segments(length, piece_tokens)
    read = [index for piece in pieces for index in range(piece.begin, piece.end - 1)]
    assert read == list(range(length - 1))
    assert all(piece.first_scored == piece.begin + 1 for piece in pieces)
    assert all(piece.end - 1 - piece.begin == piece_tokens for piece in pieces[:-1])


def test_small_cases():
    assert plan_windows(7, context=4, stride=2) == [Window(0, 4, 1), Window(2, 6, 4), Window(4, 7, 6)]
    assert plan_windows(3, context=4, stride=2) == [Window(0, 3, 1)]
    assert plan_segments(7, 3) == [Window(0, 4, 1), Window(3, 7, 4)]
    assert plan_windows(1, 4, 2) == plan_segments(0, 4) == []


@pytest.mark.parametrize("stride", [0, 5])
def test_a_stride_that_would_skip_tokens_is_refused(stride):
    with pytest.raises(ValueError, match="stride"):
        plan_windows(10, context=4, stride=stride)


def test_rows_of_a_batch_are_as_many_as_idle_least_on_a_cpu_and_all_on_a_gpu():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_rows([8000] * 4, 512, 16, cpu) == 4
    assert choose_rows([8000, *[1000] * 8], 512, 16, cpu) == 2  # eight short ones beside the long one
    assert choose_rows([8000, *[1000] * 8], 512, 16, gpu) == 9
    assert choose_rows([8000] * 4, 512, 3, gpu) == 3
    assert choose_rows([], 512, 16, cpu) == 0
