"""Options as frozen values: a command takes a few of them, and each field is an option of the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from typing import Any, get_type_hints


def options(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command whose options are the fields of the values that a function takes.

    The type of a field is annotated with its `typer.Option`: help and panel stand beside name and default. Values may
    hold values.
    """
    hints = get_type_hints(command, include_extras=True)
    taken = {name: hints[name] for name in signature(command).parameters}
    parameters: list[Parameter] = []
    for name, parameter in signature(command).parameters.items():
        if is_dataclass(taken[name]):
            parameters += _parameters(taken[name])
        else:
            parameters.append(parameter.replace(annotation=taken[name], kind=Parameter.KEYWORD_ONLY))

    @wraps(command)
    def called(**given: Any) -> None:
        command(**{name: _value(kind, given) if is_dataclass(kind) else given[name] for name, kind in taken.items()})

    required_first = sorted(parameters, key=lambda each: each.default is not Parameter.empty)
    called.__signature__ = Signature(required_first)  # type: ignore[attr-defined]  # what typer reads
    called.__annotations__ = {each.name: each.annotation for each in required_first}
    return called


def _fields(kind: Any) -> Iterator[tuple[Field[Any], Any]]:
    """Fields of a value with their types."""
    hints = get_type_hints(kind, include_extras=True)
    return ((field, hints[field.name]) for field in fields(kind))


def _parameters(kind: Any) -> Iterator[Parameter]:
    """Make a parameter of each field, in their order."""
    for field, hint in _fields(kind):
        if is_dataclass(hint):
            yield from _parameters(hint)
        else:
            default = Parameter.empty if field.default is MISSING else field.default
            yield Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _value(kind: Any, given: Mapping[str, Any]) -> Any:
    """Make a value of the options of a command."""
    return kind(
        **{
            field.name: _value(hint, given) if is_dataclass(hint) else given[field.name]
            for field, hint in _fields(kind)
        }
    )
