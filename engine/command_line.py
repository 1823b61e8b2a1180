"""From a YAML file and a command line to a checked recipe, and from an error to a message that a person can act on.

`parse(["my.yaml", "--ppo.epochs", "3"])`: the command line wins over the file, the file over the schema's defaults.
Environment variables are no source of settings: a cluster exports too many of them (SEED, OUTPUT, NAME).
"""

from __future__ import annotations

import os
import re
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Mapping
from contextlib import contextmanager
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from typing import get_args

import yaml
from pydantic import BaseModel, ByteSize, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliPositionalArg,
    CliSettingsSource,
    CliSuppress,
    CliUnknownArgs,
    SettingsError,
)

from engine.config import Recipe, locate
from engine.errors import RecipeError, RunError, Stopped

QUICKSTART = "launch/recipes/quickstart.yaml"
# What gloo and NCCL say on a rank whose neighbour has gone.
LOST_PEER = re.compile(
    r"closed by peer|reset by peer|remote process exited|Broken pipe|Connection timed out", re.IGNORECASE
)


def parse(argv: list[str], default_recipe: str = QUICKSTART) -> Recipe:
    """The recipe that a command line asks for.

    Args:
        argv: `[RECIPE.yaml] [--section.key value ...]`, without the program's name.
        default_recipe: the file to read when `argv` names none.

    Raises:
        RecipeError: everything wrong with the command line and the file, at once.
        SystemExit: `--help` was asked for and printed.
    """
    parser = _Parser(
        prog="launch/train.py",
        description="PPO on DeepSpeed ZeRO. The command line wins over the recipe, the recipe over the defaults.",
        usage="launch/train.py [RECIPE.yaml] [--section.key value ...]",
        formatter_class=partial(RawDescriptionHelpFormatter, max_help_position=50),
        allow_abbrev=False,
    )
    try:
        source = CliSettingsSource(
            _CommandLine,
            root_parser=parser,
            cli_parse_args=_underscored(argv),
            cli_parse_none_str="null",
            cli_avoid_json=True,
            cli_use_class_docs_for_groups=True,
            cli_ignore_unknown_args=True,  # they come back in `unknown`, to be named with their nearest
        )
        options = source()
    except SettingsError as error:
        cause = str(error.__cause__ or "")
        detail = f" ({cause})" if cause not in str(error) else ""
        raise RecipeError(f"command line: {error}{detail}; see --help") from error
    problems = _unknown_options(options.pop("unknown", []))
    path = options.pop("recipe", None) or default_recipe
    options.pop("local_rank", None)
    if problems and not locate(path).is_file():
        path = default_recipe  # argparse took the unknown option's value for the recipe
    try:
        recipe = load_recipe(path, options)
    except RecipeError as error:
        problems += error.problems
    if problems:
        raise RecipeError(*problems)
    return recipe


def _underscored(argv: list[str]) -> list[str]:
    """`--time-limit=4h` as `--time_limit=4h`: both spellings of an option are usual. What is no option stays."""
    keys, found = known_keys(), []
    for argument in argv:
        name, equals, value = argument.partition("=")
        known = name[2:].replace("-", "_") if name.startswith("--") else ""
        found.append(f"--{known}{equals}{value}" if known in keys else argument)
    return found


def load_recipe(path: str | Path, overrides: Mapping | None = None) -> Recipe:
    """The recipe of a YAML file.

    Args:
        path: the file, from the working directory or the repository.
        overrides: nested settings that win over the file's, `{"ppo": {"epochs": 3}}`; lists are replaced whole.

    Raises:
        RecipeError: all that is wrong with it.
    """
    values = _merge(read_yaml(locate(path)), overrides or {})
    if values.get("name") is None:
        values["name"] = re.sub(r"[^\w.-]", "-", Path(path).stem)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError(*_explain(error)) from None


def recipe_text(recipe: Recipe) -> str:
    """Every setting of `recipe` as YAML that loads back to an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def parser_beside_recipe(
    prog: str, description: str, examples: str = "--model.path DIR --critic.home trunk"
) -> ArgumentParser:
    """For the options of a command that takes a recipe's, too: its `parse_known_args` leaves those over."""
    return ArgumentParser(
        prog=prog,
        description=description,
        epilog=f"Every key of the recipe is an option too ({examples}): see launch/train.py --help.",
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def count(text: str) -> int:
    """An option's whole number above 0."""
    if not text.isdigit() or int(text) < 1:
        raise ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return int(text)


def byte_size(text: str) -> int:
    """An option's size, such as 80GB or 24GiB."""
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise ArgumentTypeError(f"must be a size such as 80GB or 24GiB, got {text!r}") from None


@contextmanager
def readable_errors(what: str = "this run"):
    """Errors that are messages lose their traceback; any other keeps it, and comes first.

    Exit status: 2 when the recipe can't be run (said by rank 0), 1 when a run failed, 75 when it was asked to stop.
    """
    try:
        yield
    except RecipeError as error:
        bullets = "".join("\n  - " + problem.replace("\n", "\n    ") for problem in error.problems)
        _say_once(f"error: {what} can't start:{bullets}\n")
        raise SystemExit(2) from None
    except Stopped as stopped:
        if _rank() == 0:
            sys.stderr.write(f"stopped: {stopped}; go on with --resume\n")
        raise SystemExit(stopped.status) from None
    except (RunError, FloatingPointError) as error:  # every rank raises the same
        _say_once(f"error: {what} stopped: {error}\n")
        raise SystemExit(1) from None
    except RuntimeError as error:
        if not LOST_PEER.search(str(error)):
            raise
        # Not the cause, and its traceback would bury that of the rank that failed.
        sys.stderr.write(f"rank {_rank()} stops: another rank failed, its error stands above or follows\n")
        raise SystemExit(1) from None


def _say_once(message: str) -> None:
    if _rank() != 0:
        # DeepSpeed's launcher kills all ranks as soon as one ends: let rank 0 have its say first. Who is alive after
        # that is the one that failed, on a host of its own perhaps.
        time.sleep(3)
        message = f"rank {_rank()}: {message}"
    sys.stderr.write(message)
    sys.stderr.flush()


class _CommandLine(BaseSettings, Recipe):
    """The recipe's schema as options. Never made into an object: only the CLI source reads its fields."""

    recipe: CliPositionalArg[str | None] = Field(None, description=f"Recipe to run; none: {QUICKSTART}.")
    local_rank: CliSuppress[int] = 0  # added by DeepSpeed's launcher, which says the same through LOCAL_RANK
    unknown: CliUnknownArgs


class _Parser(ArgumentParser):
    """argparse that reports through exceptions and prints its help once for all ranks."""

    def error(self, message: str):
        raise SettingsError(message)

    def print_help(self, file=None):
        if _rank() == 0:
            super().print_help(file)


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error; the standard lets the last one win silently."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen and key.value != "<<":
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict:
    """A file of keys and values, each key once; empty where the file is.

    Raises:
        RecipeError: it can't be read, or is none.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except OSError as error:
        raise RecipeError(
            f"{path}: can't read this recipe ({error.strerror}); name a YAML file, or none for {QUICKSTART}"
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise RecipeError(f"{path}{line}: not valid YAML: {error.problem or error.context}; mend this line") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid YAML: {error}; write it as UTF-8 text") from None
    if not isinstance(values, dict | None):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, got {type(values).__name__}")
    return values or {}


def _merge(base: Mapping, over: Mapping) -> dict:
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below or {}, value) if _nests(below) and isinstance(value, Mapping) else value
    return merged


def _nests(value) -> bool:
    return value is None or isinstance(value, Mapping)


def _unknown_options(arguments: list[str]) -> list[str]:
    """One problem for each option that argparse didn't know; the word behind such an option is its value."""
    settable = [key for key in known_keys() if not key.startswith("rewards.")]
    problems = []
    behind_option = False
    for argument in arguments:
        if argument.startswith("-"):
            key = argument.lstrip("-").partition("=")[0].replace("-", "_")
            # A path into a list: the list is an option, its items are not.
            whole = "rewards" if key.startswith("rewards.") else nearest(key, settable)
            problems.append(f"{argument.partition('=')[0]}: unknown option; the nearest is --{whole}")
            behind_option = "=" not in argument
        elif behind_option:
            behind_option = False  # its value
        else:
            problems.append(f"{argument!r}: unexpected argument; give one recipe, and settings as --section.key value")
    return problems


def known_keys(section: type[BaseModel] = Recipe, prefix: str = "") -> dict[str, FieldInfo]:
    """Every setting of the recipe by its dotted path, sections included; those of a list's items without an index."""
    keys = {}
    for name, field in section.model_fields.items():
        keys[prefix + name] = field
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                keys |= known_keys(kind, f"{prefix}{name}.")
    return keys


def nearest(key: str, keys) -> str:
    """The one of `keys` that `key` resembles most: the last word counts as much as the path, the same section half."""
    section, _, last = key.rpartition(".")

    def likeness(candidate: str) -> float:
        its_section, _, its_last = candidate.rpartition(".")
        whole = SequenceMatcher(None, key, candidate).ratio()
        initials = "".join(word[:1] for word in its_last.split("_"))
        word = 1.0 if last == initials else SequenceMatcher(None, last, its_last).ratio()
        return whole + word + 0.5 * (section == its_section != "")

    return max(keys, key=likeness)


def _explain(error: ValidationError) -> list[str]:
    """pydantic's errors as: path, rule, value got, remedy. A union's errors, one per member, become one."""
    keys = known_keys()
    rules: dict[str, list[str]] = {}
    endings: dict[str, str] = {}
    problems = []
    for item in error.errors(include_url=False):
        words = [part for part in item["loc"] if isinstance(part, str)]
        if item["type"] == "extra_forbidden":
            problems.append(f"{_path(item['loc'])}: unknown key; the nearest is {nearest('.'.join(words), keys)}")
            continue
        if item["type"] == "value_error":
            prefix = f"{_path(item['loc'])}: " if item["loc"] else ""
            problems += [prefix + line for line in str(item["ctx"]["error"]).splitlines()]
            continue
        # The location of a union's error ends with the member that failed, which is no key.
        known = max((n for n in range(len(words) + 1) if ".".join(words[:n]) in keys), default=0)
        field = keys.get(".".join(words[:known]))
        loc = item["loc"] if known == len(words) else item["loc"][: item["loc"].index(words[known])]
        rule = "should be a mapping of keys" if item["type"] == "model_type" else item["msg"]
        rules.setdefault(_path(loc), []).append(rule.replace("Input should", "should"))
        endings[_path(loc)] = f"got {_short(item['input'])}; {_remedy(field)}"
    return problems + [f"{path}: {' or '.join(said)}, {endings[path]}" for path, said in rules.items()]


def _remedy(field: FieldInfo | None) -> str:
    if field is None:
        return "see --help"
    default = field.get_default(call_default_factory=True)
    if isinstance(default, BaseModel):
        return f"give the keys of this section ({', '.join(type(default).model_fields)})"
    return f"for example the default, {_short(default)}. {field.description or ''}".rstrip()


def _path(loc: tuple) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")


def _short(value) -> str:
    if value is None:
        return "null"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _rank() -> int:
    return int(os.environ.get("RANK") or 0)
