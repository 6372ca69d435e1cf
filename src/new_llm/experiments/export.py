"""Export a run's model as a folder for Hugging Face's tools, with a model card of what the run measured."""

from pathlib import Path
from typing import Any, Literal

from new_llm.config import UserError
from new_llm.config.files import write_text_atomically
from new_llm.config.terminal import hide_home, make_line
from new_llm.evaluation import MEASURES
from new_llm.experiments.run_folder import (
    DATA_FILE,
    ENVIRONMENT_FILE,
    MODEL_RESULT_FILE,
    find_model_folder,
    load_run_model,
    read_json,
)
from new_llm.models import TransformerLM
from new_llm.models.hf import export_auto, export_pythia
from new_llm.models.model_file import STRUCTURE_FILE

CARD_FILE = "README.md"
CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [{tags}]
---

# {title}

A causal language model in the shape of Pythia, trained with New-LLM. A base model: it continues a text, and answers
nothing.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
{registration}
model = AutoModelForCausalLM.from_pretrained("{title}")
tokenizer = AutoTokenizer.from_pretrained("{title}")
ids = tokenizer("The Congress", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0]))
```

{facts}
"""
REGISTRATION = "import new_llm.models.hf  # registers the model type; no code comes from the model's folder\n"


def export_run(
    run: str | Path, model: str | None, directory: str | Path, *, layout: Literal["auto", "gpt_neox"] = "auto"
) -> None:
    """Write a run's model with its best weights, its tokenizer and a model card; an exported model there is replaced.

    `layout` is auto, for every kind of model, or gpt_neox, for plain Pythia models.
    """
    run, directory = Path(run), Path(directory).expanduser()
    source = find_model_folder(run, model)
    if (directory / STRUCTURE_FILE).is_file():
        raise UserError(f"{directory}: a model of this project is stored here; choose another folder to export to")
    loaded, tokenizer = load_run_model(run, model)
    export = export_pythia if layout == "gpt_neox" else export_auto
    export(loaded, directory, tokenizer)
    write_text_atomically(directory / CARD_FILE, write_card(loaded, source, layout, directory.resolve().name))


def write_card(model: TransformerLM, source: Path, layout: str, title: str) -> str:
    """The model card, in Markdown with the hub's metadata: how to load the model, what it is, and its run's figures."""
    kinds = [layer.kind for layer in model.layer_list]
    facts = {
        "layers": ", ".join(kinds),
        "parameters": f"{model.num_parameters()['total']:,}",
        "segment": f"{model.segment_length:,} tokens",
        "weights": str(model.embed_in.weight.dtype).removeprefix("torch."),
        "memory": f"{model.memory_info()['total_bytes']:,} bytes" if model.memory_layers else None,
        **_read_figures(source),
    }
    shown = {
        name: hide_home(make_line(value)).replace("|", "\\|") for name, value in facts.items() if value is not None
    }
    rows = [f"| {name} | {value} |" for name, value in shown.items()]
    return CARD.format(
        tags=", ".join(["new-llm", *dict.fromkeys(kinds)]),
        title=title,
        registration=REGISTRATION if layout == "auto" else "",
        facts="\n".join(["| | |", "| --- | --- |", *rows]),
    )


def _read_figures(source: Path) -> dict[str, Any]:
    """What the run of a model's folder recorded; empty where there is no run."""
    result = read_json(source.parent / MODEL_RESULT_FILE)
    if result is None:
        return {}
    data, run = (read_json(source.parent.parent / name) or {} for name in (DATA_FILE, ENVIRONMENT_FILE))
    training = result.get("training", {})
    return {
        "trained on": data.get("source"),
        "tokenizer": data.get("tokenizer", {}).get("name"),
        "tokens read": f"{training['tokens']:,}" if training else None,
        "command": f"`{run['command']}`" if "command" in run else None,
        "code revision": run.get("code", {}).get("git_revision"),
    } | {
        MEASURES[name].title: f"{found['perplexity']:,.4g}"
        for name, found in result.get("evaluation", {}).items()
        if name in MEASURES and found and found.get("perplexity") is not None
    }
