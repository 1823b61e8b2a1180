"""Prompts: read strictly, tokenised once, drawn by one global cursor that any iteration can start from.

A problem in the data stops the run before a model loads, and names the file and the line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch

from engine.batch import Prompts
from engine.config import DataConfig, GenerationConfig
from engine.errors import RecipeError
from engine.randomness import Stream, generator

LOCAL_FORMATS = {".json": "json", ".jsonl": "jsonl", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Row:
    """A row of a dataset, before any tokenizer."""

    where: str  # "line 3" of a file with lines, otherwise "row 3"; both count from 1
    values: dict


@dataclass(frozen=True)
class PromptRecord:
    """One prompt, ready to be drawn."""

    ids: tuple[int, ...]
    text: str
    columns: dict
    max_new_tokens: int  # longest response


@dataclass(frozen=True)
class PromptSet:
    """The prompts of a dataset in its order, and what became of the over-long ones."""

    records: tuple[PromptRecord, ...]
    pad_id: int
    dropped: int = 0
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.records)


def load_prompts(data: DataConfig, generation: GenerationConfig, tokenizer, dataset: str | None = None) -> PromptSet:
    """Read and tokenise the prompts of `dataset`, or of `data.dataset` when None.

    Raises:
        RecipeError: the dataset is missing, empty, malformed, lacks a column, holds over-long prompts or bad limits.
    """
    source = dataset or data.dataset
    rows = read_rows(data, source, generation)
    if data.messages_column is not None:
        texts = [_render(tokenizer, row, data.messages_column, source) for row in rows]
        # The template has written every special token already: the tokenizer must add no second BOS.
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        hidden = None  # a rendered text is not the messages: reward functions get both
    else:
        texts = [row.values[data.text_column] for row in rows]
        ids = _tokenize(tokenizer, texts)
        hidden = data.text_column
    for row, row_ids in zip(rows, ids, strict=True):
        if not row_ids:
            raise RecipeError(f"{source}, {row.where}: the tokenizer makes no token of this prompt; remove it")
    limited = data.max_new_tokens_column
    records = [
        PromptRecord(
            ids=tuple(row_ids),
            text=text,
            columns={key: value for key, value in row.values.items() if key != hidden},
            max_new_tokens=int(row.values[limited]) if limited else generation.max_new_tokens,
        )
        for row, row_ids, text in zip(rows, ids, texts, strict=True)
    ]
    return _limit(records, rows, data, tokenizer, source)


def read_rows(data: DataConfig, dataset: str | None = None, generation: GenerationConfig | None = None) -> list[Row]:
    """The checked rows of `dataset`, or of `data.dataset` when None; needs no tokenizer.

    Args:
        generation: bounds the rows' own limits on responses; None: those are not looked at.

    Raises:
        RecipeError: as `load_prompts`, apart from lengths.
    """
    source = dataset or data.dataset
    kind = LOCAL_FORMATS.get(Path(source).suffix.lower())
    if kind is not None and not Path(source).is_file():
        raise RecipeError(f"{source}: no such file (working directory {Path.cwd()}); correct data.dataset")
    readers = {"jsonl": _read_jsonl, "json": _read_json}
    try:
        rows = readers[kind](source) if kind in readers else _read_with_datasets(data, source, kind)
    except UnicodeDecodeError as error:
        raise RecipeError(f"{source}: not UTF-8 text ({error}); convert the file") from None
    if not rows:
        raise RecipeError(f"{source}: no prompts, the dataset is empty; give at least one row")
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    # As datasets does for the formats that it reads: a reward function gets every column for every row.
    rows = [Row(row.where, {name: row.values.get(name) for name in names}) for row in rows]
    if data.messages_column:
        _check_column(rows, source, "messages_column", data.messages_column, _messages_problem)
    else:
        _check_column(rows, source, "text_column", data.text_column, _text_problem)
    if data.max_new_tokens_column and generation:
        check = partial(_limit_problem, least=generation.min_new_tokens, most=generation.max_new_tokens)
        _check_column(rows, source, "max_new_tokens_column", data.max_new_tokens_column, check)
    return rows


def _check_column(
    rows: list[Row], source: str, setting: str, column: str, check: Callable[[object], str | None]
) -> None:
    names = rows[0].values
    if column not in names:
        raise RecipeError(
            f"{source}: no column {column!r}; it has {', '.join(names) or 'none'}; set data.{setting} to one of them"
        )
    bad = [(row.where, problem) for row in rows if (problem := check(row.values[column]))]
    if bad:
        more = f" (and {len(bad) - 1} more rows)" if len(bad) > 1 else ""
        raise RecipeError(f"{source}, {bad[0][0]}: column {column!r} {bad[0][1]}{more}; mend or remove these rows")


# datasets reads jsonl too, but its errors don't name the line, and it unifies types and keys over all rows.
def _read_jsonl(source: str) -> list[Row]:
    rows, problems = [], []
    with open(source, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                rows.append(Row(f"line {number}", _object(json.loads(line))))
            except ValueError as error:
                said = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                problems.append(f"{source}:{number}: malformed JSON line: {said}; one JSON object per line")
    if problems:
        shown = problems[:5] + ([f"{source}: {len(problems) - 5} more malformed lines"] if len(problems) > 5 else [])
        raise RecipeError(*shown)
    return rows


def _read_json(source: str) -> list[Row]:
    text = Path(source).read_text(encoding="utf-8-sig")
    if not text.strip():
        return []
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecipeError(
            f"{source}:{error.lineno}: malformed JSON: {error.msg}; one object per line goes into a .jsonl file"
        ) from None
    if isinstance(values, dict):
        # {"data": [...]}: the other common shape.
        lists = [value for value in values.values() if isinstance(value, list)]
        values = lists[0] if len(lists) == 1 else values
    if not isinstance(values, list):
        raise RecipeError(f"{source}: a .json file holds a list of objects, got {type(values).__name__}")
    rows = []
    for number, value in enumerate(values, 1):
        try:
            rows.append(Row(f"row {number}", _object(value)))
        except ValueError as error:
            raise RecipeError(f"{source}, row {number}: {error}; make it an object") from None
    return rows


def _object(value) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"an object was expected, got {type(value).__name__}")
    return value


def _read_with_datasets(data: DataConfig, source: str, kind: str | None) -> list[Row]:
    import datasets  # here: it takes a second, and local JSON needs none of it

    try:
        if kind is not None:
            # Streamed: no copy under the cache, nothing that two ranks could write at once.
            loaded = datasets.load_dataset(kind, data_files=source, split="train", streaming=True)
        else:
            loaded = datasets.load_dataset(source, data.subset, split=data.split)
        return [Row(f"row {number}", dict(row)) for number, row in enumerate(loaded, 1)]
    except Exception as error:  # whatever pandas, pyarrow or the hub raise, the dataset is what is wrong
        if kind == "csv" and not Path(source).read_text(encoding="utf-8").strip():
            return []
        what = f"{source}: can't read this {kind} file" if kind else f"{source}: can't load this dataset from the hub"
        hint = "mend the file" if kind else "check data.dataset, data.subset and data.split, or name a local file"
        cause = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
        raise RecipeError(f"{what} ({cause}); {hint}") from error


def _text_problem(value) -> str | None:
    if not isinstance(value, str):
        return f"should hold text, got {value!r:.60}"
    return None if value.strip() else f"is empty, got {value!r:.60}"


def _messages_problem(value) -> str | None:
    good = (
        isinstance(value, list)
        and value
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) and m.get("content") is not None for m in value)
    )
    return None if good else f"should hold a list of {{role, content}} messages, got {value!r:.60}"


def _limit_problem(value, least: int, most: int) -> str | None:
    # A csv column with a gap reads as floats: 12.0 is what its author wrote as 12.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and max(1, least) <= value <= most and value == int(value):
        return None
    lowest = f"generation.min_new_tokens {least}" if least > 1 else "1"
    return f"should hold a whole number from {lowest} to generation.max_new_tokens {most}, got {value!r:.60}"


def _render(tokenizer, row: Row, column: str, source: str) -> str:
    try:
        return tokenizer.apply_chat_template(row.values[column], add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template is a program of the tokenizer's author and can raise anything
        raise RecipeError(
            f"{source}, {row.where}: the chat template failed: {error}; use a tokenizer with a template that fits "
            "these messages, or data.text_column"
        ) from error


def _tokenize(tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids as the tokenizer makes them, less the EOS that some append: a prompt goes on."""
    whole = tokenizer(texts)["input_ids"] if texts else []
    end = tokenizer.eos_token_id
    for index, ids in enumerate(whole):
        if ids and end is not None and ids[-1] == end:
            plain = tokenizer(texts[index], add_special_tokens=False)["input_ids"]
            if ids[-len(plain) - 1 : -1] == plain:  # otherwise the text itself ends so, and means it
                whole[index] = ids[:-1]
    return whole


def _limit(records: list[PromptRecord], rows: list[Row], data: DataConfig, tokenizer, source: str) -> PromptSet:
    most = data.max_prompt_tokens
    long = [index for index, record in enumerate(records) if len(record.ids) > most]
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad_id is None:
        raise RecipeError("the tokenizer has neither a padding nor an EOS token; set eos_token in its configuration")
    if not long:
        return PromptSet(tuple(records), pad_id)
    if data.overlong == "error":
        raise RecipeError(
            f"{source}: {len(long)} of {len(records)} prompts are longer than data.max_prompt_tokens {most}, the first "
            f"at {rows[long[0]].where} with {len(records[long[0]].ids)} tokens; raise data.max_prompt_tokens, or set "
            "data.overlong to drop or truncate_left"
        )
    if data.overlong == "truncate_left":
        for index in long:
            records[index] = _truncate(records[index], most, tokenizer)
        return PromptSet(tuple(records), pad_id, truncated=len(long))
    kept = [record for record in records if len(record.ids) <= most]
    if not kept:
        raise RecipeError(
            f"{source}: data.overlong drop leaves none of the {len(records)} prompts; "
            f"raise data.max_prompt_tokens {most}"
        )
    return PromptSet(tuple(kept), pad_id, dropped=len(long))


def _truncate(record: PromptRecord, most: int, tokenizer) -> PromptRecord:
    """The last `most` tokens, a leading BOS kept; the text says what the model will see."""
    begin = record.ids[:1] if record.ids[0] == tokenizer.bos_token_id else ()
    tail = record.ids[len(record.ids) - (most - len(begin)) :]
    return replace(record, ids=begin + tail, text=tokenizer.decode(tail))


class PromptSource:
    """Which prompts an iteration draws: a pure function of (seed, iteration), so that resuming needs no state.

    Args:
        prompts: the dataset.
        seed: the run's seed.
        prompts_per_iteration: prompts drawn for one iteration, over all ranks.
        samples_per_prompt: rows made of each prompt, side by side.
    """

    def __init__(self, prompts: PromptSet, seed: int, prompts_per_iteration: int, samples_per_prompt: int = 1):
        assert len(prompts) > 0
        self.prompts = prompts
        self.seed = seed
        self.prompts_per_iteration = prompts_per_iteration
        self.samples_per_prompt = samples_per_prompt

    def batch(self, iteration: int, rank: int = 0, world_size: int = 1) -> Prompts:
        """This rank's rows of an iteration (counted from 0); ranks get neighbouring slices, some perhaps none."""
        first = iteration * self.prompts_per_iteration
        draws = range(first, first + self.prompts_per_iteration)
        return self._deal(draws, [self._index(draw) for draw in draws], self.samples_per_prompt, rank, world_size)

    def head(self, count: int, rank: int = 0, world_size: int = 1) -> Prompts:
        """This rank's rows of the first `count` prompts (or all, when fewer) in the dataset's order, one row each."""
        draws = range(min(count, len(self.prompts)))
        return self._deal(draws, list(draws), 1, rank, world_size)

    def _index(self, draw: int) -> int:
        """The record that the draw-th prompt since the run began is: epochs are permutations, one behind the other."""
        epoch, position = divmod(draw, len(self.prompts))
        return int(_permutation(self.seed, epoch, len(self.prompts))[position])

    def _deal(self, draws: Iterable[int], indices: list[int], samples: int, rank: int, world_size: int) -> Prompts:
        rows = [(d, i, s) for d, i in zip(draws, indices, strict=True) for s in range(samples)]
        mine = rows[share(len(rows), rank, world_size)]
        records = self.prompts.records
        # As wide on every rank: decoding steps and shapes then agree without asking.
        width = max(len(records[index].ids) for index in indices)
        prompt_ids = torch.full((len(mine), width), self.prompts.pad_id, dtype=torch.int64)
        for row, (_, index, _) in enumerate(mine):
            prompt_ids[row, width - len(records[index].ids) :] = torch.tensor(records[index].ids)
        return Prompts(
            prompt_ids=prompt_ids,
            prompt_lengths=torch.tensor([len(records[i].ids) for _, i, _ in mine], dtype=torch.int64),
            draws=torch.tensor([d for d, _, _ in mine], dtype=torch.int64),
            samples=torch.tensor([s for _, _, s in mine], dtype=torch.int64),
            max_new_tokens=torch.tensor([records[i].max_new_tokens for _, i, _ in mine], dtype=torch.int64),
            texts=tuple(records[i].text for _, i, _ in mine),
            columns=tuple(records[i].columns for _, i, _ in mine),
        )


def share(rows: int, rank: int, world_size: int) -> slice:
    """The rows that a rank gets of an iteration's."""
    each, extra = divmod(rows, world_size)
    start = rank * each + min(rank, extra)
    return slice(start, start + each + (rank < extra))


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    # Keyed by (seed, epoch): any epoch's order comes without having made the ones before.
    return generator(seed, Stream.PROMPTS, epoch).permutation(size)
