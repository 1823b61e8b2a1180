"""Answers to a person's prompts by what a run has trained, in plain transformers and peft: no ranks, no DeepSpeed."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, TextStreamer

from engine import models
from engine.command_line import parse
from engine.errors import RecipeError


class Chat:
    """The policy of a finished run, or of an export (`--what actor` or `merged`).

    Args:
        place: a run's folder or an export's.
        base: answer as the policy did before training.
        trust_remote_code: run code that the model's own folder brings, where the recipe asks for it.

    Raises:
        RecipeError: there is no policy in that folder, nothing to compare it with, or it wants to run code of its own.
    """

    def __init__(self, place: Path, base: bool = False, trust_remote_code: bool = False):
        if not (place / "recipe.yaml").is_file():
            raise RecipeError(f"{place} is neither a run's folder nor an export's; name one that has a recipe.yaml")
        self.recipe = parse([str(place / "recipe.yaml")]).model_copy(update={"output": None, "resume": None})
        if self.recipe.model.trust_remote_code and not trust_remote_code:  # the folder may be a stranger's
            raise RecipeError(
                f"{place / 'recipe.yaml'} asks to run code that comes with {self.recipe.model.path}; "
                "say --trust-remote-code if you trust that code"
            )
        folder = place / "final" / "actor" if (place / "final").is_dir() else place
        adapter = (folder / "adapter_config.json").is_file()
        if not adapter and not (folder / "config.json").is_file():
            raise RecipeError(
                f"{place} holds no policy: the run has no final/ yet, or the export is another role's; "
                "write one with launch/export.py --what actor"
            )
        if base and not adapter:
            raise RecipeError(
                f"{folder} is a whole model, got --base; its base is {self.recipe.model.path}: chat with that"
            )
        self.tokenizer = models.load_tokenizer(self.recipe.model)
        if adapter:
            self.model = PeftModel.from_pretrained(models.load_plain(self.recipe.model), str(folder))
        else:
            trust = self.recipe.model.trust_remote_code
            self.model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=trust)
        self.without = self.model.disable_adapter if base else nullcontext

    @torch.no_grad()
    def answer(self, prompt: str, max_new_tokens: int | None = None, temperature: float | None = None) -> str:
        """One answer, written to standard output as it comes; what isn't given is the recipe's."""
        settings = self.recipe.generation
        temperature = settings.temperature if temperature is None else temperature
        draws = {"temperature": temperature, "top_k": settings.top_k, "top_p": settings.top_p} if temperature else {}
        ids = self._ids(prompt)
        with self.without():
            found = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens or settings.max_new_tokens,
                do_sample=temperature > 0,
                eos_token_id=list(models.end_token_ids(self.tokenizer, self.model, settings.end_tokens)),
                pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
                streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
                **draws,
            )
        return self.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)

    def _ids(self, prompt: str) -> torch.Tensor:
        """`[1, L]`: as a message where the run's prompts were messages."""
        if self.recipe.data.messages_column is None:
            return self.tokenizer(prompt, return_tensors="pt").input_ids
        messages = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids
