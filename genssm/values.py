"""Plain values: YAML by the rules of 1.2, and conversion to the type of a field or of a constructor's argument.

YAML 1.2 leaves no room for the old traps: ``1e-4`` is a number, ``no`` is a text and not false, ``010`` is not eight.
Each value is then converted to the type it is wanted in; what could be meant in two ways is refused.
"""

import difflib
import inspect
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union

import yaml

_INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9]*)$")
_REAL = re.compile(
    r"(?:[-+]?(?:(?:0|[1-9][0-9]*)\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?(?:0|[1-9][0-9]*)[eE][-+]?[0-9]+|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
)


class Loader(yaml.SafeLoader):
    """YAML 1.2 core rules for plain scalars; a key given twice is an error."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        names = [self.construct_object(name, deep=True) for name, _ in node.value]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise yaml.MarkedYAMLError(problem=f"key {twice[0]!r} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """Writes what :class:`Loader` reads back unchanged, quoting also what a YAML 1.1 reader would take for a value."""


_NULL = re.compile(r"(?:~|null|Null|NULL|)$")
_BOOLEAN = re.compile(r"(?:true|True|TRUE|false|False|FALSE)$")
for _class in (Loader, Dumper):
    _class.add_implicit_resolver("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""])
    _class.add_implicit_resolver("tag:yaml.org,2002:bool", _BOOLEAN, list("tTfF"))
    _class.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _REAL, list("-+.0123456789"))


def read_yaml(text: str, source: str) -> Any:
    """The value of a YAML text; a ValueError that names ``source`` if it is not YAML."""
    try:
        return yaml.load(text, Loader=Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} is not valid YAML: {error}") from None


def write_yaml(value: Any) -> str:
    """One line of YAML that :func:`read_yaml` reads back unchanged."""
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, sort_keys=False, width=2**20)
    return text.removesuffix("...\n").strip()


def convert(value: Any, hint: Any, where: str, text: str | None = None) -> Any:
    """``value`` as the type ``hint``, or a ValueError that starts with ``where``.

    Args:
        value: what the file or the command line gave.
        hint: a type: bool, int, float, str, list[...], dict, Literal[...] or a union of these with None.
        where: file and key, for the message.
        text: the words typed on the command line; a text field takes them as they are.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or hint is inspect.Parameter.empty:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(value, arguments, where, text)
    if origin is Literal:
        for choice in arguments:
            if (type(choice) is type(value) and choice == value) or text == choice:
                return choice
        raise ValueError(f"{where}: expected one of {', '.join(map(str, arguments))}; got {value!r}")
    if origin in (list, tuple, Sequence):
        items = value if isinstance(value, list | tuple) else [value]
        container = tuple if origin is tuple else list
        return container(convert(item, arguments[0] if arguments else Any, where) for item in items)
    converters = {bool: _to_bool, int: _to_int, float: _to_float, str: _to_str}
    if hint in converters:
        return converters[hint](value, where, text)
    if hint is dict or origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected keys and values, got {value!r}")
        return dict(value)
    return value


def _convert_union(value: Any, choices: tuple, where: str, text: str | None) -> Any:
    if value is None and type(None) in choices:
        return None
    messages = []
    for choice in choices:
        several = typing.get_origin(choice) in (list, tuple, Sequence)
        scalars = any(c in (int, float, str, bool) for c in choices)
        if choice is type(None) or (scalars and several != isinstance(value, list | tuple)):
            continue
        try:
            return convert(value, choice, where, text)
        except ValueError as error:
            messages.append(str(error))
    raise ValueError(messages[0] if messages else f"{where}: {value!r} is none of {', '.join(map(str, choices))}")


def _to_bool(value: Any, where: str, text: str | None) -> bool:
    if isinstance(value, bool):
        return value
    raise ValueError(f"{where}: expected true or false, got {value!r}")


def _to_int(value: Any, where: str, text: str | None) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and _INTEGER.match(value):
        return int(value)
    hint = " (octal or decimal? write it without the leading zero)" if re.match(r"[-+]?0[0-9]", str(value)) else ""
    raise ValueError(f"{where}: expected a whole number, got {value!r}{hint}")


def _to_float(value: Any, where: str, text: str | None) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and (_INTEGER.match(value) or _REAL.match(value)):
        return float(value)
    raise ValueError(f"{where}: expected a number, got {value!r}")


def _to_str(value: Any, where: str, text: str | None) -> str:
    if isinstance(value, str):
        return value
    if text is not None and value is not None:
        return text
    raise ValueError(f"{where}: expected a text, got {value!r}; put it in quotes if a text is meant")


def check_arguments(function: Callable, arguments: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``arguments`` converted by the annotations of ``function``; unknown and missing ones are refused.

    Args:
        function: the callable, e.g. a model class.
        arguments: keyword arguments from a configuration.
        where: file and key, for messages.

    Raises:
        ValueError: an argument that ``function`` does not have (the nearest is named), lacks, or of the wrong type.
    """
    target = function.__init__ if inspect.isclass(function) else function
    parameters = {n: p for n, p in inspect.signature(target).parameters.items() if n != "self" and p.kind in (1, 3)}
    hints = typing.get_type_hints(target)
    label = getattr(function, "__name__", str(function))
    for name in arguments:
        if name not in parameters:
            near = difflib.get_close_matches(name, parameters, n=1)
            raise ValueError(
                f"{where}: {label} has no argument {name!r}"
                + (f"; did you mean {near[0]}?" if near else f"; there are {', '.join(parameters)}")
            )
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in arguments]
    if missing:
        raise ValueError(f"{where}: {label} needs {', '.join(missing)}")
    return {n: convert(v, hints.get(n, Any), f"{where}.{n}") for n, v in arguments.items()}
