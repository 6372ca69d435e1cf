"""A run that is killed again and again ends as one that never was."""

import random
import signal

import pytest
from fault_runs import assert_same_end, kill_often

KILLS = ["start"] * 3 + ["checkpoint"] * 9 + ["training"] * 10
STOPS = ["start", "checkpoint", "training", "checkpoint", "training", "training"]


def order_aims(aims: list[str], dice: random.Random) -> list[str]:
    """In random order, and three more: while the first model is measured, while the second is, and at once again."""
    mixed = dice.sample(aims, len(aims))
    half = len(mixed) // 2
    return [*mixed[:half], "measurement", *mixed[half:], "measurement", "measurement"]


@pytest.mark.slow
def test_25_sigkills_at_random_instants_change_nothing(whole, killed, dice, capsys):
    aims = order_aims(KILLS, dice)
    num_torn = 0
    for number, (aim, _, code, err) in enumerate(kill_often(killed, aims, [signal.SIGKILL], dice)):
        assert code == -signal.SIGKILL, err
        assert killed.find_faults() == [], (number, aim)
        num_torn += killed.is_writing_checkpoint()
    killed.finish()
    assert_same_end(killed, whole)
    with capsys.disabled():
        print(f" [{len(aims)} kills, {num_torn} in the middle of a checkpoint]", end="")
    assert num_torn >= 3


@pytest.mark.slow
def test_sigterm_and_ctrl_c_at_random_instants_end_cleanly_and_change_nothing(whole, killed, dice):
    aims = order_aims(STOPS, dice)
    for aim, sent, code, err in kill_often(killed, aims, [signal.SIGTERM, signal.SIGINT], dice):
        # In a process's first instants Python has not begun the program yet, and nothing is said.
        assert code == 130 or (not err.strip() and code == -sent) or aim == "start", (aim, code, err)
        assert not killed.is_writing_checkpoint(), aim
        assert killed.find_faults() == [], aim
        if code == 130:
            assert "Traceback" not in err, err
            last = err.strip().splitlines()[-1]
            assert "--resume" in last or last == "new-llm: interrupted", err
    killed.finish()
    assert_same_end(killed, whole)
