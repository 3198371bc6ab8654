"""Prompts to token ids, as Wan's text encoder was trained on them: cleaned, ended by </s>, padded.

Source: `wan/modules/tokenizers.py` (HuggingfaceTokenizer with clean="whitespace").
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int

from turbojax.errors import UserError

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"
TEXT_LEN = 512  # Wan's


def clean(text: str) -> str:
    """Mend broken Unicode, undo HTML escapes, and make every run of white space one blank."""
    import ftfy  # slow to import, and a command line that only prints its help need not wait for it
    import regex

    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return regex.sub(r"\s+", " ", text).strip()


class Tokenizer:
    """A `tokenizers.Tokenizer` that knows Wan's conventions.

    Args:
        backend: holds the tokens <pad> and </s>; its own padding, truncation and special tokens are not used.
        text_len: ids per prompt, </s> and padding included.
    """

    def __init__(self, backend: tokenizers.Tokenizer, text_len: int = TEXT_LEN):
        if text_len < 1:
            raise UserError(f"text_len must be at least 1 (</s> itself), got {text_len}")
        self.backend = backend
        self.text_len = text_len
        self.pad_id = self._special(PAD)
        self.eos_id = self._special(EOS)
        backend.no_padding()
        backend.no_truncation()

    @classmethod
    def load(cls, path: str | Path, text_len: int = TEXT_LEN) -> Tokenizer:
        """Read `tokenizer.json`, or the one in the folder `path`. Raises UserError if there is none."""
        file = Path(path)
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise UserError(f"no tokenizer at {file}: name a tokenizer.json or the folder that holds one")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for every malformed file
            raise UserError(f"{file} is not a tokenizer.json: {error}") from error
        return cls(backend, text_len)

    def save(self, path: str | Path) -> None:
        """Write PATH/tokenizer.json, making the folder."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / "tokenizer.json.partial"
        partial.write_text(self.backend.to_str(pretty=True) + "\n", encoding="utf-8")
        partial.replace(folder / "tokenizer.json")

    @property
    def vocab_size(self) -> int:
        """Rows that an embedding table needs."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def check_fits(self, text_encoder: Any) -> None:
        """Raise UserError if the embedding table of that config lacks rows for some ids: JAX would clamp them."""
        if self.vocab_size > text_encoder.vocab_size:
            raise UserError(
                f"the tokenizer has {self.vocab_size} tokens, the text encoder's embedding {text_encoder.vocab_size}: "
                "they belong to different models"
            )

    def __call__(
        self, prompts: str | Sequence[str]
    ) -> tuple[Int[np.ndarray, "B {self.text_len}"], Int[np.ndarray, "B {self.text_len}"]]:
        """(ids, mask), int32 [B, text_len]: mask is 1 on the prompt and its </s>, 0 on padding.

        A prompt past text_len - 1 tokens loses its end, never its </s>.
        """
        texts = [clean(text) for text in ([prompts] if isinstance(prompts, str) else prompts)]
        ids = np.full((len(texts), self.text_len), self.pad_id, np.int32)
        mask = np.zeros_like(ids)
        for row, encoding in enumerate(self.backend.encode_batch(texts, add_special_tokens=False)):
            tokens = [*encoding.ids[: self.text_len - 1], self.eos_id]
            ids[row, : len(tokens)] = tokens
            mask[row, : len(tokens)] = 1
        return ids, mask

    def unknown(self, prompt: str) -> list[str]:
        """The pieces of a prompt that the vocabulary lacks, as written: a small model never saw them."""
        text = clean(prompt)
        unk_id = self.backend.token_to_id(UNK)
        encoding = self.backend.encode(text, add_special_tokens=False)
        pairs = zip(encoding.ids, encoding.offsets, strict=True)
        return [text[start:end] for token, (start, end) in pairs if token == unk_id]

    def _special(self, token: str) -> int:
        found = self.backend.token_to_id(token)
        if found is None:
            raise UserError(f"this tokenizer has no {token} token: it is not one of umT5's kind")
        return found


def train_tiny_tokenizer(texts: Iterable[str], text_len: int = 32) -> Tokenizer:
    """A tokenizer of whole words for the small model: ids 0 <pad>, 1 </s>, 2 <unk>, then each word of `texts`
    in the order of its first appearance (so that words added later leave the ids of the others alone).

    Case and punctuation are dropped, and every other word is <unk>.
    """
    from tokenizers import Regex, models, normalizers, pre_tokenizers

    backend = tokenizers.Tokenizer(models.WordLevel({PAD: 0, EOS: 1, UNK: 2}, unk_token=UNK))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(r"[^\p{L}\p{N}]"), " ")]
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    vocabulary = {PAD: 0, EOS: 1, UNK: 2}
    for text in texts:
        for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(clean(text))):
            vocabulary.setdefault(word, len(vocabulary))
    backend.model = models.WordLevel(vocabulary, unk_token=UNK)
    backend.add_special_tokens([PAD, EOS, UNK])
    return Tokenizer(backend, text_len)
