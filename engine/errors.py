"""The errors that are messages to a person: they are shown without a traceback."""

from __future__ import annotations


class RecipeError(ValueError):
    """The user's input can't make a run: each problem states the rule, the value got and the remedy."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


class RunError(RuntimeError):
    """A run can't go on, and the message says all there is to know; every rank raises the same."""
