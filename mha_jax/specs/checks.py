"""Faults of what the user gave: one error type, one wording."""

import numbers
from typing import Any


class UserError(ValueError):
    """What the user gave is wrong. Scripts print the message as one line and exit with 2."""


def choice(field: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{field}={value!r} is not one of {', '.join(map(repr, allowed))}")


def at_least(field: str, value: Any, least: int | float, kinds: tuple[type, ...] = (int,)) -> None:
    if isinstance(value, bool) or not isinstance(value, kinds) or not value >= least:
        wanted = "an integer" if kinds == (int,) else "a number"
        raise UserError(f"{field}={value!r} must be {wanted} of at least {least}")


def rate(field: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 <= float(value) < 1:
        raise UserError(f"{field}={value!r} must be at least 0 and below 1")


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def listing(values: list[int]) -> str:
    words = [str(v) for v in values]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
