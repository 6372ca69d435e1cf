"""The text of a measurement: a source, or the validation documents of the subject's run."""

from new_llm.config import UserError
from new_llm.config.evaluation import TextConfig
from new_llm.data.dataset import EvaluationText, count_text, prepare_data, read_evaluation_text
from new_llm.data.tokenizer import fingerprint_tokenizer
from new_llm.experiments.subject import Subject


def load_evaluation_text(subject: Subject, config: TextConfig) -> EvaluationText:
    """Read what the configuration names with the subject's tokenizer; no source: its run's validation documents.

    Raises:
        UserError: the text can't be read, or the subject belongs to no run and no source is named.
    """
    if config.source is not None:
        return read_evaluation_text(config, subject.tokenizer)
    if subject.config is None:
        raise UserError(f"data.source: {subject.label} belongs to no run, so a text must be named: --data.source FILE")
    if config != TextConfig():
        raise UserError("data: without --data.source the run's validation documents are read as they are")
    data = prepare_data(subject.config.data)
    if fingerprint_tokenizer(data.tokenizer) != fingerprint_tokenizer(subject.tokenizer):
        source = subject.config.data.source
        raise UserError(f"{source}: has changed since the run: it gives another tokenizer; name a text: --data.source")
    info = {
        "source": f"validation documents of {data.info['source']}",
        "source_fingerprint": data.info["source_fingerprint"],
    }
    return EvaluationText(data.validation, info | count_text(data.validation))
