"""Prompts: strict reading, tokens, and the cursor."""

import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from engine.config import DataConfig, GenerationConfig
from engine.errors import RecipeError
from engine.prompts import PromptRecord, PromptSet, PromptSource, load_prompts, read_rows

GENERATION = GenerationConfig(max_new_tokens=48)
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<bot>", *"abcdefghij"]
IDS = {word: index for index, word in enumerate(WORDS)}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)


def make_tokenizer(pattern: str | None = "<s> $A", **special):
    """A word-level tokenizer; `pattern` says which special tokens it adds by itself."""
    raw = Tokenizer(models.WordLevel(IDS, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if pattern is not None:
        raw.post_processor = processors.TemplateProcessing(
            single=pattern, special_tokens=[(word, IDS[word]) for word in ("<s>", "</s>")]
        )
    tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"} | special
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, **tokens, extra_special_tokens=["<user>", "<bot>"], chat_template=TEMPLATE
    )


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def save(tmp_path, rows, name="prompts.jsonl"):
    file = tmp_path / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def data(file, **changes) -> DataConfig:
    return DataConfig(dataset=str(file), **changes)


def problem(file, tokenizer, **changes) -> str:
    with pytest.raises(RecipeError) as caught:
        load_prompts(data(file, **changes), GENERATION, tokenizer)
    assert str(file) in str(caught.value)
    return str(caught.value)


ROWS = [{"prompt": "a b", "label": 1.5}, {"prompt": "c", "label": 2.0}, {"prompt": "d e f", "label": 3.0}]


# ---- reading


@pytest.mark.parametrize("kind", ["jsonl", "json", "nested.json", "csv", "parquet"])
def test_every_local_format_gives_the_same_records(tmp_path, tokenizer, kind):
    file = tmp_path / f"prompts.{kind}"
    if kind == "jsonl":
        file.write_text("\n".join(json.dumps(row) for row in ROWS))  # no newline at the end
    elif kind == "json":
        file.write_text(json.dumps(ROWS))
    elif kind == "nested.json":
        file.write_text(json.dumps({"version": "1", "data": ROWS}))
    elif kind == "csv":
        file.write_text("prompt,label\n" + "".join(f"{row['prompt']},{row['label']}\n" for row in ROWS))
    else:
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.Table.from_pylist(ROWS), file)
    prompts = load_prompts(data(file), GENERATION, tokenizer)
    assert [record.text for record in prompts.records] == ["a b", "c", "d e f"]
    assert [record.columns for record in prompts.records] == [{"label": 1.5}, {"label": 2.0}, {"label": 3.0}]
    assert prompts.records[2].ids == tuple(IDS[word] for word in ["<s>", "d", "e", "f"])
    assert (prompts.dropped, prompts.truncated, prompts.pad_id) == (0, 0, IDS["<pad>"])


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.csv"])
@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_file(tmp_path, tokenizer, name, text):
    file = tmp_path / name
    file.write_text(text)
    assert "empty" in problem(file, tokenizer)


def test_empty_list_and_header_alone(tmp_path, tokenizer):
    for name, text in [("x.json", "[]"), ("x.csv", "prompt,label\n")]:
        (tmp_path / name).write_text(text)
        assert "empty" in problem(tmp_path / name, tokenizer)


def test_malformed_lines_are_named(tmp_path, tokenizer):
    file = tmp_path / "bad.jsonl"
    file.write_text('{"prompt": "a"}\n\n{"prompt": "b"\n[1]\n{"prompt": "c"}\n')
    said = problem(file, tokenizer)
    assert f"{file}:3: malformed" in said and f"{file}:4: malformed" in said and "list" in said and ":5" not in said


def test_malformed_json_names_the_line(tmp_path, tokenizer):
    file = tmp_path / "bad.json"
    file.write_text('[{"prompt": "a"},\n {"prompt" "b"}]')
    assert f"{file}:2: malformed" in problem(file, tokenizer)


def test_malformed_parquet_and_missing_file(tmp_path, tokenizer):
    file = tmp_path / "bad.parquet"
    file.write_text("no parquet at all")
    assert "can't read this parquet file" in problem(file, tokenizer)
    assert "no such file" in problem(tmp_path / "none.jsonl", tokenizer)


def test_missing_column_lists_those_that_exist(tmp_path, tokenizer):
    said = problem(save(tmp_path, ROWS), tokenizer, text_column="promt")
    assert "no column 'promt'" in said and "prompt, label" in said and "data.text_column" in said
    assert "data.messages_column" in problem(save(tmp_path, ROWS), tokenizer, messages_column="chat")


@pytest.mark.parametrize("value", [5, None, ["a"], "", "  \n"])
def test_text_that_is_none_names_file_and_line(tmp_path, tokenizer, value):
    said = problem(save(tmp_path, [{"prompt": "a"}, {"prompt": value}, {"prompt": value}]), tokenizer)
    assert "line 2" in said and "1 more" in said and repr(value) in said


def test_a_row_without_the_column_names_its_line(tmp_path, tokenizer):
    assert "line 2" in problem(save(tmp_path, [{"prompt": "a"}, {"text": "b"}]), tokenizer)


def test_hub_name_without_a_hub(monkeypatch, tokenizer):
    import datasets

    def unreachable(*args, **kwargs):
        raise ConnectionError(f"no route for {args[0]} {args[1]} {kwargs['split']}")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    said = problem("some/dataset", tokenizer, subset="plain", split="test")
    assert "from the hub" in said and "no route for some/dataset plain test" in said


def test_hub_dataset(monkeypatch, tokenizer):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda name, subset, split: datasets.Dataset.from_list(ROWS))
    assert [record.text for record in load_prompts(data("some/dataset"), GENERATION, tokenizer).records] == [
        "a b",
        "c",
        "d e f",
    ]


def test_another_dataset_is_read_like_the_first(tmp_path, tokenizer):
    held_out = save(tmp_path, [{"q": "j"}], "held_out.jsonl")
    assert (
        load_prompts(data("unused.jsonl", text_column="q"), GENERATION, tokenizer, str(held_out)).records[0].text == "j"
    )
    assert read_rows(data("unused.jsonl", text_column="q"), str(held_out))[0].values == {"q": "j"}


# ---- tokens


def words(record) -> list[str]:
    return [WORDS[index] for index in record.ids]


def test_a_trailing_eos_is_taken_off(tmp_path):
    file = save(tmp_path, [{"prompt": "a b"}, {"prompt": "a </s>"}])
    for pattern in ("<s> $A </s>", "<s> $A"):
        first, second = load_prompts(data(file), GENERATION, make_tokenizer(pattern)).records
        assert words(first) == ["<s>", "a", "b"]
        assert words(second) == ["<s>", "a", "</s>"]  # this one is the text's own


def test_chat_template_gives_one_bos_and_a_generation_prompt(tmp_path, tokenizer):
    chat = [{"role": "user", "content": "a b"}]
    file = save(tmp_path, [{"chat": chat, "label": 1}])
    (record,) = load_prompts(data(file, messages_column="chat"), GENERATION, tokenizer).records
    assert words(record) == ["<s>", "<user>", "a", "b", "<bot>"]
    assert record.columns == {"chat": chat, "label": 1}
    assert record.text.startswith("<s>") and record.text.endswith("<bot>")


@pytest.mark.parametrize("value", ["a", [], [{"role": "user"}], [{"content": "a"}], None])
def test_bad_messages(tmp_path, tokenizer, value):
    file = save(tmp_path, [{"chat": [{"role": "user", "content": "a"}]}, {"chat": value}])
    said = problem(file, tokenizer, messages_column="chat")
    assert "line 2" in said and "{role, content}" in said


def test_no_chat_template(tmp_path):
    plain = make_tokenizer()
    plain.chat_template = None
    file = save(tmp_path, [{"chat": [{"role": "user", "content": "a"}]}])
    assert "chat template failed" in problem(file, plain, messages_column="chat")


def test_eos_pads_where_there_is_no_padding_token(tmp_path):
    file = save(tmp_path, ROWS)
    assert load_prompts(data(file), GENERATION, make_tokenizer(pad_token=None)).pad_id == IDS["</s>"]


# ---- over-long prompts

LONG = [{"prompt": "a b"}, {"prompt": "a b c d e f"}, {"prompt": "c"}, {"prompt": "g h i j"}]


def test_overlong_is_an_error(tmp_path, tokenizer):
    said = problem(save(tmp_path, LONG), tokenizer, max_prompt_tokens=4)
    assert "2 of 4" in said and "line 2" in said and "7 tokens" in said and "4" in said
    assert "truncate_left" in said and "drop" in said and "raise data.max_prompt_tokens" in said
    assert load_prompts(data(save(tmp_path, LONG), max_prompt_tokens=7), GENERATION, tokenizer).dropped == 0


def test_overlong_dropped(tmp_path, tokenizer):
    prompts = load_prompts(data(save(tmp_path, LONG), max_prompt_tokens=4, overlong="drop"), GENERATION, tokenizer)
    assert [record.text for record in prompts.records] == ["a b", "c"]
    assert (prompts.dropped, prompts.truncated) == (2, 0)
    assert "none of the 4" in problem(save(tmp_path, LONG), tokenizer, max_prompt_tokens=1, overlong="drop")


def test_overlong_truncated_keeps_the_end_and_the_bos(tmp_path, tokenizer):
    changes = {"max_prompt_tokens": 4, "overlong": "truncate_left"}
    prompts = load_prompts(data(save(tmp_path, LONG), **changes), GENERATION, tokenizer)
    assert [words(record) for record in prompts.records][1] == ["<s>", "d", "e", "f"]
    assert prompts.records[1].text == "d e f"
    assert prompts.records[0].text == "a b"
    assert (prompts.dropped, prompts.truncated) == (0, 2)
    without_bos = load_prompts(data(save(tmp_path, LONG), **changes), GENERATION, make_tokenizer(None))
    assert words(without_bos.records[1]) == ["c", "d", "e", "f"]
    shortest = load_prompts(
        data(save(tmp_path, LONG), max_prompt_tokens=1, overlong="truncate_left"), GENERATION, tokenizer
    )
    assert all(len(record.ids) == 1 for record in shortest.records)


# ---- limits on responses

LIMITED = [{"prompt": "a b c d e", "most": 5}, {"prompt": "b", "most": 48}, {"prompt": "c", "most": 1}]


def limits(prompts) -> list[int]:
    return [record.max_new_tokens for record in prompts.records]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "csv with a gap"])
def test_a_column_limits_each_response(tmp_path, tokenizer, kind):
    if kind == "jsonl":
        file, column = save(tmp_path, LIMITED), "most"
    else:
        file, column = tmp_path / "prompts.csv", "most"
        gap = "d,\n" if kind == "csv with a gap" else ""
        file.write_text("prompt,most\n" + "".join(f"{row['prompt']},{row['most']}\n" for row in LIMITED) + gap)
        if gap:  # pandas makes floats of such a column; the row that lacks a number is the one to be named
            said = problem(file, tokenizer, max_new_tokens_column=column)
            assert "row 4: column 'most'" in said and "more rows" not in said
            return
    assert limits(load_prompts(data(file), GENERATION, tokenizer)) == [48] * 3
    limited = load_prompts(data(file, max_new_tokens_column=column), GENERATION, tokenizer)
    assert limits(limited) == [5, 48, 1] and limited.records[0].columns == {"most": 5}
    short = data(file, max_new_tokens_column=column, max_prompt_tokens=3, overlong="truncate_left")
    assert limits(load_prompts(short, GENERATION, tokenizer)) == [5, 48, 1]
    dropped = data(file, max_new_tokens_column=column, max_prompt_tokens=3, overlong="drop")
    assert limits(load_prompts(dropped, GENERATION, tokenizer)) == [48, 1]


@pytest.mark.parametrize("value", [0, 49, -1, 2.5, True, "7", None, [3], float("nan"), float("inf")])
def test_a_limit_that_is_none_names_file_line_and_bounds(tmp_path, tokenizer, value):
    said = problem(save(tmp_path, [*LIMITED, {"prompt": "d", "most": value}]), tokenizer, max_new_tokens_column="most")
    assert "line 4: column 'most' should hold a whole number from 1 to generation.max_new_tokens 48" in said
    assert f"got {value!r}; mend or remove" in said


def test_a_limit_below_the_minimum_is_refused(tmp_path, tokenizer):
    """Its response could never end."""
    file, least = save(tmp_path, LIMITED), GenerationConfig(max_new_tokens=48, min_new_tokens=2)
    with pytest.raises(RecipeError, match=r"line 3: column 'most' .* from generation.min_new_tokens 2 to .* got 1;"):
        load_prompts(data(file, max_new_tokens_column="most"), least, tokenizer)


def test_a_missing_limit_column_lists_those_that_exist(tmp_path, tokenizer):
    said = problem(save(tmp_path, LIMITED), tokenizer, max_new_tokens_column="limit")
    assert "no column 'limit'; it has prompt, most; set data.max_new_tokens_column to one of them" in said
    file = save(tmp_path, [*LIMITED, {"prompt": "d"}])
    assert "line 4: column 'most'" in problem(file, tokenizer, max_new_tokens_column="most")


# ---- the cursor


def make_source(count=7, seed=3, per_iteration=4, samples=1) -> PromptSource:
    rng = np.random.default_rng(0)
    records = tuple(
        PromptRecord(tuple(range(1, 2 + int(rng.integers(1, 6)))), f"prompt {i}", {"index": i}, max_new_tokens=i + 1)
        for i in range(count)
    )
    return PromptSource(PromptSet(records, pad_id=0), seed, per_iteration, samples)


def whole(source, iteration, world_size=1):
    return [source.batch(iteration, rank, world_size) for rank in range(world_size)]


def test_each_epoch_is_a_permutation_and_draws_never_repeat():
    source = make_source(count=7, per_iteration=4)
    indices, draws = [], []
    for iteration in range(14):  # 8 epochs, most iterations straddling none or one border
        batch = source.batch(iteration)
        indices += [columns["index"] for columns in batch.columns]
        draws += batch.draws.tolist()
    assert draws == list(range(56))
    epochs = [tuple(indices[start : start + 7]) for start in range(0, 56, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(epochs)) > 4, "epochs come in the same order"


def test_an_iteration_larger_than_the_dataset():
    batch = make_source(count=3, per_iteration=8).batch(2)
    assert batch.draws.tolist() == list(range(16, 24))
    counts = Counter(columns["index"] for columns in batch.columns)
    # Draws 16..23 are positions 1, 2 of epoch 5, epoch 6 and 7 whole: each record two or three times.
    assert len(batch) == 8 and set(counts.values()) <= {2, 3}


def test_pure_function_of_seed_and_iteration():
    first, again, other = make_source(seed=3), make_source(seed=3), make_source(seed=4)
    again.batch(11)  # what was asked before doesn't matter
    orders = [[source.batch(i).texts for i in range(6)] for source in (first, again, other)]
    assert orders[0] == orders[1] and orders[0] != orders[2]


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 16])
def test_ranks_share_the_same_rows_whatever_their_number(samples, world_size):
    source = make_source(per_iteration=4, samples=samples)
    (one,) = whole(source, 5)
    parts = whole(source, 5, world_size)
    assert sum((part.texts for part in parts), ()) == one.texts
    for name in ("prompt_ids", "prompt_lengths", "draws", "samples", "max_new_tokens"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(one, name)), name
    assert [len(part) for part in parts] == [len(rows) for rows in np.array_split(np.arange(4 * samples), world_size)]
    assert all(part.prompt_ids.dtype == torch.int64 and part.prompt_ids.shape[1] >= 1 for part in parts)


def test_samples_of_a_prompt_are_neighbours():
    batch = make_source(per_iteration=2, samples=3).batch(1)
    assert batch.draws.tolist() == [2, 2, 2, 3, 3, 3]
    assert batch.samples.tolist() == [0, 1, 2, 0, 1, 2]
    assert batch.texts[0] == batch.texts[1] == batch.texts[2] != batch.texts[3]


def test_padding_is_on_the_left_to_the_longest_of_all_ranks():
    source = make_source(count=9, per_iteration=6)
    for part in whole(source, 3, 4):
        longest = max(len(source.prompts.records[c["index"]].ids) for c in source.batch(3).columns)
        assert part.prompt_ids.shape[1] == longest
        for row in range(len(part)):
            ids = source.prompts.records[part.columns[row]["index"]].ids
            assert part.prompt_ids[row].tolist() == [0] * (longest - len(ids)) + list(ids)
            assert part.prompt_lengths[row] == len(ids)
            assert part.max_new_tokens[row] == part.columns[row]["index"] + 1
            assert part.prompt_mask[row].sum() == len(ids)


def test_a_rank_without_rows():
    batch = make_source(per_iteration=2).batch(0, rank=3, world_size=4)
    assert batch.prompt_ids.shape[0] == 0 and batch.prompt_ids.shape[1] >= 1
    assert batch.texts == () and batch.prompt_mask.shape == batch.prompt_ids.shape


def test_head_takes_the_datasets_order():
    source = make_source(count=7, samples=3)
    parts = [source.head(5, rank, 2) for rank in range(2)]
    assert sum((part.texts for part in parts), ()) == tuple(f"prompt {i}" for i in range(5))
    assert torch.cat([part.draws for part in parts]).tolist() == list(range(5))
    assert torch.cat([part.samples for part in parts]).tolist() == [0] * 5
    assert len(source.head(100)) == 7


def test_permutations_are_uniform_enough():
    """Every record opens an epoch equally often: 700 epochs of 7, within 5 standard deviations of 100."""
    source = make_source(count=7, per_iteration=7)
    opens = Counter(int(re.search(r"\d+", source.batch(i).texts[0])[0]) for i in range(700))
    assert all(abs(opens[i] - 100) < 5 * np.sqrt(100 * 6 / 7) for i in range(7))
