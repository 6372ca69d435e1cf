"""The shells' completion knows every command and its flags."""

import shutil
import subprocess

import pytest

from new_llm.cli.completion import write_completion
from new_llm.cli.main import main


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_script_for_each_shell(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "new-llm" in script
    assert "num-memories" in script


@pytest.mark.skipif(shutil.which("bash") is None or shutil.which("python3") is None, reason="needs bash and python3")
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["exp"], {"experiment", "experiment-selective", "export"}),
        (["eval", "re"], {"recall", "reversal"}),
        (["memory", "fill", "--ou"], {"--out"}),
        (["generate", "--max-new"], {"--max-new-tokens"}),
    ],
)
def test_bash_completes(words: list[str], expected: set[str]) -> None:
    ask = (
        f"COMP_WORDS=(new-llm {' '.join(words)}); COMP_CWORD={len(words)}\n"
        "$(complete -p new-llm | sed 's/.*-F \\([^ ]*\\).*/\\1/')\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    script = f"{write_completion('bash')}\n{ask}"
    found = subprocess.run(["bash"], input=script, capture_output=True, text=True, check=True, timeout=60)
    assert set(found.stdout.split()) == expected, found.stderr
