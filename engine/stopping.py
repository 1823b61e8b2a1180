"""What ends a response: tokens, or strings in its text; and which ids of the model's vocabulary are text at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase


class Stops:
    """What ends a response, and what may not be drawn for one.

    A response ends with an end token, or with the token that completes a stop string in the response's own text,
    special tokens left out: what a reward function reads. Either token is part of the response.

    Args:
        end_ids: the end tokens.
        strings: the stop strings.
        tokenizer: makes text of ids; None where there are no strings and every id may be drawn.
    """

    def __init__(
        self,
        end_ids: Sequence[int],
        strings: Sequence[str] = (),
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        assert all(strings) and (tokenizer is not None or not strings)
        self.end_ids = torch.tensor(end_ids, dtype=torch.int64)
        self.strings = tuple(strings)
        self.tokenizer = tokenizer
        # len() alone is too small for a tokenizer with holes between its ids.
        self._known = None if tokenizer is None else max(len(tokenizer), _largest_id(tokenizer) + 1)
        # A token that shows adds a byte at least. Three more: with byte fallback, the last byte of a character shows
        # what its first three had spoilt.
        self._window = max((len(string.encode()) for string in strings), default=0) + 3
        self._texts: dict[int, str] = {}

    def banned(self, vocabulary: int, early: bool) -> Tensor | None:
        """Ids below `vocabulary` that may not be drawn; None: all may.

        Rows of a padded embedding (Qwen's) that are no token have no text, nor has training ever told them anything.

        Args:
            early: before min_new_tokens; end tokens may not be drawn either.
        """
        surplus = torch.arange(min(self._known or vocabulary, vocabulary), vocabulary)
        banned = torch.cat([surplus[~torch.isin(surplus, self.end_ids)], self.end_ids if early else surplus[:0]])
        return banned if len(banned) else None

    def reached(self, ids: Tensor, checked: int) -> Tensor:
        """`[B]` bool: whether responses end here.

        Args:
            ids: `[B, T]` all tokens of the responses up to now, T at least 1, on the CPU.
            checked: the text of so many tokens from the start is known to hold no stop string.
        """
        ended = torch.isin(ids[:, -1], self.end_ids)
        if self.strings:
            ended |= torch.tensor([self._stopped(row, checked) for row in ids.numpy()], dtype=torch.bool)
        return ended

    def _stopped(self, ids: np.ndarray, checked: int) -> bool:
        start = self._start(ids, checked)
        # A text from the middle can hold what the whole doesn't: WordPiece's "##", a byte that belongs to a character.
        return self._holds(ids[start:]) and (start == 0 or self._holds(ids))

    def _holds(self, ids: np.ndarray) -> bool:
        text = self.tokenizer.decode(ids.tolist(), skip_special_tokens=True)
        return any(string in text for string in self.strings)

    def _start(self, ids: np.ndarray, checked: int) -> int:
        """From which token on to make text, for any string that the tokens from `checked` on complete to be in it."""
        start, missing = checked, self._window
        # Not inside a character either: with byte fallback one broken character spoils all bytes beside it.
        while start > 0 and (missing > 0 or self._text(ids[start]) in ("", "\ufffd")):
            start -= 1
            missing -= bool(self._text(ids[start]).strip())  # cleaning up may take spaces away
        return start

    def _text(self, token: int) -> str:
        """A token's own text, "\ufffd" where it begins or ends inside a character."""
        token = int(token)
        if token not in self._texts:
            text = self.tokenizer.decode([token], skip_special_tokens=True)
            self._texts[token] = "\ufffd" if "\ufffd" in text else text
        return self._texts[token]


def scored_text(text: str, strings: Iterable[str]) -> str:
    """A response's text as reward functions, judges and people get it: up to where the first stop string begins.

    Text alone: a reward model that reads the policy's ids sees the tokens that completed it, as the critic does.
    """
    found = [text.find(string) for string in strings]
    return text[: min((index for index in found if index >= 0), default=None)]


def check_stop_strings(tokenizer: PreTrainedTokenizerBase, strings: Iterable[str]) -> list[str]:
    """Problems of `generation.stop_strings`: one that is empty, or that no response's text can hold."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    problems = []
    for string in strings:
        if not string:
            problems.append("generation.stop_strings: an empty string would end every response at once; remove it")
        for token in special:
            if token in string:
                problems.append(
                    f"generation.stop_strings: {string!r} holds the special token {token!r}, which the text of a "
                    "response leaves out; name the token in generation.end_tokens"
                )
    return problems


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, vocab_size: int, used: Iterable[int] = ()) -> list[str]:
    """Problems of a tokenizer with tokens that the model's embedding has no row for.

    A surplus token that nothing uses is none: Gemma 3 1B comes with one (an image token, transformers#37011).

    Args:
        vocab_size: rows of the model's embedding.
        used: ids that the run will feed to the model, such as those of its prompts.
    """
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    beyond = sorted(index for index in named | set(used) if index >= vocab_size)
    if not beyond:
        return []
    shown = ", ".join(f"{tokenizer.convert_ids_to_tokens(index)!r} ({index})" for index in beyond[:5])
    return [
        f"model.path: the tokenizer's {shown} {'lie' if len(beyond) > 1 else 'lies'} beyond the model's {vocab_size} "
        "embeddings; after adding tokens call model.resize_token_embeddings(len(tokenizer)) and save the model, or "
        "use the tokenizer that it was trained with"
    ]


def _largest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    return max(tokenizer.get_vocab().values(), default=-1)
