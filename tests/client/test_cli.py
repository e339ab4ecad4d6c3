"""The command line: what it prints, where, and how it exits."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import grpc
import pytest

from d2o_client._cli import main
from d2o_inference.v1 import inference_service_pb2 as pb
from tests.client.scripted_service import FINISHED, HANG, STARTED, Abort, ScriptedServer, chunk


@pytest.fixture(autouse=True)
def target(server: ScriptedServer, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("D2O_TARGET", server.target)
    monkeypatch.delenv("D2O_API_KEY", raising=False)
    return server.target


DETAILED_LOAD = pb.GetLoadResponse(
    pages_total=100,
    pages_free=60,
    pages_used=30,
    pages_reserved=10,
    running=2,
    waiting=7,
    waiting_prompt_tokens=90,
    draining=True,
    workers=[
        pb.WorkerLoad(index=0, serving=True, pages_total=50, pages_free=50, running=2),
        pb.WorkerLoad(index=1, serving=False, pages_total=50, pages_free=10, restarts=3),
    ],
    logical_tokens=400,
    physical_tokens=100,
    generated_tokens=5000,
    read_tokens=600,
    layers=[pb.LayerLoad(budget=80, slots=150), pb.LayerLoad(budget=40, slots=50)],
    streams=[
        pb.StreamLoad(
            generation_id="g-7",
            worker=1,
            state=pb.STREAM_STATE_DECODE,
            prompt_tokens=300,
            completion_tokens=20,
            max_new_tokens=64,
            reserved_pages=9,
            budget_per_layer=60,
            policy=pb.COMPRESSION_POLICY_D2O,
            seconds=2.5,
        ),
        pb.StreamLoad(
            generation_id="g-8",
            state=pb.STREAM_STATE_WAITING,
            prompt_tokens=50,
            max_new_tokens=64,
            policy=pb.COMPRESSION_POLICY_NONE,
            seconds=0.1,
        ),
    ],
)


def stream_request(server: ScriptedServer) -> pb.StreamGenerateTextRequest:
    (call,) = (call for call in server.calls if call.method == "StreamGenerateText")
    request: pb.StreamGenerateTextRequest = call.request
    return request


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


class TestGenerate:
    def test_prints_the_answer_and_a_summary_beside_it(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["generate", "Hi"]) == 0
        out, err = capsys.readouterr()
        assert out == "Hello world\n"
        timing, cache = err.splitlines()
        assert timing.startswith("2 tokens after a prompt of 100, stop; ")
        assert "tokens/s, first token after " in timing
        assert cache == (
            "cache: d2o, budget 40 slots a layer (30 to 50); kept 40, merged 20, dropped 42; ratio 0.40; "
            "6 of 8 reserved pages"
        )

    def test_sends_a_chat_where_the_model_has_a_template(self, server: ScriptedServer) -> None:
        assert main(["generate", "Hi", "--system", "Be brief"]) == 0
        messages = stream_request(server).prompt.chat.messages
        assert [(m.role, m.content) for m in messages] == [("system", "Be brief"), ("user", "Hi")]

    def test_sends_text_where_it_has_none(self, server: ScriptedServer) -> None:
        server.script("GetModelInfo", pb.GetModelInfoResponse(has_chat_template=False))
        assert main(["generate", "Hi"]) == 0
        assert stream_request(server).prompt.text == "Hi"

    def test_raw_sends_text_and_asks_for_nothing_else(self, server: ScriptedServer) -> None:
        assert main(["generate", "--raw", "Hi"]) == 0
        assert stream_request(server).prompt.text == "Hi"
        assert [call.method for call in server.calls] == ["StreamGenerateText"]

    def test_reads_the_prompt_from_standard_input(
        self, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO("long\nprompt"))
        assert main(["generate", "--raw", "-"]) == 0
        assert stream_request(server).prompt.text == "long\nprompt"

    def test_flags_become_options(self, server: ScriptedServer) -> None:
        flags = "--max-new-tokens 9 --temperature 0.5 --seed 3 --stop a --stop b --stop-token-id 4 --logit-bias 7=-1.5"
        flags += " --compression d2o --ratio 0.25 --min-budget 16 --merge none --ignore-end-of-text --logprobs 2"
        assert main(["generate", "Hi", *flags.split()]) == 0
        request = stream_request(server)
        assert request.sampling == pb.SamplingParameters(temperature=0.5, seed=3, logit_bias={7: -1.5})
        assert request.stopping == pb.StoppingParameters(
            max_new_tokens=9, stop_strings=["a", "b"], stop_token_ids=[4], ignore_end_of_text=True
        )
        assert request.compression == pb.Compression(
            policy=pb.COMPRESSION_POLICY_D2O, ratio=0.25, min_budget=16, merge=pb.MERGE_RULE_NONE
        )
        assert request.logprobs == 2

    def test_a_loss_is_a_flag_too(self, server: ScriptedServer) -> None:
        assert main(["generate", "Hi", "--compression", "auto", "--max-loss", "medium"]) == 0
        wanted = pb.Compression(policy=pb.COMPRESSION_POLICY_AUTO, max_loss=pb.MAX_LOSS_MEDIUM)
        assert stream_request(server).compression == wanted

    def test_without_flags_the_server_decides(self, server: ScriptedServer) -> None:
        assert main(["generate", "Hi"]) == 0
        request = stream_request(server)
        assert request.sampling == pb.SamplingParameters()
        assert request.stopping == pb.StoppingParameters()
        assert not request.HasField("compression")

    def test_json_is_one_event_a_line_and_nothing_else(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["generate", "Hi", "--json"]) == 0
        out, err = capsys.readouterr()
        events = lines_of(out)
        assert [event["event"] for event in events] == ["started", "chunk", "chunk", "finished"]
        assert events[0]["compression"]["policy"] == "d2o"
        assert (events[1]["text"], events[1]["token_ids"]) == ("Hello", [1])
        assert (events[3]["reason"], events[3]["cache"]["layers"][0]["kept"]) == ("stop", 50)
        assert err == ""

    @pytest.mark.parametrize(("flags", "lines"), [(["--no-stats"], 0), (["--json", "--stats"], 2)])
    def test_the_summary_can_be_chosen(self, capsys: pytest.CaptureFixture[str], flags: list[str], lines: int) -> None:
        assert main(["generate", "Hi", *flags]) == 0
        assert len(capsys.readouterr().err.splitlines()) == lines

    def test_an_answer_without_tokens_is_an_empty_line_less(
        self, server: ScriptedServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        server.script("StreamGenerateText", STARTED, FINISHED)
        assert main(["generate", "Hi"]) == 0
        assert capsys.readouterr().out == ""

    @pytest.mark.parametrize(
        ("compression", "auto", "budget", "facts", "said"),
        [
            (pb.COMPRESSION_POLICY_NONE, False, 0, {"kept": 102}, "cache: none, full, 102 slots a layer"),
            (pb.COMPRESSION_POLICY_NONE, True, 0, {"kept": 102}, "cache: none by auto, full, 102 slots a layer"),
            (pb.COMPRESSION_POLICY_D2O, False, 1024, {"kept": 9}, "cache: d2o, not needed below 1024 slots a layer, 9"),
        ],
    )
    def test_the_summary_tells_when_nothing_was_compressed(
        self,
        server: ScriptedServer,
        capsys: pytest.CaptureFixture[str],
        compression: pb.CompressionPolicy,
        auto: bool,
        budget: int,
        facts: dict[str, Any],
        said: str,
    ) -> None:
        started, finished = pb.StreamGenerateTextResponse(), pb.StreamGenerateTextResponse()
        started.started.compression.policy = compression
        started.started.auto = auto
        started.started.budget_per_layer = budget
        finished.finished.cache.layers.add(**facts)
        server.script("StreamGenerateText", started, chunk("a", 1), finished)
        assert main(["generate", "Hi"]) == 0
        assert said in capsys.readouterr().err


class TestErrors:
    def test_no_server_says_how_to_start_one(self, capsys: pytest.CaptureFixture[str]) -> None:
        with ScriptedServer() as gone:
            target = gone.target
        assert main(["info", "--target", target]) == 1
        err = capsys.readouterr().err
        assert f"cannot connect to {target}: is the server running? `make serve`" in err
        assert "Traceback" not in err

    @pytest.mark.parametrize(
        ("abort", "said"),
        [
            (Abort(grpc.StatusCode.INVALID_ARGUMENT, "temperature: got 11"), "error: temperature: got 11"),
            (Abort(grpc.StatusCode.UNAVAILABLE, "draining"), "`d2o load` shows its state"),
            (
                Abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", (("grpc-retry-pushback-ms", "9000000"),)),
                "try again in 9000 s",
            ),
            (
                Abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "memory", (("grpc-retry-pushback-ms", "-1"),)),
                "out of room",
            ),
            (
                Abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "SERVER: Received message larger than max (7 vs. 5)"),
                "shorten the prompt, or ask for fewer tokens",
            ),
            (Abort(grpc.StatusCode.UNAUTHENTICATED, "who?"), "D2O_API_KEY"),
            (Abort(grpc.StatusCode.UNIMPLEMENTED, "what?"), "older than this client"),
        ],
    )
    def test_a_failed_request_exits_with_1_and_says_what_to_do(
        self, server: ScriptedServer, capsys: pytest.CaptureFixture[str], abort: Abort, said: str
    ) -> None:
        for _ in range(3):
            server.script("StreamGenerateText", abort)
        assert main(["generate", "Hi"]) == 1
        err = capsys.readouterr().err
        assert said in err
        assert err.startswith("d2o: error: ")

    def test_a_timeout_names_the_flag(self, server: ScriptedServer, capsys: pytest.CaptureFixture[str]) -> None:
        server.script("StreamGenerateText", STARTED, chunk("begun", 1), HANG)
        assert main(["generate", "Hi", "--timeout", "0.5"]) == 1
        out, err = capsys.readouterr()
        assert out == "begun\n"
        assert "within 0.5 s; give more with --timeout" in err

    def test_json_carries_the_error_too(self, server: ScriptedServer, capsys: pytest.CaptureFixture[str]) -> None:
        server.script("StreamGenerateText", Abort(grpc.StatusCode.INTERNAL, "boom"))
        assert main(["generate", "Hi", "--json"]) == 1
        (event,) = lines_of(capsys.readouterr().out)
        assert event == {"event": "error", "code": "INTERNAL", "message": "boom", "retry_after": None, "attempts": 1}

    @pytest.mark.parametrize(
        "flags",
        [
            ["generate", " "],
            ["generate", "--raw", "--system", "s", "Hi"],
            ["generate", "Hi", "--seed", "-1"],
            ["generate", "Hi", "--ratio", "nan"],
            ["generate", "Hi", "--tls-cert", "only.pem"],
            ["info", "--tls-ca", "/nowhere/ca.pem"],
        ],
    )
    def test_arguments_that_can_never_work_exit_with_2(
        self, capsys: pytest.CaptureFixture[str], flags: list[str]
    ) -> None:
        assert main(flags) == 2
        assert capsys.readouterr().err.startswith("d2o: error: ")

    @pytest.mark.parametrize(
        "flags",
        [
            [],
            ["sing"],
            ["generate"],
            ["generate", "Hi", "--top-k", "x"],
            ["load", "--watch", "0"],
            ["load", "--timeout", "x"],
            ["top", "--interval", "0"],
            ["top", "--streams", "1025"],
        ],
    )
    def test_a_wrong_command_line_exits_with_2(self, flags: list[str]) -> None:
        with pytest.raises(SystemExit) as caught:
            main(flags)
        assert caught.value.code == 2


class TestInfoAndLoad:
    def test_info_describes_the_model(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["info"]) == 0
        out = capsys.readouterr().out
        assert "d2o, ratio 0.4, min_budget 1024" in out
        assert "100 pages of 32 slots (100 MiB)" in out

    def test_info_as_json_is_one_document(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["info", "--json"]) == 0
        (document,) = lines_of(capsys.readouterr().out)
        assert (document["model"], document["default_compression"]["ratio"]) == ("tiny", 0.4)

    def test_load_is_one_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["load"]) == 0
        out = capsys.readouterr().out
        assert out.startswith("pages 30 used + 10 reserved + 60 free = 100 (40% taken); 3 running, 1 waiting")

    def test_watching_goes_on_until_the_server_does_not(
        self, server: ScriptedServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for _ in range(2):
            server.script("GetLoad", pb.GetLoadResponse(pages_total=1, draining=True))
        server.script("GetLoad", Abort(grpc.StatusCode.INTERNAL, "boom"))
        assert main(["load", "--watch", "0.01", "--json"]) == 1
        documents = lines_of(capsys.readouterr().out)
        assert [document.get("draining") for document in documents] == [True, True, None]

    def test_the_api_key_comes_from_the_environment(
        self, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("D2O_API_KEY", "secret")
        assert main(["load"]) == 0
        assert server.calls[0].metadata["authorization"] == "Bearer secret"


class TestTop:
    def test_one_frame_has_load_pages_layers_and_streams(
        self, server: ScriptedServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        server.script("GetLoad", DETAILED_LOAD)
        assert main(["top", "--once"]) == 0
        (request,) = (call.request for call in server.calls if call.method == "GetLoad")
        assert (request.max_streams, request.with_layers) == (20, True)
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("tiny (")
        assert (
            lines[1]
            == "requests  2 running, 7 waiting (90 prompt tokens); 1 of 2 workers serving, 3 restarts; draining"
        )
        assert lines[3].endswith("] 30 used + 10 reserved of 100 (100 MiB)")
        assert lines[3].count("#") * 10 == lines[3].count("+", 0, lines[3].index("]")) * 30
        assert lines[5].endswith("] 40 of 50 used, 0 running, not serving")
        assert lines[6] == "tokens    400 of running requests in 100 slots a layer (25%)"
        assert lines[7] == "rate      5000 generated, 600 read since the start"
        assert lines[9:11] == [
            "LAYER: slots in use / mean budget of a compressed request",
            "  0: 150 / 80    1: 50 / 40",
        ]
        assert lines[13].split() == ["g-7", "decode", "1", "300", "20", "64", "9", "60", "d2o", "2.5s"]
        assert lines[14].split() == ["g-8", "waiting", "0", "50", "0", "64", "0", "-", "none", "0.1s"]
        assert lines[15:] == ["and 7 more"]

    def test_rates_are_between_frames(self, server: ScriptedServer, capsys: pytest.CaptureFixture[str]) -> None:
        for generated in (100, 150):
            server.script("GetLoad", pb.GetLoadResponse(pages_total=1, generated_tokens=generated, read_tokens=5))
        server.script("GetLoad", Abort(grpc.StatusCode.INTERNAL, "boom"))
        assert main(["top", "--interval", "0.01"]) == 1
        first, second = (line for line in capsys.readouterr().out.splitlines() if line.startswith("rate"))
        assert first == "rate      100 generated, 5 read since the start"
        assert " new tokens/s, 0.0 prompt tokens/s; 150 generated" in second

    def test_json_is_everything(self, server: ScriptedServer, capsys: pytest.CaptureFixture[str]) -> None:
        server.script("GetLoad", DETAILED_LOAD)
        assert main(["top", "--once", "--json", "--streams", "3"]) == 0
        (document,) = lines_of(capsys.readouterr().out)
        assert [stream["state"] for stream in document["streams"]] == ["decode", "waiting"]
        assert document["layers"][1] == {"budget": 40.0, "slots": 50}
        assert document["workers"][1]["restarts"] == 3

    def test_an_older_server_has_fewer_facts(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["top", "--once"]) == 0
        assert "requests  3 running, 1 waiting" in capsys.readouterr().out


class TestChat:
    def chat(self, monkeypatch: pytest.MonkeyPatch, text: str, *flags: str) -> int:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        return main(["chat", *flags])

    def turns(self, server: ScriptedServer) -> list[list[tuple[str, str]]]:
        calls = [call for call in server.calls if call.method == "StreamGenerateText"]
        return [[(m.role, m.content) for m in call.request.prompt.chat.messages] for call in calls]

    def test_every_answer_has_the_earlier_turns_in_mind(
        self, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.chat(monkeypatch, "one\n\ntwo\n/reset\nthree\n/quit\nfour\n", "--system", "s") == 0
        first = [("system", "s"), ("user", "one")]
        assert self.turns(server) == [
            first,
            [*first, ("assistant", "Hello world"), ("user", "two")],
            [("system", "s"), ("user", "three")],
        ]
        assert capsys.readouterr().out == "Hello world\n" * 3

    def test_an_unknown_command_is_explained_and_not_sent(
        self, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.chat(monkeypatch, "/help\n") == 0
        assert "/reset" in capsys.readouterr().err
        assert self.turns(server) == []

    def test_a_model_without_a_template_is_refused(
        self, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        server.script("GetModelInfo", pb.GetModelInfoResponse(model="base"))
        assert self.chat(monkeypatch, "Hi\n") == 1
        assert "base has no chat template; use `d2o generate --raw`" in capsys.readouterr().err

    def test_a_failure_ends_a_scripted_conversation(
        self, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        server.script("StreamGenerateText", Abort(grpc.StatusCode.INTERNAL, "boom"))
        assert self.chat(monkeypatch, "one\ntwo\n") == 1
        assert len(self.turns(server)) == 1

    def test_at_a_terminal_a_failed_turn_is_taken_back_and_the_conversation_goes_on(
        self, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        server.script("StreamGenerateText", Abort(grpc.StatusCode.INTERNAL, "boom"))
        typed = iter(["one", "two"])

        def type_line(_: str) -> str:
            try:
                return next(typed)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", type_line)
        stdin = io.StringIO()
        monkeypatch.setattr(stdin, "isatty", lambda: True)
        monkeypatch.setattr(sys, "stdin", stdin)
        assert main(["chat"]) == 0
        assert self.turns(server)[-1] == [("user", "two")]
        assert "boom" in capsys.readouterr().err
