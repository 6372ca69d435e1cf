"""The base classes of commands, dataclasses whose fields tyro reads as flags, and `new-llm completion`."""

import contextlib
import dataclasses
import inspect
import io
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NoReturn, Self, Union

import tyro
from tyro import _errors as failures  # tyro's only hook to replace its own error output
from tyro.conf import Positional
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo, StructFieldSpec
from tyro.constructors._struct_spec_dataclass import dataclass_rule  # what tyro does without our rule

from new_llm.cli import main
from new_llm.config.errors import UserError

REGISTRY = ConstructorRegistry()
"""Our parsing rules, in addition to tyro's."""


@REGISTRY.primitive_rule
def read_words(found: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Accept `none`, `true` and `false`, as in YAML, as well as Python's None, True and False."""
    values = {type(None): {"none": None}, bool: {"true": True, "false": False}}.get(found.type)
    if values is None:
        return None
    words = {spelling: value for word, value in values.items() for spelling in (word, word.title())}
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="|".join(values),
        instance_from_str=lambda given: words[given[0]],
        is_instance=lambda value: value in values.values() and isinstance(value, found.type),
        str_from_instance=lambda value: [str(value).lower()],
        choices=tuple(words),
    )


@REGISTRY.struct_rule
def read_dataclass(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
    """Read a dataclass as tyro does, but join the lines of help texts, and reject list flags that change nothing."""
    found = dataclass_rule(info)
    return found and dataclasses.replace(found, fields=tuple(map(_adapt_field, found.fields)))


def _adapt_field(field: StructFieldSpec) -> StructFieldSpec:
    find_text: Any = field.helptext  # tyro reads docstrings only when it shows them
    field = dataclasses.replace(field, helptext=lambda: " ".join((find_text() or "").split()) or None)
    values: Any = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(field.type, set()))
    if field.default not in ((), {}) or getattr(values, "nargs", None) != "*":
        return field

    def read_values(given: list[str], read: Any = values.instance_from_str) -> Any:
        if not given:
            raise ValueError("a value is missing")
        return read(given)

    values = dataclasses.replace(values, instance_from_str=read_values)
    return dataclasses.replace(field, type=Annotated[field.type, values, tyro.conf.arg(help_behavior_hint="")])


@dataclasses.dataclass(kw_only=True)
class Command(ABC):
    """A command: its fields are its flags, its docstring is its help.

    Command modules do not import torch at module level, so that help and flag errors appear at once.
    """

    without_hub: ClassVar[str] = ""
    """What to suggest if the hub is out of reach, in terms of this command's flags."""

    @classmethod
    def read(cls, arguments: list[str], prog: str) -> Self:
        """Parse a command line; `prog` is the command's name in help and errors."""
        return read_flags(cls, arguments, prog)

    @abstractmethod
    def execute(self) -> int | None:
        """Run the command; returns the exit code, None meaning 0."""


class CommandGroup:
    """A command that consists of subcommands; its docstring is its help."""

    commands: ClassVar[Mapping[str, type[Command]]]
    """Subcommands by name."""
    default: ClassVar[str | None] = None
    """The subcommand to run if none is named; None: one must be named."""

    @classmethod
    def read(cls, arguments: list[str], prog: str) -> Command:
        """Parse a command line into one of the subcommands.

        Raises:
            UserError: unknown subcommand.
        """
        if arguments and not arguments[0].startswith("-") and arguments[0] not in cls.commands:
            allowed = ", ".join(cls.commands)
            raise UserError(f"unknown command {' '.join([*prog.split()[1:], arguments[0]])!r}; allowed are {allowed}")
        return read_flags(choose_command(cls.commands, cls.default), arguments, prog, description=inspect.getdoc(cls))


def read_flags(
    kind: Any, arguments: list[str], prog: str, *, description: str | None = None, default: Any = tyro.MISSING_NONPROP
) -> Any:
    """Call `tyro.cli` with enums given by value and, unless there is a `description`, the docstring as help.

    Raises:
        UserError: an unknown flag or invalid value, in one line.
        SystemExit: help was requested and has been printed.
    """
    with failures.on_parse_error(_refuse):
        return tyro.cli(
            kind,
            args=arguments,
            prog=prog,
            description=inspect.getdoc(kind) if description is None else description,
            default=default,
            config=(tyro.conf.EnumChoicesFromValues,),
            registry=REGISTRY,
        )


def choose_command(kinds: Mapping[str, Any], default: str | None = None) -> Any:
    """A union type that tyro parses as a choice of subcommands; `default` as in `CommandGroup`."""
    chosen = (
        Annotated[kind, tyro.conf.subcommand(name, description=inspect.getdoc(kind), is_default=name == default)]
        for name, kind in kinds.items()
    )
    return Union[tuple(chosen)]  # noqa: UP007


def _refuse(event: failures.ParseErrorEvent) -> NoReturn:
    """Raise as one line what tyro would show in a box."""
    match event:
        case failures.UnrecognizedArgs():
            message = f"unknown option {' '.join(event.tokens)}"
        case failures.InvalidChoice():
            allowed = ", ".join(event.choices)
            message = f"{event.argument.display_name()}: {event.value!r} is an invalid choice; allowed are {allowed}"
        case failures.MissingArgs():
            missing = ", ".join(found.arg.display_name() for found in event.missing_arguments)
            unknown = f" (unknown: {' '.join(event.unrecognized_tokens)})" if event.unrecognized_tokens else ""
            message = f"missing {missing}{unknown}"
        case failures.MissingSubcommand():
            message = f"choose one of {', '.join(event.subcommand_spec.parser_from_name)}"
        case failures.BadValue():
            message = f"{event.argument.display_name()}: a value is missing"
        case failures.InstantiationFailure():
            flag = f"{event.argument.display_name()}: " if event.argument else ""
            message = flag + str(event.message)
        case _:
            message = "these options can't be combined"
    raise UserError(f"{message} (see {event.prog} --help)")


@dataclasses.dataclass(kw_only=True)
class Completion(Command):
    """Print a script with which a shell completes commands and flags.

    Examples:
      new-llm completion bash > ~/.local/share/bash-completion/completions/new-llm
      new-llm completion zsh > ~/.zfunc/_new-llm
      new-llm completion fish > ~/.config/fish/completions/new-llm.fish
    """

    shell: Positional[Literal["bash", "zsh", "fish"]]
    """The shell to write the script for."""

    def execute(self) -> None:
        """Print the script."""
        print(write_completion(self.shell))


def write_completion(shell: str) -> str:
    """The completion script for bash, zsh or fish."""
    kinds: dict[str, Any] = {name: main.load_command(name) for name in main.COMMANDS}
    for name, kind in kinds.items():
        if issubclass(kind, CommandGroup):  # nested as a field: tyro would flatten a union inside a union
            choice = Annotated[choose_command(kind.commands, kind.default), tyro.conf.arg(name="")]
            kinds[name] = dataclasses.make_dataclass(name.title(), [("command", choice)])
    script = io.StringIO()
    with contextlib.redirect_stdout(script), contextlib.suppress(SystemExit):
        read_flags(choose_command(kinds), ["--tyro-print-completion", shell], "new-llm", description="")
    return script.getvalue()
