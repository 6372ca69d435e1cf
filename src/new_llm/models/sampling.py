"""From logits to tokens to text: choosing the next token, and decoding whole characters up to a stop string."""

from collections.abc import Sequence

import torch
from tokenizers import Tokenizer
from torch import Tensor

from new_llm.config import UserError
from new_llm.config.model import GenerationConfig

FIRST_CANDIDATES = 1024
"""Number of tokens that top_p ranks at first: more are rarely needed, and ranking the whole vocabulary is slow."""


def rank_candidates(logits: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The highest logits and their tokens, [B, number] each; if the maximum is tied, the first token is argmax's."""
    values, tokens = logits.topk(number, dim=-1)
    best, first = logits.argmax(-1, keepdim=True), tokens[:, :1].clone()
    tokens = torch.where(tokens == best, first, tokens)
    tokens[:, :1] = best
    return values, tokens


class TokenSampler:
    """Greedy choice, or sampling after penalty, temperature, top_k and top_p, in this order.

    A sample inverts the cumulative distribution at a uniform random number. Each row has its own generator, so its
    samples do not depend on the rest of the batch.

    Args:
        config: the settings.
        input_ids: the prompts, [B, T].
        mask: True at the prompts' real tokens, [B, T] bool.
        vocab_size: Z.
    """

    def __init__(self, config: GenerationConfig, input_ids: Tensor, mask: Tensor, vocab_size: int) -> None:
        self.config = config
        self.seen: Tensor | None = None
        if config.repetition_penalty != 1:
            counts = torch.zeros(len(input_ids), vocab_size, dtype=torch.int32, device=input_ids.device)
            self.seen = counts.scatter_add_(1, input_ids, mask.to(torch.int32)) > 0
        self.zero = torch.zeros(len(input_ids), device=input_ids.device)  # NaN once a row's largest logit is not finite
        self.uniform = torch.zeros(len(input_ids), 1, dtype=torch.float64, device=input_ids.device)
        self.generators = [torch.Generator().manual_seed(config.seed + row) for row in range(len(input_ids))]

    def choose(self, logits: Tensor) -> Tensor:
        """The next token of each row, [B], from logits [B, Z].

        Runs `check` on a CPU only; on a GPU that is left to the caller, since it synchronises.
        """
        self.draw()
        tokens = self.pick(logits)
        if logits.device.type == "cpu":
            self.check()
        return tokens

    def draw(self) -> None:
        """Draw each row's random number for the next `pick`, on the CPU."""
        if self.config.do_sample:
            drawn = [torch.rand(1, generator=row, dtype=torch.float64) for row in self.generators]
            self.uniform.copy_(torch.stack(drawn), non_blocking=True)

    def pick(self, logits: Tensor) -> Tensor:
        """Like `choose`, but with the random numbers of the last `draw`, and without synchronising or checks."""
        self.zero.add_(logits.amax(-1) * 0)  # amax propagates NaN; infinity times 0 is NaN
        logits = _widen(logits)  # argmax in 16 bits is five times slower
        if self.seen is not None:
            # CTRL, arXiv:1909.05858, section 4.1, always divides, which would raise negative logits.
            penalty = self.config.repetition_penalty
            penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
            logits = torch.where(self.seen, penalized, logits)
        tokens = self._draw(logits) if self.config.do_sample else logits.argmax(-1)
        if self.seen is not None:
            self.seen.scatter_(1, tokens.unsqueeze(1), True)
        return tokens

    def check(self) -> None:
        """Raise a UserError if a row's largest logit has ever been NaN or infinite."""
        if bool(self.zero.isnan().any()):
            raise UserError("generation: the logits are NaN or infinite; values in the weights or memory are too large")

    def _draw(self, logits: Tensor) -> Tensor:
        scaled = logits / self.config.temperature
        if self.config.top_k is None and self.config.top_p == 1:
            return invert_cumulative(scaled.softmax(-1), self.uniform)
        probabilities, tokens = self._keep_candidates(scaled)
        return tokens.gather(1, invert_cumulative(probabilities, self.uniform).unsqueeze(1)).squeeze(1)

    def _keep_candidates(self, scaled: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities (not normalised) and tokens of the candidates, likeliest first, [B, C] each."""
        top_p, size = self.config.top_p, scaled.shape[-1]
        if self.config.top_k is not None:
            values, tokens = rank_candidates(scaled, min(self.config.top_k, size))
            probabilities = values.softmax(-1)
        else:
            log_sums = scaled.logsumexp(-1, keepdim=True)
            asks = scaled.device.type == "cpu"  # on a GPU the check below would synchronise, and ranking all is fast
            values, tokens = rank_candidates(scaled, min(FIRST_CANDIDATES, size) if asks else size)
            if asks and bool(((values - log_sums).exp().sum(-1) < top_p).any()):
                values, tokens = rank_candidates(scaled, size)
            probabilities = (values - log_sums).exp()
        before = probabilities.cumsum(-1) - probabilities  # sum over likelier tokens; the likeliest is always kept
        return probabilities.masked_fill(before >= top_p, 0), tokens


def invert_cumulative(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The first index, [B], at which the cumulative probability exceeds u times the total; its probability is never 0.

    Args:
        probabilities: [B, C], with any positive sum.
        uniform: u in [0, 1), [B, 1], float64.
    """
    cumulative = probabilities.double().cumsum(-1)
    total = cumulative[:, -1:].contiguous()
    place = torch.searchsorted(cumulative, uniform * total, right=True)
    return torch.minimum(place, torch.searchsorted(cumulative, total)).squeeze(1)  # u · total may round up to the total


def _widen(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


# Text


REPLACEMENT = "\ufffd"
"""What a decoder returns for bytes that do not, or not yet, form a character."""


class TextDecoder:
    """Decodes one row token by token; the pieces concatenated are the text of all tokens.

    A token's text depends on the tokens before it, so a piece is what its tokens add to the text of the previous
    piece's tokens. Bytes that do not form a character are held back until a character follows. Byte tokens
    (SentencePiece's byte fallback) are held back until another kind of token follows, since one invalid byte turns all
    bytes of its run into replacement characters. Special tokens have no text.

    Args:
        tokenizer: the tokenizer.
        context: the tokens before the text, such as the prompt's. Tokenizers that mark the beginning of words, such as
            SentencePiece, omit the space before the first word of a text, but not between words.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.special = {token for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}
        self.bytes = {tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
        self.show([token for token in context if token not in self.special])

    def show(self, ids: list[int]) -> None:
        """Restart after tokens whose text has been returned."""
        self.ids, self.num_shown, self.shown = ids, len(ids), self.tokenizer.decode(ids)

    def push(self, token: int) -> str:
        """Add a token and return the text that it completes, which may be empty."""
        if token in self.special:
            return ""
        self.ids.append(token)
        text = "" if token in self.bytes else self.tokenizer.decode(self.ids)
        if len(text) <= len(self.shown) or text.endswith(REPLACEMENT):
            return ""
        piece = text[len(self.shown) :]
        self.show(self.ids[self.num_shown :])
        return piece

    def finish(self) -> str:
        """Return the text that was held back, such as an incomplete character."""
        piece = self.tokenizer.decode(self.ids)[len(self.shown) :]
        self.show([])
        return piece


class StoppingText:
    """The text of one row up to its first stop string, which may span tokens; `context` as in `TextDecoder`."""

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = (), context: Sequence[int] = ()) -> None:
        self.decoder = TextDecoder(tokenizer, context)
        self.stop_strings = stop_strings
        self.held = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """Add a token and return the text that is now certain; sets `is_stopped` once a stop string is complete."""
        return self._cut(self.decoder.push(token))

    def finish(self) -> str:
        """Return the remaining text of a row that ended for another reason."""
        piece = "" if self.is_stopped else self._cut(self.decoder.finish())
        held, self.held = self.held, ""
        return piece + held

    def _cut(self, piece: str) -> str:
        text = self.held + piece
        found = [place for place in map(text.find, self.stop_strings) if place >= 0]
        if found:
            self.is_stopped, self.held = True, ""
            return text[: min(found)]
        kept = self._count_begun(text)
        self.held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def _count_begun(self, text: str) -> int:
        """Number of characters at the end that may be the beginning of a stop string."""
        longest = max(map(len, self.stop_strings), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.stop_strings):
                return length
        return 0
