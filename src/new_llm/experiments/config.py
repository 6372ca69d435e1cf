"""The configurations of experiments (which models, of which shape, on which data), of adapters and of studies."""

import contextlib
import dataclasses
import functools
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self, TypeVar, get_args, get_type_hints

import tyro
from pydantic import AfterValidator, Field, ValidationInfo, model_serializer

from new_llm.config.errors import UserError
from new_llm.config.evaluation import AllLongDocumentsConfig, CacheMeasureConfig, EvalConfig, RecallConfig
from new_llm.config.loading import RunSettings, TrainingSettings, is_user_name, parse_yaml, settings_from_dict
from new_llm.config.model import SIZES, PythiaConfig, check_adapter_suffix
from new_llm.config.sections import read_field_docs, section, short
from new_llm.config.train import ClusterConfig, DataConfig, TrainConfig
from new_llm.models.factory import MODEL_KINDS, RECIPES, find_model_kind, find_places, resolve_options
from new_llm.models.layers.infini import AdapterConfig, ParallelInfiniLayer

T = TypeVar("T")


class OptionField(NamedTuple):
    """An option of one or several model types: its type, its help text, and its default by model type."""

    annotation: Any
    text: str
    defaults: dict[str, Any]


@functools.cache
def list_option_fields() -> dict[str, OptionField]:
    """The options of all model types by name, in the order of registration."""
    found: dict[str, OptionField] = {}
    for name, kind in MODEL_KINDS.items():
        defaults = kind.defaults
        for part in kind.options:
            docs = read_field_docs(part)
            annotations = get_type_hints(part, include_extras=True)
            for field in dataclasses.fields(part):
                entry = found.setdefault(field.name, OptionField(annotations[field.name], docs.get(field.name, ""), {}))
                entry.defaults[name] = defaults[field.name]
    return found


NOT_FOR_ALL = (*list_option_fields(), "recipe", "segment_length")
"""Settings of the model section that change only some model types."""


def add_given_fields(kind: type[T]) -> type[T]:
    """Class decorator: add a field for each field of the shape and each option of a model type; None: not given."""
    docs = read_field_docs(PythiaConfig)
    fields = {
        name: (annotation, f"{docs[name]} Default: {getattr(PythiaConfig, name)}, or the size's.")
        for name, annotation in get_type_hints(PythiaConfig, include_extras=True).items()
    }
    for name, option in list_option_fields().items():
        takers: dict[str, list[str]] = {}  # model types by their default, for `(infini: 1; token_memory: 4)`
        for taker, value in option.defaults.items():
            takers.setdefault(str(list(value) if isinstance(value, tuple) else value), []).append(taker)
        told = "; ".join(f"{', '.join(names)}: {value}" for value, names in takers.items())
        fields.setdefault(name, (option.annotation, f"{option.text} ({told})"))
    for name, (annotation, text) in fields.items():
        if name in kind.__annotations__:
            continue
        base, *metadata = get_args(annotation) if hasattr(annotation, "__metadata__") else (annotation,)
        aliases = [alias for entry in metadata for alias in getattr(entry, "aliases", None) or ()]
        kept = [entry for entry in metadata if not hasattr(entry, "aliases") or not hasattr(entry, "metavar")]
        help_text = tyro.conf.arg(
            aliases=aliases or None,
            help=" ".join(text.split()),  # tells the default
            help_behavior_hint=lambda value: "" if value.lower() == "none" else f"(default: {value})",
        )
        given = tyro.conf.DisallowNone[base | None]  # so that a bool is a flag
        kind.__annotations__[name] = Annotated[(given, *kept, help_text)]
        setattr(kind, name, None)
    return kind


OptionValue = bool | int | float | str | None


def _read_option(given: list[str]) -> OptionValue | tuple[OptionValue, ...]:
    """Parse an option's value on the command line: none, true, 4, 0.5, a word, or a YAML list, [0.5, 0.9]."""
    text = given[0]
    if text.startswith("["):
        found = parse_yaml(text, "--model.options")
        return tuple(found) if isinstance(found, list) else text
    if text.lower() in (words := {"none": None, "true": True, "false": False}):
        return words[text.lower()]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


GivenOption = Annotated[
    OptionValue | tuple[OptionValue, ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="VALUE",
        instance_from_str=_read_option,
        is_instance=lambda _: True,
        str_from_instance=lambda value: [str(value)],
    ),
]


@section
@add_given_fields
class ModelConfig:
    """The model section of an experiment: one shape and one set of options for all compared models.

    None means the default of the shape or the model type. An option applies to the models that have it; an option that
    no model of the run has is an error.
    """

    size: Annotated[Literal[tuple(SIZES)] | None, short("--size")] = None  # pyright: ignore[reportInvalidTypeForm]
    """A shape of the Pythia suite by name; the shape's fields override it."""
    recipe: Annotated[Literal[tuple(RECIPES)] | None, short("--recipe")] = None  # pyright: ignore[reportInvalidTypeForm]
    """A named set of options that worked better than the defaults in a study; options you give override it."""
    segment_length: Annotated[int | None, Field(gt=0), short("--segment-length")] = None
    """Tokens per segment; None: data.seq_length / data.segments_per_sample."""
    vocab_size: Annotated[int | None, Field(gt=0)] = None
    """Rows of the embedding and the head; None: the tokenizer's size, rounded up to a multiple of 128."""
    match_parameters: Annotated[tyro.conf.DisallowNone[bool | None], short("--match-parameters")] = None
    """Adjust each model's MLP width so that it has as many parameters as a Pythia of this shape, within 1 % (except
    deep_pythia). None: on if several models are compared and intermediate_size is not given."""
    options: dict[str, GivenOption] = dataclasses.field(default_factory=dict)
    """Options, by name, of a layer from your own module: words, numbers, true, false, none, or lists such as
    [0.5, 0.9]."""

    def __post_init__(self) -> None:
        self.shape(vocab_size=1)

    @model_serializer(mode="plain")
    def list_given(self) -> dict[str, Any]:
        """The given values; YAML and JSON leave out the rest."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None and value != {}}

    def shape(self, vocab_size: int) -> PythiaConfig:
        """The shape that all models of the experiment share."""
        names = (field.name for field in dataclasses.fields(PythiaConfig))
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        values: dict[str, Any] = (SIZES[self.size] if self.size else {}) | {"vocab_size": vocab_size} | given
        return PythiaConfig(**values)

    def options_of(self, model_type: str) -> dict[str, Any]:
        """All options of a model type as keywords of `create_model`: given ones, then the recipe's, then defaults."""
        taken = find_model_kind(model_type).defaults
        given = {name: value for name, value in self._given_options().items() if name in taken}
        return resolve_options(model_type, given, self.recipe)

    def check_taken(self, model_types: Sequence[str]) -> None:
        """Reject settings that change none of these model types, and memory layers beyond the shape's layers."""
        for name, value in self._given_options().items():
            if not takes(model_types, name, value):
                takers = [kind for kind in MODEL_KINDS if takes([kind], name, value)]
                also = f"; it is an option of {', '.join(takers)}" if takers else ""
                raise UserError(f"model.{name}: no model of this run takes it ({', '.join(model_types)}){also}")
        num_layers = self.shape(vocab_size=1).num_hidden_layers
        for model_type in model_types:
            find_places(self.options_of(model_type).get("memory_layers", ()), num_layers)

    def _given_options(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in NOT_FOR_ALL}
        return {name: value for name, value in values.items() if value is not None} | self.options


def takes(model_types: Sequence[str], name: str, value: Any) -> bool:
    """Whether a setting of the model section, one of `NOT_FOR_ALL` or of `options`, changes any of these."""
    if name == "recipe":  # unknown ones are refused elsewhere
        return not set(RECIPES.get(str(value), model_types)).isdisjoint(model_types)
    kinds = map(find_model_kind, model_types)
    return any(kind.reads_segments if name == "segment_length" else name in kind.defaults for kind in kinds)


def check_model_type(name: str, info: ValidationInfo) -> str:
    """Reject an unknown model type. A user's own module is imported, unless its name comes from a run's record."""
    if is_user_name(name) and info.context and info.context["is_record"]:
        return name
    try:
        find_model_kind(name)
    except UserError as error:
        raise UserError(str(error).replace("model_type:", "models:")) from None
    return name


def name_model_folder(name: str) -> str:
    """The name of a model's folder in its run: the model's name; for `my_module:MyLayer`, "my_module-MyLayer"."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name)


SECTIONS = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig, "eval": EvalConfig}


@section
class ExperimentConfig(TrainingSettings):
    """Train models on identical data and compare them.

    The defaults are the reference: the shape of Pythia-70m on 5,000 samples of 256 tokens of the Pile. In Python, a
    field that only one section has can be given directly:
    `ExperimentConfig(num_samples=5000, seq_length=256, num_epochs=30, num_memories=4)`.
    """

    name: Annotated[str | None, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$", max_length=100)] = None
    """The run's name and folder; None: the configuration's name and the time."""
    models: Annotated[tuple[Annotated[str, AfterValidator(check_model_type)], ...], Field(min_length=1)] = (
        "pythia",
        "pythia_segments",
        "infini",
        "token_memory",
    )
    """The models to train and compare; my_module:MyLayer is a layer of your own."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the initial weights and the sample order. The data split has its own seed (data.split_seed)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one. CUDA_VISIBLE_DEVICES selects it."""
    runs_dir: Path = Path("runs")
    """Folder in which run folders are created."""
    init_from: str | None = None
    """RUN or RUN:MODEL: start from the best weights of that model. From a RUN of several models, each model takes the
    weights of its own name. Shape and tokenizer must match; segments and options may differ. None: random weights."""
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)

    @classmethod
    def place_keywords(cls, keywords: dict[str, Any]) -> dict[str, Any]:
        """Move each keyword that is a field of exactly one section into that section."""
        placed = dict(keywords)
        for name in [name for name in keywords if name not in cls.__dataclass_fields__]:
            owners = [key for key, kind in SECTIONS.items() if name in kind.__dataclass_fields__]
            if len(owners) != 1:
                continue
            given = placed.get(owners[0], {})
            fields = dict(given) if isinstance(given, dict) else dataclasses.asdict(given)
            placed[owners[0]] = fields | {name: placed.pop(name)}
        return placed

    def __post_init__(self) -> None:
        if len(set(self.models)) != len(self.models):
            raise UserError(f"models: {[str(m) for m in self.models]} names a model twice")
        longest = self.model.shape(vocab_size=1).max_position_embeddings
        for name in self.models:
            if is_user_name(name) and name.partition(":")[0] not in sys.modules:
                continue  # from a run's record
            if (length := self.context_tokens(name)) > longest:
                what = "model.segment_length" if find_model_kind(name).reads_segments else "data.seq_length"
                raise UserError(f"{what}: {length} exceeds model.max_position_embeddings ({longest})")

    @property
    def segment_length(self) -> int:
        """Tokens per segment, for models that read segments."""
        return self.model.segment_length or self.data.seq_length // self.data.segments_per_sample

    @property
    def matches_parameters(self) -> bool:
        """Whether the MLP widths are set so that all models have equally many parameters."""
        given, width = (vars(self.model)[name] for name in ("match_parameters", "intermediate_size"))
        return len(self.models) > 1 and width is None if given is None else given

    def context_tokens(self, model_type: str) -> int:
        """Tokens that a model reads at once: a segment, or a whole sample if it does not read segments."""
        return self.segment_length if find_model_kind(model_type).reads_segments else self.data.seq_length


ADAPTER_MODELS = ("base", ParallelInfiniLayer.kind)
"""The models of an adapter's run: the unchanged base, and the base with the adapter."""


@section
class AdapterDataConfig(DataConfig):
    """The data section of an adapter's training: long samples, with gradients through all their segments."""

    num_samples: Annotated[int | None, Field(gt=0), short("--samples")] = 5000
    """Samples of training text to read from a long source (num_docs sets how many documents are trained on); None: the
    whole source."""
    seq_length: Annotated[int, Field(ge=2), short("--seq-length")] = 2048
    """Tokens per sample, all from one document."""
    segments_per_sample: Annotated[int, Field(gt=0), short("--segments-per-sample")] = 8
    """Segments per sample; gradients flow through all of them."""
    reversal_pairs: bool = False
    """Add the forward sentences of the reversal pairs to the training set."""


@section
class AdapterTrainConfig(TrainConfig):
    """The train section of an adapter's training."""

    num_epochs: Annotated[int, Field(gt=0), short("--epochs")] = 10
    """Maximum number of passes over the training documents."""
    batch_size: Annotated[int, Field(gt=0), short("--batch-size")] = 4
    """Documents read in parallel, as the rows of a batch."""
    learning_rate: Annotated[float, Field(gt=0), short("--lr")] = 1e-3
    """Peak learning rate of everything but the gates and α."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decay of weight matrices; gates, α, norms and biases have none."""

    def __post_init__(self) -> None:
        if self.sharding != "ddp":
            raise UserError("train.sharding: an adapter needs ddp: its α is a single number, which can't be sharded")


@section
class AdapterTrainingConfig(TrainingSettings):
    """Train a parallel memory adapter on long documents, and measure it against its base."""

    file_name: ClassVar[str] = "adapter.yaml"
    models: ClassVar[tuple[str, ...]] = ADAPTER_MODELS  # pyright: ignore[reportIncompatibleVariableOverride]
    name: Annotated[str | None, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$", max_length=100)] = None
    """The run's name and folder; None: the time."""
    base: str = "EleutherAI/pythia-70m"
    """A GPT-NeoX model: its name on the hub, its folder, or a run of this project with a pythia model."""
    revision: str | None = None
    """Branch, tag or commit of a base on the hub."""
    num_docs: Annotated[int, Field(gt=0)] = 100
    """Number of long training documents, drawn with data.split_seed."""
    min_doc_tokens: Annotated[int | None, Field(gt=1)] = None
    """Minimum length of a long document in tokens; None: one sample (data.seq_length)."""
    max_doc_tokens: Annotated[int | None, Field(gt=1)] = None
    """Read only the first N tokens of each document; None: all."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the adapter's initial weights and of the order of documents."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one. CUDA_VISIBLE_DEVICES selects it."""
    runs_dir: Path = Path("runs")
    """Folder in which run folders are created."""
    out: Path = Path("parallel_adapter.pt")
    """The adapter's file: .safetensors, or .pt as torch.save writes it (plain tensors; loads with weights_only)."""
    wikitext: str | None = "wikitext-2"
    """Also measure on this text: wikitext-2 (the test split, from the hub) or a local file. None: no further text."""
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    data: AdapterDataConfig = dataclasses.field(default_factory=AdapterDataConfig)  # pyright: ignore[reportIncompatibleVariableOverride]
    train: AdapterTrainConfig = dataclasses.field(default_factory=AdapterTrainConfig)  # pyright: ignore[reportIncompatibleVariableOverride]
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        check_adapter_suffix(self.out, "out")
        if self.segment_length < 2:
            raise UserError(
                f"data: segments of {self.segment_length} token (seq_length {self.data.seq_length} in "
                f"{self.data.segments_per_sample} segments); at least 2 are needed"
            )

    @property
    def segment_length(self) -> int:
        """Tokens per segment."""
        return self.data.seq_length // self.data.segments_per_sample


# Studies


VARIANT_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"

STUDY_FILE = "study.yaml"
"""The study's configuration in its folder."""
VALIDATION = "validation"
"""The name of the validation split among the long texts."""


@section
class StudyConfig(RunSettings):
    """Train variants, each with several seeds, and compare them on long documents and recall.

    A variant lists what it changes in `base`, as in an experiment's YAML: `{model: {use_delta_rule: false}}`.
    """

    name: Annotated[str, Field(pattern=VARIANT_NAME)]  # pyright: ignore[reportIncompatibleVariableOverride]
    """The study's name and folder."""
    question: str
    """The question that the study should answer, in one sentence."""
    cpu_minutes: Annotated[float, Field(gt=0)] | None = None
    """Minutes that the whole study took on two cores when it was written; shown before the study starts."""
    base: dict[str, Any]
    """The experiment configuration that all variants share; fields that it leaves out keep their defaults."""
    variants: Annotated[dict[Annotated[str, Field(pattern=VARIANT_NAME)], dict[str, Any]], Field(min_length=1)]
    """What each variant changes, by name; each variant trains one model."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    """Seeds with which each variant is trained."""
    reference: str | None = None
    """The variant with which all others are compared; None: the first one."""
    baselines: tuple[str, ...] = ()
    """Further variants with which all others are compared. They read the same long documents in consecutive
    segments."""
    window_baselines: tuple[str, ...] = ()
    """Like baselines, but read in sliding windows as long as their segment: models without memory, with their full
    context."""
    long_documents: AllLongDocumentsConfig | None = dataclasses.field(default_factory=AllLongDocumentsConfig)
    """How to measure on long validation documents, without baselines of its own. None: not measured."""
    texts: tuple[str, ...] = ()
    """Further sources of long documents, each measured separately."""
    caches: CacheMeasureConfig | None = dataclasses.field(default_factory=CacheMeasureConfig)
    """The untrained caches to add to each model, measured on the same long documents; None: no caches."""
    recall: RecallConfig | None = None
    """How to measure recall; None: not measured."""
    runs_dir: Path = Path("runs")
    """Folder in which the study's folder is created; each training is a run in the latter."""
    cluster: ClusterConfig = dataclasses.field(default_factory=ClusterConfig)
    """Run the study's runs as cluster jobs."""

    def __post_init__(self) -> None:
        for name in (*self.all_baselines, self.reference_variant):
            if name not in self.variants:
                raise UserError(f"study: {name!r} is not a variant; the variants are {', '.join(self.variants)}")
        if self.long_documents and (self.long_documents.baselines or self.long_documents.window_baselines):
            raise UserError("study: long_documents can't have baselines of its own; use the study's baselines")
        if len(set(self.all_baselines)) < len(self.all_baselines):
            raise UserError(f"study: baselines and window_baselines: {list(self.all_baselines)} names a variant twice")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds: {list(self.seeds)}: a seed is given twice")
        for name in self.variants:
            config = self.configure(name, self.seeds[0])
            try:
                config.model.check_taken(config.models)
            except UserError as error:
                raise UserError(f"{self.name}: variant {name}: {error}") from None
            if name in self.window_baselines and self.long_documents:
                window, where = config.context_tokens(config.models[0]), f"{self.name}: long_documents.window_stride"
                self.long_documents.choose_window_stride(window, where, name)  # rejects one over the window
        names = [Path(source).stem for source in self.texts]
        for position, name in enumerate(names):
            if name == VALIDATION or name in names[:position]:
                raise UserError(f"texts: {self.texts[position]}: another text is also called {name!r}; rename the file")

    @classmethod
    def from_experiment(cls, config: ExperimentConfig, seeds: tuple[int, ...]) -> Self:
        """A study of an experiment's models with several seeds; each is measured as in the experiment."""
        config.model.check_taken(config.models)
        base = config.to_dict()
        for key in ("name", "seed", "runs_dir", "models"):
            del base[key]
        base["model"]["match_parameters"] = config.matches_parameters  # a run of one model would not match by default
        return cls(
            name=str(config.name),
            question=f"How do these models compare: {', '.join(config.models)}?",
            base=base,
            variants={name_model_folder(name): {"models": [name]} for name in config.models},
            seeds=seeds,
            long_documents=None,
            caches=None,
            runs_dir=config.runs_dir,
        )

    @property
    def folder(self) -> Path:
        """The study's folder."""
        return self.runs_dir / self.name

    @property
    def reference_variant(self) -> str:
        """The variant that all others are compared with."""
        return self.reference or next(iter(self.variants))

    @property
    def all_baselines(self) -> tuple[str, ...]:
        """The baselines that read segments, then those that read windows."""
        return (*self.baselines, *self.window_baselines)

    @property
    def long_texts(self) -> dict[str, str | None]:
        """The sources of long documents by name; None is the validation split."""
        return {VALIDATION: None} | {Path(source).stem: source for source in self.texts}

    def configure(self, variant: str, seed: int) -> ExperimentConfig:
        """The experiment of one variant and seed.

        Raises:
            UserError: an unknown key, a wrong value, or several models.
        """
        change = self.variants[variant]
        values = merge_settings(self.base, change)
        for key in ("name", "seed", "runs_dir"):
            if key in values:
                raise UserError(f"{self.name}: variant {variant}: {key}: is set by the study")

        models = values.get("models")
        names = [name for name in models if isinstance(name, str)] if isinstance(models, list | tuple) else []
        own, given = change.get("model", {}), values.get("model", {})
        if isinstance(own, dict) and isinstance(given, dict):  # anything else is refused below
            values["model"] = {
                name: value
                for name, value in given.items()
                if name in own or name not in NOT_FOR_ALL or takes(names, name, value)
            }  # an option in base applies to the variants that have it
            if isinstance(options := given.get("options"), dict) and "options" not in own:
                values["model"]["options"] = {key: value for key, value in options.items() if takes(names, key, value)}
        values |= {"name": f"{variant}-s{seed}", "seed": seed, "runs_dir": str(self.folder)}
        config = settings_from_dict(values, ExperimentConfig, f"{self.name}: variant {variant}")
        if len(config.models) != 1:
            raise UserError(f"{self.name}: variant {variant}: models: expected one, found {len(config.models)}")
        return config


def merge_settings(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`base` updated with the values of `change`; nested mappings are merged."""
    merged = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge_settings(base[key], value) if both else value
    return merged
