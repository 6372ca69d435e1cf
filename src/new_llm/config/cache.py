"""How large a cache around a trained model is, and how it is mixed with the model."""

from typing import Annotated, Literal

from pydantic import Field

from new_llm.config.errors import UserError
from new_llm.config.sections import section, short

COMPONENTS = ("model", "states", "unigrams", "bigrams", "trigrams")
"""What a cached model mixes."""
MAX_ORDER = 3

Weight = Annotated[float, Field(ge=0)]
Weights = tuple[Weight, Weight, Weight, Weight, Weight]


@section
class CacheConfig:
    """A cache of the text read so far: of its last states, and of what followed its n-grams."""

    num_states: Annotated[int, Field(ge=0), short("--cache")] = 0
    """N: the last states that are kept, each with the token that followed; 0: none."""
    ngram_order: Annotated[int, Field(ge=0, le=MAX_ORDER), short("--ngrams")] = 0
    """Count what followed in the text: 1 all tokens, 2 also each token (bigrams), 3 also each pair; 0: nothing."""
    similarity: Literal["cosine", "dot"] = "cosine"
    """How two states are compared: by the angle between them, or by their inner product."""
    theta: Annotated[float, Field(gt=0)] = 12.0
    """θ: how much more a similar state counts; its best value depends on the similarity."""
    weights: tuple[Weights, Weights, Weights, Weights] = (
        (0.65, 0.35, 0.0, 0.0, 0.0),
        (0.90, 0.07, 0.03, 0.0, 0.0),
        (0.60, 0.22, 0.02, 0.16, 0.0),
        (0.38, 0.27, 0.02, 0.08, 0.25),
    )
    """Weights of model, states, unigrams, bigrams and trigrams where the longest n-gram context that the text has
    seen before is none, the empty one, the last token, the last two tokens. What is off or knows nothing is left out,
    and the others' weights are scaled to sum to 1. The defaults are near what EM gives on WikiText-2's articles."""

    def __post_init__(self) -> None:
        if any(row[0] <= 0 for row in self.weights):
            raise UserError("weights: the model's must be positive, or a token that no cache knows is impossible")

    @property
    def is_on(self) -> bool:
        """Whether anything is cached."""
        return self.num_states > 0 or self.ngram_order > 0


@section
class TunedCacheConfig(CacheConfig):
    """A cache around the model that is measured; its θ and weights are set by other documents than the measured ones.

    They are those of `tuning_source`; else the run's validation documents where --data.source names another text, or
    the end of its training documents. For a model that belongs to no run they stay as given.
    """

    tuning_source: str | None = None
    """The text to tune on, as in --data.source; None: documents of the run."""
    tuning_tokens: Annotated[int, Field(ge=2)] = 30_000
    """Tokens to tune on at most, the last ones."""
