"""What a reward model reads whose tokenizer is not the policy's: the text again, in its own tokens.

Text is text. Where it spells a special token of the reward's tokenizer, that token is read, whoever wrote it; a special
token of the policy that a prompt spells (a rendered chat in a text column) is so many ordinary characters here, unless
the reward's tokenizer has a token of that name. Chats are better given as messages: data.messages_column.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
PROBE = "alternatorprobe"  # stands for a response where a template is asked what it writes after one


def other_tokenizer(
    path: str, policy: PreTrainedTokenizerBase, chat: bool, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the reward model at `path`, if it is another one than the policy's.

    None, and the model takes the policy's ids, where it has no tokenizer, or one with the same vocabulary, BOS and EOS
    (and for chats the same template, if it has one). Padding plays no role: it is never read.
    """
    if not any(_has_file(path, name) for name in TOKENIZER_FILES):
        return None  # asked before loading: for some models transformers would make an empty tokenizer up
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    same = (
        tokenizer.get_vocab() == policy.get_vocab()
        and (tokenizer.bos_token_id, tokenizer.eos_token_id) == (policy.bos_token_id, policy.eos_token_id)
        and (not chat or tokenizer.chat_template in (None, policy.chat_template))
    )
    return None if same else tokenizer


class RewardText:
    """Prompt and response as ids of a reward model's own tokenizer.

    Args:
        longest: the model's positions; None: no limit.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, longest: int | None = None):
        self.tokenizer, self.longest = tokenizer, longest

    def plain(self, prompt: str, response: str, ended: bool) -> list[int]:
        """Ids of prompt and response as one text, behind what the tokenizer puts before one; its EOS if `ended`.

        Raises:
            ValueError: the tokenizer fails, or makes no token of them.
        """
        text = prompt + response
        ids = self._encode(text)
        if not ids:
            raise ValueError(f"its tokenizer makes no token of {text!r:.80}")
        # What comes after the text is left out: some tokenizers append an EOS, whether anything ended or not.
        ids = _before(ids, self._encode(text, add_special_tokens=True)) + ids
        begin, end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        while begin is not None and ids[:2] == [begin, begin]:  # the prompt's text may spell one too
            ids = ids[1:]
        return ids + [end] if ended and end is not None and ids[-1] != end else ids

    def chat(self, messages: list[dict], response: str, ended: bool) -> list[int]:
        """Ids of the conversation in the tokenizer's own template: the response's turn is closed only if `ended`.

        Raises:
            ValueError: template or tokenizer fails, or the template leaves the response out.
        """
        text = self._render(messages, response)
        if not ended:
            # transformers' continue_final_message looks for the response in the rendered text, and raises where a
            # template edits it (trims it, takes the thoughts out); what comes after it doesn't depend on it.
            _, found, closing = self._render(messages, PROBE).rpartition(PROBE)
            if not found:
                raise ValueError("its chat template leaves the assistant's message out")
            text = text.removesuffix(closing)
        # The template has written every special token already: the tokenizer adds no second BOS.
        return self._encode(text)

    def fit(self, ids: list[int]) -> list[int]:
        """`ids`, or as many of the last as the model takes: the response is what is judged. A leading BOS stays."""
        if self.longest is None or len(ids) <= self.longest:
            return ids
        begin = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
        return begin + ids[len(ids) - (self.longest - len(begin)) :]

    def _encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        try:
            return self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        except Exception as error:  # a vocabulary of words without one for unknown words raises just that
            raise ValueError(f"its tokenizer failed on {text!r:.80}: {error}") from error

    def _render(self, messages: list[dict], response: str) -> str:
        whole = [*messages, {"role": "assistant", "content": response}]
        try:
            return self.tokenizer.apply_chat_template(whole, tokenize=False)
        except Exception as error:  # a template is a program of the tokenizer's author and can raise anything
            raise ValueError(f"its chat template failed: {error}") from error


def _before(part: list[int], whole: list[int]) -> list[int]:
    """What comes before `part` in `whole`."""
    starts = (i for i in range(len(whole) - len(part) + 1) if whole[i : i + len(part)] == part)
    return whole[: next(starts, 0)]


def _has_file(path: str, name: str) -> bool:
    if Path(path).is_dir():
        return (Path(path) / name).is_file()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        hf_hub_download(path, name)
    except LocalEntryNotFoundError:
        raise  # a kind of the other, and says only that the hub could not be asked
    except EntryNotFoundError:
        return False
    return True
