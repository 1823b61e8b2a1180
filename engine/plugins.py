"""A user's Python functions (rewards, judges), named in the recipe as `path/to/file.py:name`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from types import ModuleType

from engine.config import REPOSITORY, locate
from engine.errors import RecipeError


def load_function(spec: str) -> Callable:
    """The function that `spec` names. Runs the file's top level, once per process however often it is named.

    Args:
        spec: `path/to/file.py:name`, the path from the working directory or the repository.

    Raises:
        RecipeError: what is wrong with the name, the file or its content.
    """
    path, colon, name = spec.rpartition(":")
    if not colon or not path or not name.isidentifier():
        raise RecipeError(f"a function is written path/to/file.py:name, got {spec!r}; name the file and the function")
    file = locate(path)
    if not file.is_file() or file.suffix != ".py":
        raise RecipeError(f"{spec}: no Python file {path} (working directory {Path.cwd()}); correct the path")
    module = _module(file.resolve(), spec)
    if not hasattr(module, name):
        own = {n: value for n, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__}
        there = [n for n, value in own.items() if callable(value) and not n.startswith("_")]
        raise RecipeError(f"{spec}: {path} has no {name}; it has {', '.join(sorted(there)) or 'no functions'}")
    function = getattr(module, name)
    if not callable(function):
        raise RecipeError(f"{spec}: {name} is of type {type(function).__name__}, not a function; name a function")
    return function


def _module(file: Path, spec: str) -> ModuleType:
    package = REPOSITORY / "engine"
    # A file of this package goes by its own name: loaded by path it would be a second copy with its own state.
    inner = file.parent == package
    name = f"engine.{file.stem}" if inner else f"alternator_plugin_{sha256(str(file).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    try:
        if inner:
            return importlib.import_module(name)
        description = importlib.util.spec_from_file_location(name, file)
        module = importlib.util.module_from_spec(description)
        sys.modules[name] = module  # before it runs: dataclasses and pickle look their module up there
        description.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(name, None)
        raise RecipeError(
            f"{spec}: running {file} raised {type(error).__name__}: {error}{line_of(error, file)}; mend the file"
        ) from error
    return module


def line_of(error: Exception, file: Path) -> str:
    """Where in the user's file it happened: " (line 7)", or nothing when it happened elsewhere."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f" (line {error.lineno})"
    frames, frame = [], error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == str(file):
            frames.append(frame.tb_lineno)
        frame = frame.tb_next
    return f" (line {frames[-1]})" if frames else ""
