"""From rows of text to tokens: the chat template, the labels, and the padding of a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

IGNORED = -100  # The label that the loss leaves out.


@dataclass(frozen=True, slots=True)
class Prompts:
    """How one tokenizer writes a prompt and its answer.

    A prompt goes through the tokenizer's chat template if there is one, else it stands as it is, with a line
    end. Only the answer and the end-of-sequence token that closes it are learnt.
    """

    tokenizer: PreTrainedTokenizerBase
    instruction: str | None
    max_length: int

    def encode(self, row: dict[str, Any]) -> dict[str, list[int]]:
        """Tokenize a row, cut to `max_length`, with the prompt's labels masked."""
        prompt = self.cue_tokens(row["prompt"]) if row["prompt"] else self._start()
        answer = self._tokens(row["completion"]) + [self.tokenizer.eos_token_id]
        tokens = (prompt + answer)[: self.max_length]
        labels = ([IGNORED] * len(prompt) + answer)[: self.max_length]
        return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}

    def encode_all(self, rows: Dataset) -> Dataset:
        """Tokenize a dataset; rows whose prompt alone fills `max_length` teach nothing and are dropped."""
        encoded = rows.map(self.encode, remove_columns=rows.column_names)
        return encoded.filter(lambda row: row["labels"][-1] != IGNORED)

    def question(self, row: dict[str, Any]) -> tuple[str, str]:
        """Return what to show the model and what it should answer: for plain text, its two halves."""
        if row["prompt"]:
            return row["prompt"], row["completion"]
        words = row["completion"].split()
        middle = max(1, len(words) // 2)
        return " ".join(words[:middle]), " ".join(words[middle:])

    def question_tokens(self, row: dict[str, Any]) -> list[int]:
        """Tokenize what `question` shows the model, ready for the answer to follow."""
        if row["prompt"]:
            tokens = self.cue_tokens(row["prompt"])
        else:
            tokens = self._start() + self._tokens(self.question(row)[0])
        return tokens[-self.max_length :]

    def cue_tokens(self, prompt: str) -> list[int]:
        """Tokenize a prompt up to where its answer begins."""
        if self.tokenizer.chat_template:
            # The template writes the special tokens itself, the one at the beginning too.
            return self._tokens(self._chat(prompt))
        lead = f"{self.instruction}\n\n" if self.instruction else ""
        return self._start() + self._tokens(f"{lead}{prompt}\n")

    def _chat(self, prompt: str) -> str:
        user = {"role": "user", "content": prompt}
        if not self.instruction:
            return self._templated([user])
        try:
            return self._templated([{"role": "system", "content": self.instruction}, user])
        except TemplateError:  # Some templates (Gemma's) refuse a system message.
            return self._templated([{"role": "user", "content": f"{self.instruction}\n\n{prompt}"}])

    def _templated(self, messages: list[dict[str, str]]) -> str:
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _start(self) -> list[int]:
        start = self.tokenizer.bos_token_id
        return [] if start is None else [start]


def padding_collator(tokenizer: PreTrainedTokenizerBase) -> DataCollatorForSeq2Seq:
    """Return a collator that pads a batch to its own longest row, and the labels with `IGNORED`."""
    return DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=IGNORED)
