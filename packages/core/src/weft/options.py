"""Documented options: what the fields of a struct say about themselves, and values read into them, every fault at once.

A struct of options is a `msgspec.Struct` or a dataclass. A field's type carries its bounds (`msgspec.Meta`), its unit
(the suffix `_bytes` or `_seconds`, or `Meta(extra={"unit": …})`) and, for text, what it may be (`one_of`); the text
under it is its documentation. A transport's struct has the plug-in's name as its tag, in the field `name`. Class
variables `renamed` (old name to new) and `removed` (old name to what to do now) keep users' files explained (trap 60).
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import inspect
import json
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from msgspec.inspect import (
    BoolType,
    CustomType,
    DictType,
    FloatType,
    IntType,
    LiteralType,
    Metadata,
    NoneType,
    StrType,
    TupleType,
    UnionType,
    VarTupleType,
)

from weft.authentication import Secret
from weft.errors import ConfigError

REQUIRED = msgspec.NODEFAULT
"""Default of a field without one."""
_UNITS = {"_bytes": "bytes", "_seconds": "seconds"}
_NUMBERS = IntType | FloatType

Options = TypeVar("Options")
Elsewhere = Callable[[str], Sequence[str]]
"""Who has a field of this name, where it was not found."""


@dataclass(frozen=True, slots=True)
class Field:
    """What is known about one field."""

    name: str
    type: str
    """In words, such as `whole number` or `list of text`."""
    unit: str
    range: str
    """Such as `at least 1`, or the words that are allowed; empty where the type says it all."""
    default: Any
    """`REQUIRED` where there is none."""
    doc: str
    """As the source has it, in one line."""
    annotation: Any
    """The type itself."""


@dataclass(frozen=True, slots=True)
class Given:
    """A value that somebody gave."""

    value: Any
    origin: str
    """Who, in words: `Python`, `weft.toml`, `WEFT_NIXL_RAILS`."""
    text: bool = False
    """Whether it is an environment variable's text, to be read as what the field holds."""


def one_of(*words: str) -> msgspec.Meta:
    """For the type of a text: it is one of these words."""
    return msgspec.Meta(extra={"choices": words})


def fields(kind: type) -> tuple[Field, ...]:
    """Every field, in order. The documentation is empty where Python finds no source."""
    documentation = _documentation(kind)
    return tuple(dataclasses.replace(each, doc=documentation.get(each.name, "")) for each in _undocumented(kind))


def _undocumented(kind: type) -> list[Field]:
    """The fields without their documentation, for which a source file would have to be parsed."""
    annotations = typing.get_type_hints(kind, include_extras=True)
    return [
        Field(name, *_described(name, annotations[name]), default, "", annotations[name])
        for name, default in _defaults(kind)
    ]


def read(
    kind: type, given: Mapping[str, Given], what: str, elsewhere: Elsewhere = lambda name: ()
) -> tuple[dict[str, Any], list[str]]:
    """The values by field, of those that were given and fit, and what is wrong with the others, in words.

    `what` has the fields, such as `transport 'nixl'`.
    """
    known = {field.name: field for field in fields(kind)}
    values: dict[str, Any] = {}
    faults: list[str] = []
    for name, one in given.items():
        if name not in known:
            faults.append(f"{one.origin}: {what} has no option {name}; {_hint(kind, name, tuple(known), elsewhere)}")
            continue
        value = _parsed(one.value, known[name].annotation) if one.text else one.value
        try:
            values[name] = msgspec.convert(value, known[name].annotation, strict=not one.text, dec_hook=_secret)
        except (msgspec.ValidationError, UnicodeEncodeError) as error:
            shown = "…" if _is_secret(known[name]) else repr(one.value)
            faults.append(f"{one.origin}: {name} of {what} is {shown}: {error}")
            continue
        if fault := choice_fault(known[name], values[name]):
            del values[name]
            faults.append(f"{one.origin}: {name} of {what} {fault}")
    return values, faults


def parse(
    kind: type[Options], options: Mapping[str, Any], what: str, elsewhere: Elsewhere = lambda name: ()
) -> Options:
    """A struct with these options. Raises `ConfigError` with everything that is wrong with them."""
    values, faults = read(kind, {name: Given(value, "options") for name, value in options.items()}, what, elsewhere)
    missing = [field.name for field in fields(kind) if field.default is REQUIRED and field.name not in options]
    faults += [f"{what} needs the option {name}" for name in missing]
    if faults:
        raise ConfigError("; ".join(faults))
    return kind(**values)


def bound_faults(options: Any) -> Iterator[str]:
    """What the types of a struct's fields forbid about the values it was made with."""
    for field in _undocumented(type(options)):
        value = getattr(options, field.name)
        try:
            msgspec.convert(value, field.annotation)
        except msgspec.ValidationError:
            allowed = field.range or f"a {field.type}"
            yield f"{field.name} is {value!r}, it must be {allowed}"
        else:
            if fault := choice_fault(field, value):
                yield f"{field.name} {fault}"


def choice_fault(field: Field, value: Any) -> str:
    """Why a text is none of the words of `one_of`; empty if it is, or if any text will do."""
    choices = _choices(msgspec.inspect.type_info(field.annotation))
    return f"{value!r} is none of {', '.join(choices)}" if choices and value not in choices else ""


def nearest(name: str, names: Sequence[str]) -> str:
    """The name that was probably meant; empty when none is like it."""
    return next(iter(difflib.get_close_matches(name, names, n=1)), "")


def tag_of(kind: Any) -> str | None:
    """The tag of a struct of options, or of its class: for a transport the name of its plug-in."""
    tag = getattr(getattr(kind, "__struct_config__", None), "tag", None)
    return tag if isinstance(tag, str) else None


def _hint(kind: type, name: str, known: Sequence[str], elsewhere: Elsewhere) -> str:
    renamed, removed = getattr(kind, "renamed", {}), getattr(kind, "removed", {})
    if name in renamed:
        return f"it is called {renamed[name]!r} now"
    if name in removed:
        return f"it was removed: {removed[name]}"
    similar = nearest(name, known)
    others = ", ".join(elsewhere(name))
    meant = f"did you mean {similar!r}?" if similar else ""
    has = f"{others} has it" if others else ""
    return "; ".join(filter(None, (meant, has))) or f"it has {', '.join(known) or 'none'}"


def _parsed(text: str, annotation: Any) -> Any:
    """An environment variable's text as what a list or a table is made of: JSON, or words between commas."""
    kind = _plain(msgspec.inspect.type_info(annotation))
    if isinstance(kind, VarTupleType | TupleType | DictType) and text.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text
    if isinstance(kind, VarTupleType):
        return [word.strip() for word in text.split(",") if word.strip()]
    return text


def _secret(kind: type, value: Any) -> Secret:
    """A `Secret`, the one type of field that msgspec does not know. msgspec tells what a `ValueError` says."""
    if kind is not Secret:
        raise ValueError(f"expected {kind.__name__}")
    try:
        return value if isinstance(value, Secret) else Secret(value)
    except ConfigError as error:
        raise ValueError(str(error)) from None


def _is_secret(field: Field) -> bool:
    kind = _plain(msgspec.inspect.type_info(field.annotation))
    return isinstance(kind, CustomType) and kind.cls is Secret


def _defaults(kind: type) -> Iterator[tuple[str, Any]]:
    if dataclasses.is_dataclass(kind):
        for one in dataclasses.fields(kind):
            yield one.name, REQUIRED if one.default is dataclasses.MISSING else one.default
    else:
        for field in msgspec.structs.fields(kind):
            made = field.default_factory is not msgspec.NODEFAULT
            yield field.name, field.default_factory() if made else field.default


@functools.cache
def _documentation(kind: type) -> dict[str, str]:
    """The text under each field, from the source of its class."""
    try:
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    except (OSError, TypeError):
        return {}
    texts: dict[str, str] = {}
    assert isinstance(body, ast.ClassDef)
    for field, after in zip(body.body, body.body[1:], strict=False):
        match field, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                texts[name] = " ".join(text.split())
    return texts


def _described(name: str, annotation: Any) -> tuple[str, str, str]:
    """Type, unit and range, in words."""
    info = msgspec.inspect.type_info(annotation)
    extra = _extra(info)
    unit = extra.get("unit", next((unit for suffix, unit in _UNITS.items() if name.endswith(suffix)), ""))
    return _type_words(info), unit, _range_words(_plain(info)) or ", ".join(extra.get("choices", ()))


def _plain(info: msgspec.inspect.Type) -> msgspec.inspect.Type:
    """The type without what is said about it, and without None where that is the other choice."""
    if isinstance(info, Metadata):
        return _plain(info.type)
    if isinstance(info, UnionType):
        others = [one for one in info.types if not isinstance(one, NoneType)]
        return _plain(others[0]) if len(others) == 1 else info
    return info


def _extra(info: msgspec.inspect.Type) -> dict[str, Any]:
    if isinstance(info, Metadata):
        return {**_extra(info.type), **(info.extra or {})}
    if isinstance(info, UnionType):
        return {key: value for one in info.types for key, value in _extra(one).items()}
    return {}


def _choices(info: msgspec.inspect.Type) -> tuple[str, ...]:
    return tuple(_extra(info).get("choices", ()))


def _type_words(info: msgspec.inspect.Type) -> str:
    match _plain(info):
        case BoolType():
            return "true or false"
        case IntType():
            return "whole number"
        case FloatType():
            return "number"
        case StrType() | LiteralType():
            return "text"
        case CustomType(cls=cls) if cls is Secret:
            return "text"
        case VarTupleType(item_type=item):
            return f"list of {_type_words(item)}"
        case TupleType(item_types=items):
            return f"{len(items)} × {_type_words(items[0])}"
        case DictType(value_type=value):
            return f"table of {_type_words(value)}"
        case UnionType(types=types):
            return " or ".join(_type_words(one) for one in types)
    return "object"


def _range_words(kind: msgspec.inspect.Type) -> str:
    if isinstance(kind, LiteralType):
        return ", ".join(str(value) for value in kind.values)
    if not isinstance(kind, _NUMBERS):
        return ""
    bounds = (("at least", kind.ge), ("more than", kind.gt), ("at most", kind.le), ("less than", kind.lt))
    return ", ".join(f"{words} {bound:,}" for words, bound in bounds if bound is not None)
