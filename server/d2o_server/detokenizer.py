"""Text from tokens as they come, without ever sending half a character."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable
from functools import cache
from typing import Any

from tokenizers import Tokenizer as FastTokenizer

from d2o_server.errors import StartupError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """The bytes that each token stands for in running text; special tokens stand for none.

    Knows the two ways in which language models spell bytes: byte-level alphabets (GPT-2 and its heirs) and
    SentencePiece pieces with byte fallback, whose words begin with a meta space.

    Raises:
        StartupError: the tokenizer's decoder is neither.
    """

    def __init__(self, tokenizer: FastTokenizer, special_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._special_ids = special_ids
        self._cache: dict[int, bytes] = {}
        kinds = _decoder_kinds(tokenizer)
        self._byte_level = "ByteLevel" in kinds
        if not self._byte_level and not kinds & {"Metaspace", "ByteFallback"}:
            found = ", ".join(sorted(kinds)) or "none"
            raise StartupError(f"tokenizer: its decoder is {found}, allowed are ByteLevel, Metaspace and ByteFallback")

    def of(self, token_id: int, *, keep_special: bool = False) -> bytes:
        """The token's bytes; an id that the tokenizer does not know has none."""
        if token_id in self._special_ids and not keep_special:
            return b""
        known = self._cache.get(token_id)
        if known is None:
            known = self._cache[token_id] = self._spell(token_id)
        return known

    def _spell(self, token_id: int) -> bytes:
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self._byte_level:
            alphabet = byte_alphabet()
            if all(character in alphabet for character in token):
                return bytes(alphabet[character] for character in token)
            return token.encode()
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace("\u2581", " ").encode()


class IncrementalDetokenizer:
    """Turns one sequence's tokens into text, each token in time that depends on its own length only.

    A character whose bytes are spread over several tokens appears with its last byte; bytes that can no longer
    become a character appear as U+FFFD. The text continues a prompt, so a word's leading space is kept.
    """

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens complete."""
        return self._decoder.decode(b"".join(self._token_bytes.of(token_id) for token_id in token_ids))

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", final=True)


@cache
def byte_alphabet() -> dict[str, int]:
    """Byte-level tokenizers' alphabet: printable Latin-1 stands for itself, other bytes for U+0100 onwards."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def _decoder_kinds(tokenizer: FastTokenizer) -> set[str]:
    if tokenizer.decoder is None:
        return set()
    state: dict[str, Any] = json.loads(tokenizer.decoder.__getstate__())
    kinds: set[str] = set()
    for part in state.get("decoders", [state]):
        kinds.add(part["type"])
        # SentencePiece conversions without byte tokens spell the meta space as a plain replacement.
        if part["type"] == "Replace" and part.get("pattern", {}).get("String") == "\u2581":
            kinds.add("Metaspace")
    return kinds
