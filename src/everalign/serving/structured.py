"""Structured answers in strict mode: JSON and calls of tools, which a corrector cannot rewrite as prose.

By `--strict-structured`:

| | requests for JSON | requests that offer tools |
|---|---|---|
| `refuse` | refused (400) | refused (400) |
| `pass` | the answer passes if it is JSON as the schema says, else 422 | calls pass if offered like that, else 422 |
| `correct-strings` | as `pass`, and texts in it that are prose are corrected, each by itself | as `pass` |

A call is offered like that if there is a function of that name and its arguments are as the parameters say. Text beside
calls is left out; an answer without calls is corrected as any other.

Prose are texts of at least three words that the schema does not bind by `enum`, `const`, `format` or `pattern`. Other
grammars than JSON (`guided_regex` and the like), and tools other than functions, are refused whatever is said.

Schemas are checked by `jsonschema`, without what takes ever longer: no regular expression of a request is run, nothing
is fetched, and one check has so many steps and no more.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from everalign.serving.errors import refused, uncorrected

MOST_TEXTS = 64
"""Texts of one answer that are corrected."""

_MOST_STEPS = 100_000  # about a second
_LARGEST_SCHEMA = 32 << 10  # characters
_UNCHECKED = ("pattern", "patternProperties", "uniqueItems", "format")
_BINDING = ("enum", "const", "format", "pattern")
_PROSE = re.compile(r"\s*\S+\s+\S+\s+\S")
_ID = re.compile(r"[A-Za-z0-9_-]{1,200}")

JSONValue = Any
Path = tuple[str | int, ...]


@dataclass(frozen=True)
class Structure:
    """What a strict answer may be besides prose.

    Args:
        is_json: whether it has to be JSON.
        schema: what it must be like; None for any JSON object.
        tools: the parameters of the functions that may be called, by name.
        corrects: whether texts in JSON are corrected.
    """

    is_json: bool = False
    schema: Mapping[str, Any] | None = None
    tools: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    corrects: bool = False

    def json_of(self, text: str) -> JSONValue:
        """Return the JSON that an answer is; raises GatewayError where it is another one than was asked for."""
        try:
            value = json.loads(text, parse_constant=_no_number)
        except (ValueError, RecursionError):
            raise uncorrected("json", 422, again=False) from None
        if self.schema is None:
            if not isinstance(value, dict):
                raise uncorrected("json", 422, again=False)
        elif not fits(value, self.schema):
            raise uncorrected("json", 422, again=False)
        return value

    def calls_of(self, calls: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return an answer's calls, written anew; raises GatewayError where one of them was not offered like that."""
        found: list[dict[str, Any]] = []
        for index in sorted(calls):
            call = calls[index]
            parameters = self.tools.get(call["name"]) if call["type"] == "function" else None
            arguments = call["arguments"]
            try:
                value = json.loads(arguments or "{}", parse_constant=_no_number)
            except (ValueError, RecursionError):
                value = None
            if parameters is None or not isinstance(value, dict) or not fits(value, parameters):
                raise uncorrected("tool_calls", 422, again=False)
            name = call["id"] if _ID.fullmatch(call["id"]) else f"call_{index}"
            told = {"name": call["name"], "arguments": arguments}
            found.append({"id": name, "type": "function", "function": told})
        if not found:
            raise uncorrected("tool_calls", 422, again=False)
        return found


def structure_of(body: Mapping[str, Any], form: Any, grammars: bool, tools: Any, corrects: bool) -> Structure | None:
    """Return what an answer may be, where that can be checked; None where it cannot.

    Args:
        body: of the request.
        form: its `response_format`, or of Responses `text.format`.
        grammars: whether it asks for another grammar.
        tools: that it offers.
        corrects: whether texts in JSON are corrected.

    Raises:
        GatewayError: a schema of the request is too large.
    """
    if grammars or body.get("functions") or body.get("web_search_options") is not None:
        return None
    functions: dict[str, Mapping[str, Any]] = {}
    for tool in tools if isinstance(tools, list) else ():
        # OpenAI's chat has the function in a field of its own, Responses beside the type.
        function = tool.get("function", tool) if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return None
        functions[function["name"]] = _schema(function.get("parameters") or {}, "tools")
    kind = form.get("type") if isinstance(form, Mapping) else "text"
    if kind not in ("text", "json_object", "json_schema"):
        return None
    about = form.get("json_schema", form) if isinstance(form, Mapping) else {}
    schema = about.get("schema") if kind == "json_schema" and isinstance(about, Mapping) else None
    known = None if schema is None else _schema(schema, "response_format")
    return Structure(kind != "text", known, functions, corrects)


def _schema(given: Any, param: str) -> Mapping[str, Any]:
    if not isinstance(given, dict) or len(json.dumps(given)) > _LARGEST_SCHEMA:
        raise refused(f"{param}: a schema must be an object of at most {_LARGEST_SCHEMA} characters", param, "schema")
    return given


@lru_cache(maxsize=256)
def _checked_schema(text: str) -> Mapping[str, Any]:
    """Return a schema; raises GatewayError for what is none. Agents send the same ones again and again."""
    from jsonschema import SchemaError
    from jsonschema.validators import Draft202012Validator

    schema = json.loads(text)
    try:
        Draft202012Validator.check_schema(schema)
        # One that names a dialect of its own would be checked by that one's rules, without the bounds.
        plain: Mapping[str, Any] = _without_dialects(schema)
    except (SchemaError, RecursionError):
        raise refused("a schema of the request is no JSON Schema", code="invalid_schema") from None
    return plain


def _without_dialects(schema: Any) -> Any:
    if isinstance(schema, dict):
        return {name: _without_dialects(inner) for name, inner in schema.items() if name != "$schema"}
    return [_without_dialects(inner) for inner in schema] if isinstance(schema, list) else schema


def fits(value: JSONValue, schema: Mapping[str, Any]) -> bool:
    """Whether JSON is as a schema says, as far as that can be told in bounded time; what cannot be told is False.

    Raises:
        GatewayError: the schema is none.
    """
    from jsonschema.validators import Draft202012Validator, extend
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    left = [_MOST_STEPS]

    def counted(check: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
        def checked(validator: Any, wanted: Any, instance: Any, within: Any) -> Iterator[Any]:
            left[0] -= 1
            if left[0] < 0:
                raise _TooLong
            yield from check(validator, wanted, instance, within) or ()

        return checked

    known = Draft202012Validator.VALIDATORS.items()
    checks = {name: counted(_unchecked if name in _UNCHECKED else check) for name, check in known}
    bounded = extend(Draft202012Validator, checks)
    try:
        return bool(bounded(_checked_schema(json.dumps(schema)), registry=Registry()).is_valid(value))
    except (_TooLong, RecursionError, Unresolvable):
        return False


class _TooLong(Exception):  # noqa: N818 (what is wrong is in the name)
    """A schema leads round and round, or nearly so."""


def _unchecked(*_: Any) -> Iterator[Any]:
    return iter(())


def prose_of(value: JSONValue, schema: Mapping[str, Any] | None) -> list[tuple[Path, str]]:
    """Return the texts in JSON that are prose, with where they stand; raises GatewayError for too many."""
    found = list(_prose(value, schema or {}, schema or {}, ()))
    if len(found) > MOST_TEXTS:
        raise uncorrected("too_long", 422, again=False)
    return found


def _prose(value: JSONValue, schema: Any, root: Mapping[str, Any], path: Path) -> Iterator[tuple[Path, str]]:
    schemas = _alternatives(schema, root)
    if isinstance(value, str):
        if _PROSE.match(value) and not any(name in one for one in schemas for name in _BINDING):
            yield path, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            own = [one["properties"][name] for one in schemas if name in (one.get("properties") or {})]
            yield from _prose(inner, {"allOf": own}, root, (*path, name))
    elif isinstance(value, list):
        items = [one["items"] for one in schemas if isinstance(one.get("items"), dict)]
        for i, inner in enumerate(value):
            yield from _prose(inner, {"allOf": items}, root, (*path, i))


def _alternatives(schema: Any, root: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return a schema and those that it consists of, as far as they stand in the same one; so many and no more."""
    waiting, found = [schema], list[Mapping[str, Any]]()
    while waiting and len(found) < MOST_TEXTS:
        one = waiting.pop()
        if not isinstance(one, dict) or any(one is other for other in found):
            continue
        found.append(one)
        for name in ("allOf", "anyOf", "oneOf"):
            waiting += one.get(name) or ()
        parts = str(one.get("$ref", "")).split("/")
        if parts[:1] == ["#"]:
            target: Any = root
            for part in parts[1:]:
                target = target.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
            waiting.append(target)
    return found


def with_prose(value: JSONValue, texts: Mapping[Path, str], path: Path = ()) -> JSONValue:
    """Return JSON with some of its texts replaced."""
    if isinstance(value, dict):
        return {name: with_prose(inner, texts, (*path, name)) for name, inner in value.items()}
    if isinstance(value, list):
        return [with_prose(inner, texts, (*path, i)) for i, inner in enumerate(value)]
    return texts.get(path, value)


def _no_number(text: str) -> float:
    raise ValueError(text)
