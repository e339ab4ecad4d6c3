"""Text to token ids and back, quick to start: no torch, and transformers only for folders without tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE

from d2o_server.chat import ChatTemplate
from d2o_server.detokenizer import IncrementalDetokenizer, TokenBytes, byte_alphabet
from d2o_server.engine.types import ChatMessage
from d2o_server.errors import InvalidRequest, StartupError
from d2o_server.models.presets import END_OF_TURN_ID, SPECIAL_TOKENS

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_BUILT_IN_TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


class Tokenizer:
    """A model's tokenizer, chat template and end-of-text ids. Every method is safe from several threads at once."""

    def __init__(
        self,
        fast: FastTokenizer,
        *,
        end_of_text_ids: Sequence[int] = (),
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
        adds: Mapping[str, bool] | None = None,
    ) -> None:
        """Wraps a fast tokenizer.

        Args:
            fast: padding and truncation, where configured, are switched off.
            end_of_text_ids: tokens that end an answer.
            chat_template: Jinja source.
            special_tokens: the template's variables, such as ``{"bos_token": "<s>"}``.
            adds: ``bos_token`` and ``eos_token``: whether raw text gets that token; absent: as ``fast`` does it.
        """
        fast.no_padding()
        fast.no_truncation()
        self._fast = fast
        self.end_of_text_ids = tuple(end_of_text_ids)
        self.special_ids = frozenset(i for i, token in fast.get_added_tokens_decoder().items() if token.special)
        self.vocabulary_size = fast.get_vocab_size(with_added_tokens=True)
        self._token_bytes = TokenBytes(fast, self.special_ids)
        names = special_tokens or {}
        self._chat = None if chat_template is None else ChatTemplate(chat_template, names)
        self._prefix, self._suffix = _added_around(fast, names, adds or {})

    @classmethod
    def from_folder(cls, folder: Path) -> Tokenizer:
        """The tokenizer of a Hugging Face model folder.

        Raises:
            StartupError: the folder has no usable tokenizer.
        """
        settings = _read_json(folder / "tokenizer_config.json")
        special_tokens = {name: text for name in _SPECIAL_NAMES if (text := _text(settings, name))}
        fast = _load_fast(folder)
        # A named special token that the vocabulary spells as an ordinary one is special all the same.
        fast.add_special_tokens([text for text in special_tokens.values() if fast.token_to_id(text) is not None])
        end_ids = list(end_of_text_ids(folder))
        eos = fast.token_to_id(special_tokens.get("eos_token", ""))
        if eos is not None and eos not in end_ids:
            end_ids.append(eos)
        adds = {
            token: settings[field]
            for token, field in (("bos_token", "add_bos_token"), ("eos_token", "add_eos_token"))
            if isinstance(settings.get(field), bool)
        }
        return cls(
            fast,
            end_of_text_ids=end_ids,
            chat_template=_find_chat_template(folder, settings),
            special_tokens=special_tokens,
            adds=adds,
        )

    @classmethod
    def built_in(cls, vocabulary_size: int) -> Tokenizer:
        """The tokenizer of random models: 256 bytes, three special tokens, and filler words up to the vocabulary."""
        vocabulary = dict(byte_alphabet()) | SPECIAL_TOKENS
        vocabulary |= {f"\u0120w{i}": i for i in range(len(vocabulary), vocabulary_size)}
        fast = FastTokenizer(BPE(vocab=vocabulary, merges=[]))
        fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        fast.decoder = decoders.ByteLevel()
        fast.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
        names = {"eos_token": "<|im_end|>"}
        return cls(fast, end_of_text_ids=(END_OF_TURN_ID,), chat_template=_BUILT_IN_TEMPLATE, special_tokens=names)

    @property
    def has_chat_template(self) -> bool:
        return self._chat is not None

    @property
    def prefix(self) -> tuple[int, ...]:
        """The special tokens that the model wants before a text."""
        return tuple(self._prefix)

    def encode(self, text: str) -> list[int]:
        """Token ids of raw text, with the special tokens that the model wants around it."""
        return [*self._prefix, *self.encode_part(text), *self._suffix]

    def encode_part(self, text: str) -> list[int]:
        """Token ids of what stands within a text, and nothing around them."""
        return self._fast.encode(text, add_special_tokens=False).ids

    def render_chat(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Token ids of a conversation up to where the assistant's answer begins.

        Raises:
            InvalidRequest: the model has no chat template, or the template does not accept these messages.
        """
        if self._chat is None:
            raise InvalidRequest("prompt.chat", "chat messages", "text or tokens: the model has no chat template")
        return self._fast.encode(self._chat.render(messages), add_special_tokens=False).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of running tokens, special tokens skipped."""
        detokenizer = self.detokenizer()
        return detokenizer.push(token_ids) + detokenizer.finish()

    def token_text(self, token_id: int) -> str:
        """One token's own text, special tokens included; U+FFFD stands for a part of a character."""
        return self._token_bytes.of(token_id, keep_special=True).decode(errors="replace")

    def detokenizer(self) -> IncrementalDetokenizer:
        """A fresh detokenizer for one sequence."""
        return IncrementalDetokenizer(self._token_bytes)


def end_of_text_ids(folder: Path) -> tuple[int, ...]:
    """The end-of-text ids that a model folder's generation_config.json and config.json name, without repeats."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        settings = _read_json(folder / name)
        given = settings.get("eos_token_id", settings.get("text_config", {}).get("eos_token_id"))
        found += [i for i in (given if isinstance(given, list) else [given]) if i is not None and i not in found]
    return tuple(found)


def _load_fast(folder: Path) -> FastTokenizer:
    file = folder / "tokenizer.json"
    try:
        if file.is_file():
            return FastTokenizer.from_file(str(file))
        # Importing transformers takes a second; only folders in the older formats pay for it.
        from transformers import AutoTokenizer

        slow_or_fast = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception
        raise StartupError(f"model: the tokenizer in {folder} cannot be read: {error}") from error
    backend = getattr(slow_or_fast, "backend_tokenizer", None)
    if not isinstance(backend, FastTokenizer):
        raise StartupError(f"model: {folder} has no tokenizer.json, and none can be made from the files that are there")
    return backend


def _added_around(
    fast: FastTokenizer, names: Mapping[str, str], adds: Mapping[str, bool]
) -> tuple[list[int], list[int]]:
    """The ids that go before and after raw text."""
    plain = fast.encode("a", add_special_tokens=False).ids
    whole = fast.encode("a", add_special_tokens=True).ids
    start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    around = {"bos_token": whole[:start], "eos_token": whole[start + len(plain) :]}
    for token, wanted in adds.items():
        token_id = fast.token_to_id(names.get(token, ""))
        if not wanted:
            around[token] = []
        elif not around[token] and token_id is not None:
            around[token] = [token_id]
    return around["bos_token"], around["eos_token"]


def _find_chat_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    given = settings.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(given, list):
        given = {entry["name"]: entry["template"] for entry in given}.get("default")
    return given if isinstance(given, str) else None


def _text(settings: Mapping[str, Any], name: str) -> str | None:
    """A special token's text, which is spelled as a string or as an object."""
    given = settings.get(name)
    content = given.get("content") if isinstance(given, dict) else given
    return content if isinstance(content, str) else None


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StartupError(f"model: {file} is not valid JSON: {error}") from error
    return content
