"""Tokens to text and back: streamed text equals whole text, and models' own conventions are kept."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE, WordLevel

from d2o_server.engine.types import ChatMessage
from d2o_server.errors import InvalidRequest, StartupError
from d2o_server.models.presets import END_OF_TURN_ID, SPECIAL_TOKENS
from d2o_server.tokenizer import Tokenizer

_BUILT_IN = Tokenizer.built_in(512)
_SPECIAL = {"<s>": 0, "</s>": 1, "<unk>": 2}


def _sentencepiece() -> FastTokenizer:
    """Laid out like Llama 2's: meta spaces, byte fallback, and a BOS from the template."""
    vocabulary = _SPECIAL | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ("\u2581", "a", "b", "\u2581a", "\u2581b", "ab", "\u2581ab"):
        vocabulary[piece] = len(vocabulary)
    merges = [("\u2581", "a"), ("\u2581", "b"), ("a", "b"), ("\u2581a", "b")]
    fast = FastTokenizer(BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL])
    return fast


def _byte_level() -> FastTokenizer:
    """Laid out like GPT-2's, with an added token that is ordinary text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "\u00c3\u00a9", "\u00e2\u0124"])}
    fast = FastTokenizer(BPE(vocab=vocabulary, merges=[("\u00c3", "\u00a9"), ("\u00e2", "\u0124")]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken("<end>", special=True)])
    fast.add_tokens(["\u65e5\u672c"])
    return fast


_SENTENCEPIECE = _sentencepiece()
_BYTE_LEVEL = _byte_level()


def _folder(path: Path, fast: FastTokenizer, **settings: Any) -> Path:
    fast.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def _streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = tokenizer.detokenizer()
    return [*(detokenizer.push([token_id]) for token_id in ids), detokenizer.finish()]


@given(text=st.text(max_size=30))
def test_streamed_pieces_of_a_text_never_hold_half_a_character(text: str) -> None:
    for tokenizer in (_BUILT_IN, Tokenizer(_byte_level())):
        pieces = _streamed(tokenizer, tokenizer.encode(text))
        assert "".join(pieces) == text
        assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


@given(ids=st.lists(st.integers(0, 260), max_size=30))
def test_streamed_text_of_any_byte_level_tokens_is_the_librarys_whole_text(ids: list[int]) -> None:
    assert "".join(_streamed(Tokenizer(_BYTE_LEVEL), ids)) == _BYTE_LEVEL.decode(ids, skip_special_tokens=True)


@given(text=st.text(alphabet="ab \u00e9\u20ac\U0001f600", max_size=20), cut=st.integers(0, 60))
def test_streamed_sentencepiece_text_continues_the_prompt(text: str, cut: int) -> None:
    ids = _SENTENCEPIECE.encode("a" + text).ids
    cut = min(cut, len(ids))
    tokenizer = Tokenizer(_SENTENCEPIECE)
    whole = " " + _SENTENCEPIECE.decode(ids)
    detokenizer = tokenizer.detokenizer()
    before = detokenizer.push(ids[:cut])
    assert before + "".join(detokenizer.push([token_id]) for token_id in ids[cut:]) + detokenizer.finish() == whole
    assert "\ufffd" not in before


def test_a_words_leading_space_is_kept_in_mid_text() -> None:
    tokenizer = Tokenizer(_SENTENCEPIECE)
    word = _SENTENCEPIECE.token_to_id("\u2581ab")
    assert word is not None
    assert _streamed(tokenizer, [word, word]) == [" ab", " ab", ""]
    assert tokenizer.token_text(word) == " ab"


def test_a_character_appears_with_its_last_byte() -> None:
    assert _streamed(_BUILT_IN, list("\u20ac!".encode())) == ["", "", "\u20ac", "!", ""]


def test_bytes_that_never_become_a_character_do_not_hold_back_the_rest() -> None:
    assert _streamed(_BUILT_IN, [0xE2, 0xFF, 0x41, 0xE2]) == ["", "\ufffd\ufffd", "A", "", "\ufffd"]


def test_special_tokens_and_unknown_ids_have_no_text() -> None:
    assert _BUILT_IN.decode([65, END_OF_TURN_ID, 99_999, 66]) == "AB"
    assert _BUILT_IN.token_text(END_OF_TURN_ID) == "<|im_end|>"


def test_ordinary_added_tokens_keep_their_text() -> None:
    tokenizer = Tokenizer(_BYTE_LEVEL)
    assert tokenizer.decode(tokenizer.encode("\u65e5\u672c!<end>")) == "\u65e5\u672c!"


def test_every_id_of_a_random_models_vocabulary_has_text() -> None:
    silent = [i for i in range(512) if not _BUILT_IN.token_text(i)]
    assert _BUILT_IN.vocabulary_size == 512
    assert silent == []


def test_a_chat_is_rendered_with_special_tokens_as_single_ids() -> None:
    ids = _BUILT_IN.render_chat([ChatMessage("user", "hi")])
    assert [i for i in ids if i >= 256] == [
        SPECIAL_TOKENS["<|im_start|>"],
        SPECIAL_TOKENS["<|im_end|>"],
        SPECIAL_TOKENS["<|im_start|>"],
    ]
    assert _BUILT_IN.decode(ids) == "user\nhi\nassistant\n"


def test_chats_rendered_at_once_in_many_threads_do_not_mix() -> None:
    chats = [[ChatMessage("user", f"number {i} " * 20)] for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(_BUILT_IN.render_chat, chats)) == [_BUILT_IN.render_chat(chat) for chat in chats]


@pytest.mark.parametrize(("make", "bos"), [(_sentencepiece, "<s>"), (_byte_level, "<end>"), (_byte_level, "!")])
def test_ids_are_those_of_transformers_own_tokenizer(
    tmp_path: Path, make: Callable[[], FastTokenizer], bos: str
) -> None:
    template = (
        "{%- for m in messages -%}\n{{ bos_token }}{{ m['role'] | upper }}: {{ m['content'] | tojson }}\n"
        "{% if loop.last %}{% break %}{% endif %}{%- endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    folder = _folder(tmp_path, make(), tokenizer_class="PreTrainedTokenizerFast", bos_token=bos)
    (folder / "chat_template.jinja").write_text(template)
    ours, theirs = Tokenizer.from_folder(folder), transformers.AutoTokenizer.from_pretrained(str(folder))
    chat = [{"role": "user", "content": "a <b> 'c' \u00e9"}, {"role": "assistant", "content": "ab"}]
    expected = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ours.render_chat([ChatMessage(**turn) for turn in chat]) == expected
    assert ours.encode("ab a\u20ac") == theirs("ab a\u20ac")["input_ids"]


@pytest.mark.parametrize(("wanted", "expected"), [(None, [0]), (True, [0]), (False, [])])
def test_the_folders_word_on_bos_wins_over_the_tokenizers(
    tmp_path: Path, wanted: bool | None, expected: list[int]
) -> None:
    settings = {"bos_token": {"content": "<s>"}} | ({} if wanted is None else {"add_bos_token": wanted})
    tokenizer = Tokenizer.from_folder(_folder(tmp_path, _sentencepiece(), **settings))
    assert [i for i in tokenizer.encode("ab") if i == 0] == expected


def test_end_of_text_ids_are_gathered_from_every_file_that_names_them(tmp_path: Path) -> None:
    folder = _folder(tmp_path, _sentencepiece(), eos_token="</s>")
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    assert Tokenizer.from_folder(folder).end_of_text_ids == (5, 7, 1)


def test_chat_without_a_template_is_refused(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(_folder(tmp_path, _byte_level()))
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match="no chat template"):
        tokenizer.render_chat([ChatMessage("user", "hi")])


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles must alternate') }}", "{{ messages[0].content + 1 }}", "{{ ''.__class__ }}{{ x() }}"],
)
def test_a_template_that_does_not_accept_the_conversation_names_the_field(template: str) -> None:
    tokenizer = Tokenizer(_byte_level(), chat_template=template)
    with pytest.raises(InvalidRequest, match=r"prompt\.chat\.messages"):
        tokenizer.render_chat([ChatMessage("user", "hi")])


def test_a_template_cannot_leave_its_sandbox() -> None:
    tokenizer = Tokenizer(_byte_level(), chat_template="{{ messages.__class__.__mro__ }}{{ messages.append(1) }}")
    with pytest.raises(InvalidRequest, match="unsafe"):
        tokenizer.render_chat([ChatMessage("user", "hi")])


def test_an_empty_conversation_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="at least one message"):
        _BUILT_IN.render_chat([])


def test_a_broken_template_stops_the_start() -> None:
    with pytest.raises(StartupError, match="not valid Jinja"):
        Tokenizer(_byte_level(), chat_template="{% for %}")


def test_a_decoder_that_cannot_be_streamed_stops_the_start() -> None:
    fast = FastTokenizer(WordLevel({"a": 0}, unk_token="a"))
    fast.decoder = decoders.WordPiece()
    with pytest.raises(StartupError, match="WordPiece"):
        Tokenizer(fast)


def test_a_damaged_tokenizer_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(StartupError, match=str(tmp_path)):
        Tokenizer.from_folder(tmp_path)


def test_a_tokenizer_starts_without_torch_and_transformers() -> None:
    program = (
        "import sys; from d2o_server.tokenizer import Tokenizer; Tokenizer.built_in(512).encode('a'); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
