"""A model card: what the model is, what its run measured, and how it is loaded."""

from typing import Any

from new_llm.models import TransformerLM

TEMPLATE = """---
library_name: transformers
pipeline_tag: text-generation
tags: [{tags}]
---

# {title}

{summary}

## Loading

```python
{loading}
```

A base model: it continues a text, and answers nothing.

## The model

{model}
"""
LOADING = """from transformers import AutoModelForCausalLM, AutoTokenizer
{registration}
model = AutoModelForCausalLM.from_pretrained("{title}")
tokenizer = AutoTokenizer.from_pretrained("{title}")
ids = tokenizer("The Congress", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0]))"""
REGISTRATION = "import new_llm.models.hf  # registers the model type; no code comes from the model's folder\n"
PERPLEXITY_HEADER = ("protocol", "perplexity", "bits a byte", "tokens")
PROTOCOLS = {
    "sliding": "sliding window",
    "streaming": "streaming, memory carried",
}


def write_card(model: TransformerLM, figures: dict[str, Any], layout: str, title: str) -> str:
    """The card's text, in Markdown with the hub's metadata.

    Args:
        model: the model.
        figures: `result`, `data` and `environment` of its run, as far as there are any.
        layout: auto or gpt_neox.
        title: the folder's name.
    """
    kinds = [layer.kind for layer in model.layer_list]
    tags = ["new-llm", *dict.fromkeys(kinds)]
    loading = LOADING.format(title=title, registration=REGISTRATION if layout == "auto" else "")
    memory = " with compressive memory" if model.memory_layers else ""
    card = TEMPLATE.format(
        tags=", ".join(tags),
        title=title,
        summary=f"A causal language model{memory} in the shape of Pythia, trained with New-LLM.",
        loading=loading,
        model=_tabulate(("", ""), _describe_model(model, kinds)),
    )
    for heading, header, rows in (
        ("Training", ("", ""), _describe_training(figures)),
        ("Perplexity on held-out documents", PERPLEXITY_HEADER, _list_figures(figures)),
        ("Perplexity by position", ("positions", "perplexity"), _list_positions(figures)),
        ("The reversal curse", ("", "forward", "backward"), _list_reversal(figures)),
    ):
        if rows:
            card += f"\n## {heading}\n\n{_tabulate(header, rows)}\n"
    return card


def _describe_model(model: TransformerLM, kinds: list[str]) -> list[tuple[str, ...]]:
    rows = [
        ("layers", ", ".join(kinds)),
        ("parameters", f"{model.num_parameters()['total']:,}"),
        ("vocabulary", f"{model.vocab_size:,}"),
        ("segment", f"{model.segment_length:,} tokens"),
        ("precision of the weights", str(model.embed_in.weight.dtype).removeprefix("torch.")),
    ]
    if model.count_passes() > 1:
        rows.append(("passes a token", str(model.count_passes())))
    if model.memory_layers:
        rows.append(("memory", f"{model.memory_info()['total_bytes']:,} bytes"))
    return rows


def _describe_training(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    data, training = figures.get("data", {}), figures.get("result", {}).get("training", {})
    facts, documents = figures.get("environment", {}), data.get("train", {})
    rows = {
        "text": data.get("source"),
        "documents": documents.get("num_documents"),
        "tokenizer": data.get("tokenizer", {}).get("name"),
        "tokens read": training.get("tokens"),
        "steps": training.get("steps"),
        "best epoch": training.get("best_epoch"),
        "seconds": training.get("seconds"),
        "command": f"`{facts['command']}`" if facts.get("command") else None,
        "code revision": facts.get("code", {}).get("git_revision"),
    }
    return [(name, _format(value)) for name, value in rows.items() if value is not None]


def _list_figures(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    measured = figures.get("result", {}).get("evaluation", {})
    names = ("perplexity", "bits_per_byte", "num_tokens")
    return [
        (title, *(_format(measured[key].get(name)) for name in names))
        for key, title in PROTOCOLS.items()
        if measured.get(key)
    ]


def _list_positions(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    positions = figures.get("result", {}).get("evaluation", {}).get("positions") or {}
    return [
        (f"{entry['start']}–{entry['end']}", _format(entry.get("perplexity"))) for entry in positions.get("ranges", [])
    ]


def _list_reversal(figures: dict[str, Any]) -> list[tuple[str, ...]]:
    found = figures.get("result", {}).get("evaluation", {}).get("reversal") or {}
    return [
        (name, *(_format(found[f"{direction}_{name}"]) for direction in ("forward", "backward")))
        for name in ("perplexity", "accuracy")
        if f"forward_{name}" in found and f"backward_{name}" in found
    ]


def _tabulate(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _format(value: Any) -> str:
    if value is None:
        return "—"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
