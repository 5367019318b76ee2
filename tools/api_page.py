"""The text of ``docs/api.md``: public names, their signatures and their docstrings."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import inductor_sparse
from inductor_sparse import decisions, errors
from inductor_sparse.plan import Plan, SitePlan
from inductor_sparse.report import sites
from inductor_sparse.report.explanation import Explanation

HEAD = """\
# API

<!-- Made by `make docs` from the docstrings: edit those instead. -->

The backend itself needs no import: `torch.compile(model, backend="sparse")`. What
`import inductor_sparse` gives is for looking at what the backend did and for helping
it: the functions below, what they return, and the modules `config`, `decisions` and
`errors`. `__version__` is the version of the package. A rule of another package is
added with
[`inductor_sparse.passes.register`](../CONTRIBUTING.md#a-rule-in-another-package).
"""
CONFIG = """
## `config`

The defaults of the process for the options `sparse.*`, by their names without the
prefix: `inductor_sparse.config.strict = True`. See [Options](options.md).
"""
LOG = "a :class:`DecisionLog` to which every graph that the backend compiles is added."
FUNCTIONS: tuple[Callable[..., Any], ...] = (
    inductor_sparse.explain,
    inductor_sparse.calibrate,
    sites.report,
    inductor_sparse.prepare,
    inductor_sparse.inductor_configs,
)
RETURNED = (Explanation, Plan, SitePlan, sites.SiteReport, sites.ReportedSite)

_SECTION = re.compile(r"^(Args|Returns|Raises):$", re.MULTILINE)
_TITLES = {"Args": "Arguments", "Returns": "Returns", "Raises": "Raises"}
_ROLE = re.compile(r":\w+:`~?([^`]+)`")


def text() -> str:
    """The whole page."""
    functions = [section(function) for function in FUNCTIONS]
    parts = [
        HEAD,
        "\n## Functions\n",
        *functions,
        "\n## What they return\n",
        *(section(kind) for kind in RETURNED),
        f"\n## `decisions`\n\n{_prose(inspect.getdoc(decisions) or '')}\n",
        f"\n`LOG`: {_prose(LOG)}\n",
        *(section(thing) for thing in _own(decisions)),
        f"\n## `errors`\n\n{_prose(inspect.getdoc(errors) or '')}\n\n",
        *(_bullet(kind.__name__, _summary(kind)) for kind in _own(errors)),
        CONFIG,
    ]
    return "".join(parts)


def _own(module: Any) -> list[Any]:
    """The public classes and functions that a module defines, in its order."""
    return [
        value
        for name, value in vars(module).items()
        if inspect.isclass(value) or inspect.isfunction(value)
        if not name.startswith("_") and value.__module__ == module.__name__
    ]


def section(thing: Any) -> str:
    """A function or a class under a heading of its own."""
    lines = [f"\n### `{thing.__name__}`\n"]
    if not inspect.isclass(thing):
        lines.append(f"\n```text\n{_signature(thing)}\n```\n")
    lines.append(f"\n{_markdown(inspect.getdoc(thing) or '')}\n")
    if inspect.isclass(thing):
        lines += _members(thing)
    return "".join(lines)


def _members(kind: type) -> Iterator[str]:
    """The values, the fields, and the methods of a class."""
    if issubclass(kind, enum.Enum):
        values = ", ".join(f"`{member.value}`" for member in kind)
        yield f"\nValues: {values}.\n"
        return
    if dataclasses.is_dataclass(kind):
        fields = "\n".join(f"{f.name}: {f.type}" for f in dataclasses.fields(kind))
        yield f"\n```text\n{fields}\n```\n"
    public = [n for n in vars(kind) if not n.startswith("_")]
    described = [n for n in public if inspect.getdoc(getattr(kind, n, None))]
    fields_of = getattr(kind, "__dataclass_fields__", {})
    bullets = [_member(kind, name) for name in described if name not in fields_of]
    if bullets:
        yield "\n"
        yield from bullets


def _member(kind: type, name: str) -> str:
    value = inspect.getattr_static(kind, name)
    if isinstance(value, property):
        return _bullet(name, _summary(value))
    arguments = (
        _signature(getattr(kind, name)).replace("self, ", "").replace("self", "")
    )
    return _bullet(arguments, _summary(value))


def _bullet(name: str, meaning: str) -> str:
    return f"- `{name}`: {meaning}\n"


def _summary(thing: Any) -> str:
    """The first paragraph of a docstring, and what it says of errors."""
    thing = getattr(thing, "__func__", thing)
    head, *sections = _SECTION.split(inspect.getdoc(thing) or "")
    raised = dict(zip(sections[::2], sections[1::2], strict=True)).get("Raises", "")
    named = (f"`{name}`: {_prose(why)}" for name, why in _entries(raised))
    raises = " Raises " + "; ".join(named) if raised else ""
    return _prose(head.partition("\n\n")[0]) + raises


def _signature(function: Any) -> str:
    """Name, arguments with types and defaults, and type of the result."""
    signature = inspect.signature(function)
    arguments, star = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            star = True
        if parameter.kind is parameter.KEYWORD_ONLY and not star:
            arguments.append("*")
            star = True
        arguments.append(_argument(parameter))
    result = signature.return_annotation
    line = f"{function.__name__}({', '.join(arguments)}) -> {result}"
    if len(line) <= 80:
        return line
    inner = "".join(f"    {argument},\n" for argument in arguments)
    return f"{function.__name__}(\n{inner}) -> {result}"


def _argument(parameter: inspect.Parameter) -> str:
    stars: dict[Any, str] = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
    name = stars.get(parameter.kind, "") + parameter.name
    if parameter.annotation is not parameter.empty:
        name += f": {parameter.annotation}"
    if parameter.default is not parameter.empty:
        name += f" = {parameter.default!r}"
    return name


def _markdown(docstring: str) -> str:
    """A docstring, its sections as lists."""
    head, *sections = _SECTION.split(docstring)
    parts = [_prose(head)]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        entries = list(_entries(body)) if title != "Returns" else []
        lines = [_bullet(name, _prose(meaning)) for name, meaning in entries]
        listed = "".join(lines) or f"- {_prose(inspect.cleandoc(body))}\n"
        parts.append(f"{_TITLES[title]}:\n\n{listed.rstrip()}")
    return "\n\n".join(parts)


def _entries(body: str) -> Iterable[tuple[str, str]]:
    """``name: meaning`` of each entry of a section."""
    for entry in re.split(r"\n(?=\S)", inspect.cleandoc(body)):
        name, _, meaning = entry.partition(": ")
        if meaning:
            yield name, meaning


def _prose(text: str) -> str:
    """Paragraphs in Markdown: roles and double backticks are code."""
    text = _ROLE.sub(r"`\1`", text.strip()).replace("``", "`")
    return re.sub(r"(?<=\S)  +", " ", re.sub(r"\n +", " ", text))
