"""The commands ``generate``, ``info`` and ``load``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from types import MappingProxyType

from d2o_client._cli._arguments import connect, generation_options
from d2o_client._cli._chat import run_chat
from d2o_client._cli._output import print_answer, print_json
from d2o_client._cli._top import run_top
from d2o_client._errors import InvalidArgumentError
from d2o_client._options import ChatMessage, Compression, Prompt
from d2o_client._sync import Client
from d2o_client._types import Load, ModelInfo


def run_generate(arguments: argparse.Namespace) -> int:
    """Answers one prompt."""
    text = _read_standard_input() if arguments.prompt == "-" else arguments.prompt
    if not text.strip():
        raise InvalidArgumentError("the prompt is empty; give a text, or - and a text on standard input")
    with connect(arguments) as client:
        prompt = text if arguments.raw else _as_chat(client, text, arguments.system)
        if arguments.system is not None and isinstance(prompt, str):
            raise InvalidArgumentError("--system needs a model with a chat template, and no --raw")
        with client.stream(prompt, **generation_options(arguments)) as stream:
            print_answer(stream, as_json=arguments.json, stats=arguments.stats)
    return 0


def _read_standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InvalidArgumentError(f"standard input is not {error.encoding} text: byte {error.start}") from None


def _as_chat(client: Client, text: str, system: str | None) -> Prompt:
    """The text as a conversation of one message, where the model knows conversations."""
    if not client.model_info().has_chat_template:
        return text
    first = [ChatMessage("system", system)] if system is not None else []
    return [*first, ChatMessage("user", text)]


def run_info(arguments: argparse.Namespace) -> int:
    """Describes the model and the server's defaults."""
    with connect(arguments) as client:
        info = client.model_info()
    if arguments.json:
        print_json(asdict(info))
        return 0
    rows = _info_rows(info)
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    return 0


def _info_rows(info: ModelInfo) -> dict[str, str]:
    defaults = {name: value for name, value in asdict(info.default_sampling).items() if value is not None}
    pool = info.total_pages * info.page_bytes / 2**20
    return {
        "model": f"{info.model} ({info.architecture}, {info.dtype})",
        "server": f"d2o-serve {info.server_version}",
        "layers": f"{info.layers}, of which {info.compressible_layers} can be compressed",
        "heads": f"{info.query_heads} query, {info.kv_heads} KV, dimension {info.head_dim}",
        "vocabulary": f"{info.vocabulary_size} tokens",
        "context": f"{info.max_model_len} tokens, prompt and answer together",
        "cache": f"{info.total_pages} pages of {info.page_size} slots ({pool:.0f} MiB)",
        "chat template": "yes" if info.has_chat_template else "no",
        "compression": _describe(info.default_compression),
        "sampling": ", ".join(f"{name} {value}" for name, value in defaults.items()) or "server defaults",
        "new tokens": f"{info.default_max_new_tokens} by default",
        "log probabilities": f"top {info.max_logprobs} at most",
    }


def _describe(compression: Compression) -> str:
    given = {name: value for name, value in asdict(compression).items() if value is not None and name != "policy"}
    return ", ".join([str(compression.policy or "unknown"), *(f"{name} {value}" for name, value in given.items())])


def run_load(arguments: argparse.Namespace) -> int:
    """Shows cache pages and requests, once or again and again."""
    with connect(arguments) as client:
        while True:
            load = client.load()
            if arguments.json:
                print_json(asdict(load))
            else:
                print(_load_line(load), flush=True)
            if arguments.watch is None:
                return 0
            time.sleep(arguments.watch)


def _load_line(load: Load) -> str:
    share = 100 * (load.pages_total - load.pages_free) / (load.pages_total or 1)
    serving = sum(worker.serving for worker in load.workers)
    return (
        f"pages {load.pages_used} used + {load.pages_reserved} reserved + {load.pages_free} free "
        f"= {load.pages_total} ({share:.0f}% taken); {load.running} running, {load.waiting} waiting "
        f"({load.waiting_prompt_tokens} prompt tokens); {serving} of {len(load.workers)} workers serving"
        + ("; draining" if load.draining else "")
    )


RUN: Mapping[str, Callable[[argparse.Namespace], int]] = MappingProxyType(
    {"generate": run_generate, "chat": run_chat, "info": run_info, "load": run_load, "top": run_top}
)
