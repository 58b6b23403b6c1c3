"""Structured answers in strict mode: JSON and tool calls, which a corrector cannot rewrite as prose.

By `--strict-structured`:

| | requests for JSON | requests that offer tools |
|---|---|---|
| `refuse` | refused (400) | refused (400) |
| `pass` | the answer passes if it is JSON that fits the schema, else 422 | calls pass if they fit the offer, else 422 |
| `correct-strings` | as `pass`, and each string in it that is prose is corrected | as `pass` |

A call fits the offer if a function of its name is offered and its arguments fit the parameters. Text beside calls is
left out; an answer without calls is corrected as any other.

Prose is text of at least three words that the schema does not bind by `enum`, `const`, `format` or `pattern`. Grammars
other than JSON (`guided_regex` and the like) and tools other than functions are always refused.

Schemas are checked by `jsonschema` in bounded time: no regular expression of a request is run, nothing is fetched, and
the number of steps is limited.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from everalign.serving.eligibility import GRAMMARS
from everalign.serving.errors import refused, uncorrected
from everalign.serving.sse import strict_json

MOST_TEXTS = 64
"""Most strings of one answer that are corrected."""

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
        schema: the JSON schema that it has to fit; None for any object.
        tools: parameters of the functions that may be called, by name.
        corrects: whether strings in JSON are corrected.
    """

    is_json: bool = False
    schema: Mapping[str, Any] | None = None
    tools: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    corrects: bool = False

    def json_of(self, text: str) -> JSONValue:
        """Return the JSON of an answer; raises GatewayError if it is not what was asked for."""
        try:
            value = strict_json(text)
        except ValueError:
            raise uncorrected("json", 422, again=False) from None
        if not (isinstance(value, dict) if self.schema is None else fits(value, self.schema)):
            raise uncorrected("json", 422, again=False)
        return value

    def calls_of(self, calls: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return an answer's tool calls, written anew; raises GatewayError if one does not fit the offer."""
        found: list[dict[str, Any]] = []
        for index in sorted(calls):
            call = calls[index]
            parameters = self.tools.get(call["name"]) if call["type"] == "function" else None
            try:
                value = strict_json(call["arguments"] or "{}")
            except ValueError:
                value = None  # which is no object
            if parameters is None or not isinstance(value, dict) or not fits(value, parameters):
                raise uncorrected("tool_calls", 422, again=False)
            name = call["id"] if _ID.fullmatch(call["id"]) else f"call_{index}"
            function = {"name": call["name"], "arguments": call["arguments"]}
            found.append({"id": name, "type": "function", "function": function})
        if not found:
            raise uncorrected("tool_calls", 422, again=False)
        return found


def structure_of(body: Mapping[str, Any], form: Any, corrects: bool) -> Structure | None:
    """Return what an answer to a request of this response format may be; None if that cannot be checked.

    Raises:
        GatewayError: a schema of the request is too large.
    """
    if any(body.get(name) for name in (*GRAMMARS, "functions")) or body.get("web_search_options") is not None:
        return None
    functions: dict[str, Mapping[str, Any]] = {}
    tools = body.get("tools")
    for tool in tools if isinstance(tools, list) else ():
        # Chat has the function in a field of its own, Responses beside the type.
        function = tool.get("function", tool) if isinstance(tool, dict) and tool.get("type") == "function" else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return None
        functions[function["name"]] = _sized_schema(function.get("parameters") or {}, "tools")
    kind = form.get("type") if isinstance(form, Mapping) else "text"
    if kind not in ("text", "json_object", "json_schema"):
        return None
    about = form.get("json_schema", form) if isinstance(form, Mapping) else {}
    schema = about.get("schema") if kind == "json_schema" and isinstance(about, Mapping) else None
    known = None if schema is None else _sized_schema(schema, "response_format")
    return Structure(kind != "text", known, functions, corrects)


def _sized_schema(given: Any, param: str) -> Mapping[str, Any]:
    if not isinstance(given, dict) or len(json.dumps(given)) > _LARGEST_SCHEMA:
        raise refused(f"{param}: a schema must be an object of at most {_LARGEST_SCHEMA} characters", param, "schema")
    return given


class _TooManySteps(Exception):  # noqa: N818 (the name says what is wrong)
    """A schema takes too long to check, perhaps because it refers to itself."""


def fits(value: JSONValue, schema: Mapping[str, Any]) -> bool:
    """Whether JSON fits a schema; False if that cannot be decided in bounded time.

    Raises:
        GatewayError: the schema is invalid.
    """
    from jsonschema.validators import Draft202012Validator, extend
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    steps = 0

    def counted(name: str, check: Callable[..., Any]) -> Callable[..., Iterator[Any]]:
        def checked(validator: Any, wanted: Any, instance: Any, within: Any) -> Iterator[Any]:
            nonlocal steps
            steps += 1
            if steps > _MOST_STEPS:
                raise _TooManySteps
            if name not in _UNCHECKED:
                yield from check(validator, wanted, instance, within) or ()

        return checked

    checks = {name: counted(name, check) for name, check in Draft202012Validator.VALIDATORS.items()}
    bounded = extend(Draft202012Validator, checks)
    try:
        return bool(bounded(_checked_schema(json.dumps(schema)), registry=Registry()).is_valid(value))
    except (_TooManySteps, RecursionError, Unresolvable):
        return False


@lru_cache(maxsize=256)
def _checked_schema(text: str) -> Mapping[str, Any]:
    """Return a schema, or raise GatewayError if it is invalid; cached because agents send the same ones repeatedly."""
    from jsonschema import SchemaError
    from jsonschema.validators import Draft202012Validator

    def without_dialects(schema: Any) -> Any:
        # A schema that names its own dialect would be checked by that one's rules, without the bounds.
        if isinstance(schema, dict):
            return {name: without_dialects(inner) for name, inner in schema.items() if name != "$schema"}
        return [without_dialects(inner) for inner in schema] if isinstance(schema, list) else schema

    schema = json.loads(text)
    try:
        Draft202012Validator.check_schema(schema)
        plain: Mapping[str, Any] = without_dialects(schema)
    except (SchemaError, RecursionError):
        raise refused("a schema of the request is not a valid JSON Schema", code="invalid_schema") from None
    return plain


def prose_of(value: JSONValue, schema: Mapping[str, Any] | None) -> list[tuple[Path, str]]:
    """Return the strings in JSON that are prose, with their paths; raises GatewayError if there are too many."""
    found: list[tuple[Path, str]] = []

    def collect(value: JSONValue, schema: Any, path: Path) -> None:
        schemas = _subschemas(schema, root)
        if isinstance(value, str):
            if _PROSE.match(value) and not any(name in one for one in schemas for name in _BINDING):
                found.append((path, value))
        elif isinstance(value, dict):
            for name, inner in value.items():
                own = [one["properties"][name] for one in schemas if name in (one.get("properties") or {})]
                collect(inner, {"allOf": own}, (*path, name))
        elif isinstance(value, list):
            items = [one["items"] for one in schemas if isinstance(one.get("items"), dict)]
            for i, inner in enumerate(value):
                collect(inner, {"allOf": items}, (*path, i))

    root = schema or {}
    collect(value, root, ())
    if len(found) > MOST_TEXTS:
        raise uncorrected("too_long", 422, again=False)
    return found


def _subschemas(schema: Any, root: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return a schema and those that it combines or refers to within `root`; at most `MOST_TEXTS` of them."""
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
    """Return JSON with the strings at some paths replaced."""
    if isinstance(value, dict):
        return {name: with_prose(inner, texts, (*path, name)) for name, inner in value.items()}
    if isinstance(value, list):
        return [with_prose(inner, texts, (*path, i)) for i, inner in enumerate(value)]
    return texts.get(path, value)
