"""One thing to measure, in a process of its own: a model that trains, is evaluated or decodes. See `turns.serve`.

python benchmarks/jobs.py '{"task": "decoding", "model": "pythia"}'     # then lines with numbers of steps
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from layers import load_text
from turns import serve

from new_llm.config import PythiaConfig, TrainConfig
from new_llm.config.allocator import keep_freed_memory
from new_llm.models import TransformerLM, create_model
from new_llm.models.layers import InfiniLayer
from new_llm.training.devices import choose_device, choose_precision, make_autocast, reset_peak_memory
from new_llm.training.preparation import make_optimizer

# hidden size, layers, heads: Pythia, arXiv:2304.01373, table 1 (14m, 31m: EleutherAI's cards); MLPs are 4 times wider
SIZES = {
    "quick": (64, 2, 2),
    "14m": (128, 6, 4),
    "31m": (256, 6, 8),
    "70m": (512, 6, 8),
    "160m": (768, 12, 12),
    "410m": (1024, 24, 16),
}
VOCAB = {"quick": 8192}
PEER = "infini-transformer-pytorch"


@dataclass(frozen=True)
class Job:
    """What a process measures.

    Attributes:
        task: training (forward, backward, AdamW), evaluation (the loss) or decoding (seconds of a token).
        model: pythia or infini (all layers) of ours, hugging_face, or the package infini-transformer-pytorch.
        size: of SIZES.
        rows: rows of the batch.
        tokens: tokens of a row; in decoding those of the prompt.
        segment: tokens of a segment of models with memory.
        new_tokens: of decoding.
        device: auto, cpu or cuda.
    """

    task: str
    model: str
    size: str = "70m"
    rows: int = 1
    tokens: int = 1024
    segment: int = 256
    new_tokens: int = 32
    device: str = "auto"

    @property
    def command(self) -> list[str]:
        return [sys.executable, __file__, json.dumps(asdict(self))]

    @property
    def shape(self) -> PythiaConfig:
        hidden, layers, heads = SIZES[self.size]
        return PythiaConfig(
            vocab_size=VOCAB.get(self.size, PythiaConfig.vocab_size),
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * hidden,
        )


def make_model(job: Job) -> Any:
    """The model with new weights, on the CPU."""
    torch.manual_seed(0)
    shape = job.shape
    size = (shape.hidden_size, shape.num_attention_heads, shape.intermediate_size)
    if job.model == "pythia":
        return create_model("pythia", shape)
    if job.model == "infini":  # heads as the peer's, so that both hold memories of the same size
        layers = [InfiniLayer(*size, num_memory_heads=size[1]) for _ in range(shape.num_hidden_layers)]
        return TransformerLM(layers, shape.vocab_size, job.segment)
    if job.model == "hugging_face":
        return make_hugging_face(shape)
    from infini_transformer_pytorch import InfiniTransformer, InfiniTransformerWrapper

    peer = InfiniTransformer(
        num_tokens=shape.vocab_size,
        dim=shape.hidden_size,
        depth=shape.num_hidden_layers,
        dim_head=shape.hidden_size // shape.num_attention_heads,
        heads=shape.num_attention_heads,
        use_mem_delta_rule=True,
    )
    return InfiniTransformerWrapper(peer, segment_length=job.segment)


def make_hugging_face(shape: PythiaConfig) -> Any:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "rotary_pct")
    config = GPTNeoXConfig(
        **{name: getattr(shape, name) for name in names},
        max_position_embeddings=shape.max_position_embeddings,
        tie_word_embeddings=False,
    )
    return GPTNeoXForCausalLM(config)


def make_loss(job: Job, model: Any, text: torch.Tensor) -> Callable[[], torch.Tensor]:
    """A function that reads text [B, T + 1] and gives the mean loss of its predictions."""
    ids = text[:, :-1].contiguous()
    if job.model == "hugging_face":
        return lambda: model(input_ids=ids, labels=ids, use_cache=False).loss
    if job.model == PEER:
        return lambda: model(text)

    def compute_loss() -> torch.Tensor:
        return model.total_loss(ids, text) / ids.numel()

    return compute_loss


def make_training(job: Job, model: Any, text: torch.Tensor, device: torch.device) -> Callable[[], object]:
    autocast = make_autocast(choose_precision("auto", device), device)
    if isinstance(model, TransformerLM):
        optimizer = make_optimizer(model, TrainConfig())
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    compute_loss = make_loss(job, model, text)

    def step() -> None:
        with autocast():
            # the peer runs backward itself, every second segment, where it cuts the gradient
            loss = model(text, backward=True) if job.model == PEER else compute_loss()
        if job.model != PEER:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def make_evaluation(job: Job, model: Any, text: torch.Tensor, device: torch.device) -> Callable[[], object]:
    autocast = make_autocast(choose_precision("auto", device), device)
    compute_loss = make_loss(job, model.eval(), text)

    def step() -> None:
        with torch.no_grad(), autocast():
            compute_loss()

    return step


def make_decoding(job: Job, model: Any, text: torch.Tensor) -> Callable[[], object]:
    """Seconds a token of greedy decoding in bf16, without the prompt's."""
    model = model.eval().to(torch.bfloat16)
    prompt = text[:, :-1].contiguous()
    mask = torch.ones_like(prompt)

    def generate(count: int) -> None:
        if job.model == "hugging_face":
            model.generate(
                prompt,
                attention_mask=mask,
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        elif job.model == PEER:
            best = {"seq_len": prompt.shape[1] + count, "temperature": 0.0, "filter_kwargs": {"k": 1}}
            from infini_transformer_pytorch.wrapper import top_k

            model.generate(prompt=prompt, filter_fn=top_k, **best)
        else:
            model.generate(prompt, max_new_tokens=count)

    def step() -> float:
        seconds = []
        for count in (1, job.new_tokens + 1):
            begin = time.perf_counter()
            generate(count)
            if prompt.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        return (seconds[1] - seconds[0]) / job.new_tokens

    return step


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    device = choose_device(job.device)
    keep_freed_memory()
    reset_peak_memory(device)
    text = load_text(job.rows * (job.tokens + 1)).view(job.rows, -1).to(device)
    model = make_model(job).to(device)
    if job.task == "decoding":
        step = make_decoding(job, model, text)
    else:
        make = make_training if job.task == "training" else make_evaluation
        step = make(job, model, text, device)
    serve(step, device, warm_up=1)


if __name__ == "__main__":
    main()
