"""studies/gates.py: trained models of a study, measured again with their gates set elsewhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from experiment_cases import write_study

from new_llm.cli.main import main

SCRIPT = Path(__file__).parents[2] / "studies" / "gates.py"


@pytest.mark.slow
def test_gates_set_elsewhere(addresses, tmp_path):
    variants = {"reference": {}, "token": {"models": ["token_memory"]}}
    study = {"variants": variants, "seeds": [0], "baselines": [], "window_baselines": []}
    path = write_study(tmp_path / "study.yaml", addresses, **study)
    assert main(["study", str(path)]) == 0
    command = [sys.executable, str(SCRIPT), str(path), "--variants", "reference", "token", "--shares", "0", "0.5"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "tiny-study"
    summary = json.loads((folder / "study.json").read_text())
    record = json.loads((folder / "gates.json").read_text())
    assert [model["seed"] for model in record["models"]] == [0, 0]
    for model in record["models"]:
        figures = summary["variants"][model["variant"]]["figures"]
        carried = figures["Long documents: validation: carried"]["by_seed"]
        assert model["perplexity"] == pytest.approx(carried[str(model["seed"])], rel=1e-4)
        assert model["relative"].keys() == {"0.0", "0.5"}
        assert model["relative"]["0.0"] != 0  # without its memory the model reads otherwise
        if model["variant"] == "reference":
            assert not model["token_gates"]
            continue
        (gates,) = model["token_gates"]
        assert sorted(gates["all"]) == gates["all"]
        assert gates["all"][0] < gates["all"][-1]  # they move with the token
        assert len(gates["heads"]) == 4
        assert gates["num_tokens"] > 0
    assert "| reference | " in done.stdout
    assert done.stdout.count("of tokens' gates") == 1
