"""How a model goes on with a text."""

from typing import Annotated

from pydantic import BeforeValidator, Field

from new_llm.config.errors import UserError
from new_llm.config.sections import section, short


def _as_tuple(value: object) -> object:
    return (value,) if isinstance(value, str | int) else value


@section
class GenerationConfig:
    """The settings of `generate`, with Hugging Face's names where there is a counterpart."""

    max_new_tokens: Annotated[int, Field(gt=0)] = 50
    """New tokens of each prompt at most."""
    do_sample: bool = False
    """Draw each token at random; otherwise the likeliest one is taken (greedy)."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the logits before a draw: below 1 likely tokens become likelier still."""
    top_k: Annotated[int | None, Field(gt=0)] = None
    """Draw among so many of the likeliest tokens; None: among all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw among the fewest likeliest tokens whose probabilities reach this sum."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    """Divides positive and multiplies negative logits of tokens that the text already has; 1: no penalty."""
    stop_strings: Annotated[tuple[str, ...], BeforeValidator(_as_tuple), short("--stop")] = ()
    """Texts that end a row; the row's text ends before them."""
    eos_token_id: Annotated[tuple[int, ...], BeforeValidator(_as_tuple)] = ()
    """Tokens that end a row; one number or several."""
    pad_token_id: Annotated[int, Field(ge=0)] = 0
    """Fills a row that ended before the others."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the draws; row r draws by seed + r, whatever stands in the other rows."""
    prompt_tokens_per_call: Annotated[int, Field(gt=0)] = 2048
    """Tokens of a prompt that are read at once, rounded down to whole segments; one segment at least."""

    def __post_init__(self) -> None:
        if any(not text for text in self.stop_strings):
            raise UserError("stop_strings: an empty string would end every text at once")
        if any(token < 0 for token in self.eos_token_id):
            raise UserError(f"eos_token_id: {list(self.eos_token_id)}: ids are not negative")
