"""The command ``chat``: a conversation, line by line."""

from __future__ import annotations

import argparse
import contextlib
import sys

from d2o_client._cli._arguments import connect, generation_options
from d2o_client._cli._output import print_answer, print_note, report_error
from d2o_client._errors import D2OError, FailedPreconditionError, InvalidArgumentError
from d2o_client._options import ChatMessage
from d2o_client._sync import Client

_HELP = "/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer"
_PROMPT = "> "


def run_chat(arguments: argparse.Namespace) -> int:
    """Answers each line of standard input with all earlier ones in mind, until it ends or says /quit."""
    interactive = sys.stdin.isatty()
    with connect(arguments) as client:
        info = client.model_info()
        if not info.has_chat_template:
            raise FailedPreconditionError(f"{info.model} has no chat template; use `d2o generate --raw`")
        if interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 - gives input() editing and history
            print_note(f"{info.model}, {info.max_model_len} tokens of context. {_HELP}.")
        conversation = _Conversation(client, arguments)
        while (line := _read_line(interactive)) is not None:
            match line.strip():
                case "":
                    continue
                case "/quit" | "/exit":
                    break
                case "/reset":
                    conversation.reset()
                    print_note("the conversation is forgotten")
                case command if command.startswith("/") and " " not in command:
                    print_note(f"{command} is no command: {_HELP}")
                case text:
                    _answer(conversation, text, arguments, keep_going=interactive)
    return 0


def _answer(conversation: _Conversation, text: str, arguments: argparse.Namespace, *, keep_going: bool) -> None:
    """One answer; at a terminal a failed one does not end the conversation, unless the flags are at fault."""
    try:
        conversation.ask(text)
    except KeyboardInterrupt:
        print_note("stopped")
    except D2OError as error:
        wrong_flags = isinstance(error, InvalidArgumentError) and error.attempts == 0
        if not keep_going or wrong_flags:
            raise
        report_error(error, arguments)


def _read_line(interactive: bool) -> str | None:
    """The next line, None at the end of the input. Ctrl-C while waiting only drops the line."""
    while True:
        try:
            if interactive:
                return input(_PROMPT if sys.stdout.isatty() else "")
            return sys.stdin.readline() or None
        except EOFError:
            print_note("")
            return None
        except KeyboardInterrupt:
            print_note(f"\n{_HELP}")
        except UnicodeDecodeError as error:
            raise InvalidArgumentError(f"standard input is not {error.encoding} text: byte {error.start}") from None


class _Conversation:
    """The turns so far. A stopped answer stays as far as it came; a turn without any answer is taken back."""

    def __init__(self, client: Client, arguments: argparse.Namespace) -> None:
        self._client = client
        self._arguments = arguments
        self._options = generation_options(arguments)
        self.reset()

    def reset(self) -> None:
        """Back to the system message alone."""
        system = self._arguments.system
        self._turns = [ChatMessage("system", system)] if system is not None else []

    def ask(self, text: str) -> None:
        """Streams the answer to ``text`` and remembers both."""
        question = ChatMessage("user", text)
        with self._client.stream([*self._turns, question], **self._options) as stream:
            try:
                print_answer(stream, as_json=self._arguments.json, stats=self._arguments.stats)
            finally:
                if stream.text:
                    self._turns += [question, ChatMessage("assistant", stream.text)]
