"""Argument types of the command line: each reads text or says what is wrong with it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any


def list_of(parse: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A parser of comma-separated values, each read by ``parse``.

    Raises (from the parser): ``argparse.ArgumentTypeError``, as every type here does.
    """

    def parse_list(text: str) -> list[Any]:
        return [parse(part.strip()) for part in text.split(",")]

    return parse_list


def names(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """A parser of comma-separated names out of ``allowed``."""

    def parse_name(text: str) -> str:
        if text not in allowed:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not one of {', '.join(allowed)}"
            )
        return text

    return list_of(parse_name)


def positive(text: str) -> int:
    """A whole number above zero."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _number(text: str, meaning: str, valid: Callable[[float], bool]) -> float:
    """A number for which ``valid`` holds."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not valid(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {meaning}")
    return value


def densities(text: str) -> list[float]:
    """Comma-separated fractions strictly between 0 and 1."""
    meaning = "a fraction between 0 and 1, ends excluded"
    return list_of(lambda part: _number(part, meaning, lambda d: 0 < d < 1))(text)


def duration(text: str) -> float:
    """A finite duration above zero, in whatever unit."""
    return _number(text, "a duration above 0", lambda s: 0 < s < float("inf"))


def size(text: str) -> tuple[int, int]:
    """``FEATURESxHIDDEN``, such as ``4096x16384``."""
    features, found, hidden = text.partition("x")
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not FEATURESxHIDDEN")
    return positive(features), positive(hidden)
