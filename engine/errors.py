"""The errors that are messages to a person: they are shown without a traceback."""

from __future__ import annotations

from collections.abc import Callable


class RecipeError(ValueError):
    """The user's input can't make a run: each problem states the rule, the value got and the remedy."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


def problems_of(check: Callable, *arguments) -> list[str]:
    """What a check raises as problems of the recipe; none, if it raises nothing."""
    try:
        check(*arguments)
    except RecipeError as error:
        return list(error.problems)
    return []


class RunError(RuntimeError):
    """A run can't go on, and the message says all there is to know; every rank raises the same."""


class Diverged(RunError):
    """Training has gone where it may not go on, in numbers that are finite."""


class Stopped(Exception):
    """The run was asked to stop, and what there was to save is on the disk.

    Args:
        status: of the process.
    """

    def __init__(self, reason: str, status: int):
        super().__init__(reason)
        self.status = status
