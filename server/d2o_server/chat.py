"""Chat templates: untrusted text that came with the model, rendered in Jinja's sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from d2o_server.engine.types import ChatMessage
from d2o_server.errors import InvalidRequest, StartupError


class ChatTemplate:
    """One compiled template; rendering is safe from several threads at once.

    Templates may use what transformers offers them: ``raise_exception``, ``strftime_now``, ``tojson``, loop controls
    and ``generation`` blocks (https://huggingface.co/docs/transformers/chat_templating).

    Raises:
        StartupError: the template is not valid Jinja.
    """

    def __init__(self, source: str, variables: Mapping[str, object]) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._variables = dict(variables)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise StartupError(f"model: its chat template is not valid Jinja: {error}") from error

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """The conversation as text, ending where the assistant's answer begins.

        Raises:
            InvalidRequest: there is no message, or the template does not accept these.
        """
        if not messages:
            raise InvalidRequest("prompt.chat.messages", "no message", "at least one message")
        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._template.render(messages=turns, add_generation_prompt=True, **self._variables)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, ArithmeticError) as error:
            allowed = f"a conversation that the model's chat template accepts ({error})"
            raise InvalidRequest("prompt.chat.messages", [message.role for message in messages], allowed) from error


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's words for training; for inference it is transparent."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Plain JSON: Jinja's own filter escapes for HTML, which is not what models saw in training."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
