"""GGUF to a Hugging Face folder with safetensors, once, so that every later start only maps a file.

Weights are kept in float32, which holds every dequantised value of the file exactly. Measured on
SmolLM2-135M-Instruct.Q4_1 (1,024 tokens): storing bfloat16 costs KL 6.6e-5 against it when computing in float32
(largest change of a log probability 0.17), float16 4.8e-6; loading the float32 file takes 1.3 s as float32 and
0.13 s as bfloat16.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from d2o_server.errors import ModelUnsupported, StartupError

Report = Callable[[str], None]


def convert_gguf(file: Path, target: Path, report: Report) -> None:
    """Writes the model in ``file`` to the empty folder ``target``: configuration, weights, tokenizer, chat template.

    Raises:
        ModelUnsupported: transformers cannot read this GGUF, or would read it wrongly.
        StartupError: the file is damaged.
    """
    started = time.monotonic()
    report(f"{file.stem}: converting to safetensors, once")
    reader = _read(file)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    where = {"gguf_file": file.name, "local_files_only": True}
    try:
        # transformers draws progress bars here that no setting turns off.
        with contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **where)
            _correct(tokenizer, reader)
            tokenizer.save_pretrained(str(target))
            model = AutoModelForCausalLM.from_pretrained(str(file.parent), dtype=torch.float32, **where, **_dense())
            model.save_pretrained(str(target))
    except (ValueError, KeyError, NotImplementedError, OSError) as error:
        raise ModelUnsupported(f"model: transformers cannot convert {file.name}: {error}") from error
    report(f"{file.stem}: ready after {time.monotonic() - started:.0f} s")


def _read(file: Path) -> gguf.GGUFReader:
    """Opens the file, unless transformers would read it wrongly."""
    try:
        reader = gguf.GGUFReader(file)
    except (ValueError, OSError, IndexError) as error:
        raise StartupError(f"model: {file} is not a readable GGUF file: {error}") from error
    if any(tensor.name.startswith("rope_f") for tensor in reader.tensors):
        raise ModelUnsupported(
            f"model: {file.name} carries RoPE frequency factors, which transformers ignores in GGUF files; pass the "
            "original Hugging Face folder or hub id"
        )
    return reader


def _correct(tokenizer: transformers.PreTrainedTokenizerBase, reader: gguf.GGUFReader) -> None:
    """Restores what transformers leaves out or, in some versions, mistakes."""
    for name in ("bos", "eos"):
        token_id = reader.get_field(f"tokenizer.ggml.{name}_token_id")
        if token_id is not None:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(int(token_id.contents())))
    rule = reader.get_field("tokenizer.ggml.pre")
    if rule is not None and rule.contents() == "smollm":
        # Each digit is a word of its own, so that spaces before one stay together.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )


def _dense() -> dict[str, object]:
    """Asks for plain weights: from 5.23 on transformers would keep them packed; before, it knew nothing else."""
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}
