"""Base class of option models: one declaration gives validation, documentation, recipe keys and command-line flags.

With it stand the choices and options that several rooms share, such as `Precision` and `SamplingOptions`.

class AdapterOptions(Options, title="Adapter"):
    \"\"\"Shape of the LoRA adapter.\"\"\"

    rank: int = Field(default=8, ge=1, description="Rank of the adapter.")
"""

import difflib
import inspect
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from everalign.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self

# Exact types, finite numbers, no unknown names.
STRICT = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())


class Options(BaseModel):
    """Immutable values, checked when they are made. A bad one is an `InputError` that names the option.

    The first line of a field's `description` is its help on the command line; the docstring of the class gets all of
    it. `title` is what a value is called there (`DIR`), and that of the class names its flags' panel.
    """

    model_config = STRICT

    if not TYPE_CHECKING:  # type checkers know the arguments from the fields

        def __init__(self, **values: Any) -> None:
            try:
                super().__init__(**values)
            except ValidationError as error:
                problem = first_problem(type(self), error)
                if isinstance(problem.cause, InputError):
                    raise problem.cause from None
                name = ".".join(map(str, problem.where))
                raise InputError(f"{name}{problem.what}", field=name, hint=problem.hint) from None

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        """Appends the fields' descriptions to the docstring."""
        super().__pydantic_init_subclass__(**kwargs)
        texts = {name: declared(field).description.replace("\n", " ") for name, field in cls.model_fields.items()}
        lines = "".join(f"\n    {name}: {text}" for name, text in texts.items())
        cls.__doc__ = f"{inspect.cleandoc(cls.__doc__ or '')}\n\nArgs:{lines}"

    @classmethod
    def from_flags(cls, values: Mapping[str, Any], **names: str) -> "Self":
        """Makes options of flags, of which None stands for one that is not given; an error names the flag.

        Args:
            values: by option; other names are ignored.
            names: flags of options that are not called by their own name.
        """
        try:
            return cls(**{name: value for name in cls.model_fields if (value := values.get(name)) is not None})
        except InputError as error:
            if error.field not in cls.model_fields or not str(error).startswith(error.field):
                raise
            flag = f"--{names.get(error.field, error.field).replace('_', '-')}"
            raise InputError(str(error).replace(error.field, flag, 1), field=flag, hint=error.hint) from None

    @classmethod
    def gather(cls, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Returns keyword arguments in which single options, such as `epochs=2`, have become part of `options`."""
        single = {name: value for name, value in arguments.items() if name in cls.model_fields}
        rest = {name: value for name, value in arguments.items() if name not in single}
        if single:
            given = rest.get("options")
            rest["options"] = cls(**single) if given is None else given.replace(**single)
        return rest

    def replace(self, **changes: Any) -> "Self":
        """Returns a copy with some values changed, checked like new ones."""
        return type(self)(**{**dict(self), **changes})

    def shared_with(self, other: type[BaseModel]) -> dict[str, Any]:
        """Returns the values of those fields that another model has under the same names."""
        return {name: value for name, value in self if name in other.model_fields}


class Declared(NamedTuple):
    """What a field declares, also inside `Annotated[...] | None`: its type without None, its bounds and its texts."""

    type: Any
    metadata: Sequence[Any]
    description: str
    title: str | None

    @property
    def model(self) -> type[BaseModel] | None:
        """The model that it holds, or a list or a mapping of it; None for plain values."""
        inner = get_args(self.type)[-1] if get_origin(self.type) in (list, dict) else self.type
        return inner if isinstance(inner, type) and issubclass(inner, BaseModel) else None

    @property
    def allowed(self) -> str:
        """The values that it takes, in words, such as "a whole number of at least 1"."""
        if get_origin(self.type) is Literal:
            return f"one of {', '.join(map(str, get_args(self.type)))}"
        if self.model is not None:
            return "a list that is not empty" if get_origin(self.type) is list else "keys and values"
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", tuple: "texts"}
        kind = words.get(get_origin(self.type) or self.type, "a valid value")
        if any(getattr(item, "min_length", None) for item in self.metadata):
            return f"{kind} that is not empty"
        bounds = {
            word: getattr(item, name)
            for name, word in (("ge", "of at least"), ("gt", "above"), ("le", "at most"), ("lt", "below"))
            for item in self.metadata
            if getattr(item, name, None) is not None
        }
        if "of at least" in bounds and len(bounds) == 2:
            low, (word, high) = bounds.pop("of at least"), bounds.popitem()
            return f"{kind} from {low} to {'below ' * (word == 'below')}{high}"
        return f"{kind} {' and '.join(f'{word} {value}' for word, value in bounds.items())}".rstrip()


def declared(field: FieldInfo) -> Declared:
    """Returns what a field of a model declares."""
    kind, metadata, description, title = field.annotation, [*field.metadata], field.description, field.title
    while (origin := get_origin(kind)) in (Annotated, Union, types.UnionType):
        inner, *extra = [part for part in get_args(kind) if part is not types.NoneType]
        if origin is not Annotated and extra:
            break
        kind = inner
        for item in extra:
            metadata += item.metadata if isinstance(item, FieldInfo) else [item]
            description = description or getattr(item, "description", None)
            title = title or getattr(item, "title", None)
    return Declared(kind, metadata, description or "", title)


class Problem(NamedTuple):
    """The first problem of a failed validation.

    Args:
        where: the path to the value.
        what: continues the name of the place, as in "rank" + " must be a whole number of at least 1, found 0".
        hint: what to do, if anything is known.
        cause: the InputError that a validator of the model raised.
        unknown: whether there is no such name.
    """

    where: tuple[int | str, ...]
    what: str
    hint: str | None = None
    cause: InputError | None = None
    unknown: bool = False


def first_problem(model: type[BaseModel], error: ValidationError) -> Problem:
    """Puts the first problem into words; an unknown name goes first, because it explains what is missing."""
    problems = error.errors(include_url=False)
    found = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    where, kind = found["loc"], found["type"]
    field: FieldInfo | None = None
    for part in where:
        named = field is not None and get_origin(declared(field).type) is dict
        if field is not None:
            model = declared(field).model or model
        # What a mapping's keys are called is the user's choice.
        field = None if named else field if isinstance(part, int) else model.model_fields.get(part)
    if kind == "extra_forbidden":
        known = list(model.model_fields)
        near = difflib.get_close_matches(str(where[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        return Problem(where, f" is not an option of {model.__name__}: {hint}", hint, unknown=True)
    if kind == "value_error":
        cause = found["ctx"]["error"]
        if isinstance(cause, InputError):
            return Problem(where, f": {cause}", cause.hint, cause)
        return Problem(where, f" {cause}, found {found['input']!r}")
    if kind == "missing":
        return Problem(where, " is missing")
    if field is None:
        return Problem(where, f": {found['msg']}")
    return Problem(where, f" must be {declared(field).allowed}, found {found['input']!r}")


# What models are loaded and sampled with, in every room.
Precision = Literal["fp32", "bf16"]
PrecisionChoice = Literal["auto", "fp32", "bf16"]
Quantize = Literal["nf4"]
Checkpointing = Literal["auto", "on", "off"]
PositiveFloat = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class SamplingOptions(Options):
    """How completions are drawn."""

    completions: Count = Field(default=4, description="Completions drawn independently for each prompt (K).")
    temperature: PositiveFloat = Field(default=1.0, description="Divides the logits; 1 draws from the policy itself.")
    max_new_tokens: Count = Field(default=256, description="Longest completion in tokens, its end mark included.")
    max_prompt_tokens: Count = Field(default=1024, description="Longer prompts are an error.")


def check_model_path(name: str) -> None:
    """Refuses a model whose name can only be a path where nothing is; the Hub would be asked for minutes."""
    file = Path(name).suffix.lower() == ".gguf"
    only_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or file
    if only_path and not Path(name).exists():
        raise InputError(f"there is no model {'file' if file else 'folder'} {name}")
