"""A worker of two ranks: real processes that say what one process would, and models that cannot be split."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import zmq
from torch import Tensor, nn

from d2o.config import D2OConfig, Policy
from d2o_server.engine.messages import (
    FromWorker,
    Progress,
    Ready,
    Shutdown,
    StepReport,
    Submit,
    WorkerSettings,
    decode_from_worker,
    encode,
)
from d2o_server.engine.pulse import Pulse, pulse_file
from d2o_server.engine.types import SamplingParams
from d2o_server.errors import ModelUnsupported, OutOfDeviceMemory, SettingsError
from d2o_server.models.describe import describe
from d2o_server.settings import worker_settings
from d2o_server.worker.caches import CacheManager
from d2o_server.worker.ranks import Ranks
from d2o_server.worker.tensor_parallel import Part, split_model
from tests.server.worker.conftest import NONE, PAGE, Answer, Harness, eager_model, load, random_prompts, served_model
from tests.server.worker.test_failures import failing_forward

POLICIES = {
    "none": NONE,
    "default": D2OConfig(min_budget=1, ratio=0.3),
    "late": D2OConfig(budget_tokens=90),
    "paper": D2OConfig.paper(min_budget=1, ratio=0.3),
    "h2o": D2OConfig.of(Policy.H2O, min_budget=20, ratio=0.2),
}
SAMPLINGS = (SamplingParams(), SamplingParams(temperature=0.9, top_p=0.9, top_k=40), SamplingParams(logprobs=2))
PROMPTS = random_prompts((30, 77, 150, 260), seed=9)
NEW = 40


def settings_of(model: str, device: str = "cpu") -> WorkerSettings:
    return worker_settings(
        model=model,
        dtype="float32",
        device=device,
        tensor_parallel=2,
        threads=2,
        page_size=PAGE,
        num_pages=4000,
        max_sequences=32,
        prefill_tokens=64,
        max_model_len=1024,
        check_integrity=True,
    )


class Client:
    """Speaks to a worker process as the front does."""

    def __init__(self, socket: zmq.Socket[bytes], process: subprocess.Popen[bytes]) -> None:
        self.socket, self.process = socket, process

    def hear(self) -> FromWorker:
        while not self.socket.poll(200):
            assert self.process.poll() is None, "the worker has ended"
        message: FromWorker = decode_from_worker(self.socket.recv())
        return self.hear() if isinstance(message, Progress) else message

    def run(self, requests: Mapping[str, Submit]) -> dict[str, Answer]:
        answers = {name: Answer() for name in requests}
        for request in requests.values():
            self.socket.send(encode(request))
        while not all(answer.over for answer in answers.values()):
            report = self.hear()
            assert isinstance(report, StepReport)
            for token in report.tokens:
                answers[token.id].tokens.append(token.token)
            for ended in report.ended:
                answers[ended.id].reason, answers[ended.id].facts = ended.reason, ended.facts
            for failed in report.failed:
                answers[failed.id].failure = failed
        return answers


@contextmanager
def worker(settings: WorkerSettings, folder: Path) -> Iterator[Client]:
    """A worker process, which must end by itself when it is told to."""
    address = f"ipc://{folder}/front"
    pulse = Pulse(pulse_file(address), create=True)
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    socket.setsockopt(zmq.LINGER, 0)
    socket.bind(address)
    ranks = str(settings.tensor_parallel)
    command = [sys.executable, "-m", "d2o_server.worker.process", address, str(os.getpid()), ranks]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        socket.send(encode(settings))
        yield Client(socket, process)
        socket.send(encode(Shutdown()))
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        socket.close()
        pulse.close()


def submissions() -> dict[str, Submit]:
    """All prompts under all policies."""
    found = {}
    for policy, config in POLICIES.items():
        for index, prompt in enumerate(PROMPTS):
            name = f"{policy} {index}"
            found[name] = Submit(
                id=name,
                prompt=tuple(prompt),
                sampling=SAMPLINGS[index % len(SAMPLINGS)],
                seed=index,
                config=config,
                end_ids=(),
                max_new_tokens=NEW,
            )
    return found


def alone(model: str, requests: Mapping[str, Submit]) -> dict[str, Answer]:
    harness = Harness(served_model(model))
    for name, request in requests.items():
        harness.submit(request.prompt, request.config, name=name, new=NEW, seed=request.seed, sampling=request.sampling)
    return harness.run()


def assert_same(theirs: Answer, ours: Answer) -> None:
    assert theirs.failure is None
    assert theirs.tokens == ours.tokens
    assert theirs.facts is not None
    assert ours.facts is not None
    assert theirs.facts.peak_pages == ours.facts.peak_pages
    for layer, expected in zip(theirs.facts.layers, ours.facts.layers, strict=True):
        assert (layer.budget, layer.kept) == (expected.budget, expected.kept)
        assert (layer.merged, layer.dropped) == pytest.approx((expected.merged, expected.dropped))


@pytest.mark.parametrize("model", ["tiny-qwen3", "tiny-gemma3"])
def test_two_ranks_answer_as_one_process(model: str, tmp_path: Path) -> None:
    check_answers(model, f"random:{model}", "cpu", tmp_path)


def test_two_ranks_of_a_checkpoint_answer_as_one_process(tmp_path: Path) -> None:
    check_answers("tiny-llama", checkpoint("tiny-llama", tmp_path), "cpu", tmp_path)


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("model", ["tiny-llama", "tiny-gemma3"])
def test_two_gpus_answer_as_one_process(model: str, tmp_path: Path) -> None:
    """Compiled, captured in graphs, and with tensors exchanged by NCCL inside them."""
    # A GPU would draw other random weights than the CPU that says what is expected.
    check_answers(model, checkpoint(model, tmp_path), "cuda", tmp_path)


def checkpoint(model: str, folder: Path) -> str:
    """A folder with the model's weights."""
    path = folder / model
    eager_model(model).save_pretrained(path)
    return str(path)


def check_answers(model: str, source: str, device: str, folder: Path) -> None:
    requests = submissions()
    expected = alone(model, requests)
    with worker(settings_of(source, device), folder) as client:
        ready = client.hear()
        assert isinstance(ready, Ready)
        assert replace(ready.shape, architecture="") == replace(describe(served_model(model).config), architecture="")
        answers = client.run(requests)
    for name in requests:
        assert_same(answers[name], expected[name])


def split(model: str, count: int) -> None:
    loaded = load(model, "d2o")
    split_model(loaded, loaded.tp_plan, describe(loaded.config), Part(0, count, "0"))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("tiny-phi3", r"splits model\.layers\.\*\.mlp\.down_proj as rowwise_split_input, .*qkv_proj as colwise_gather"),
        ("tiny-olmo2", r"model\.layers\.\*\.self_attn\.k_proj as colwise_gather_output"),
        ("tiny-mixtral", r"model\.layers\.\*\.mlp\.experts as moe_tp_experts"),
    ],
)
def test_a_plan_that_does_not_split_heads_or_has_experts_is_refused(model: str, reason: str) -> None:
    with pytest.raises(ModelUnsupported, match=f"cannot be served with tensor_parallel above 1: its plan .*{reason}"):
        split(model, 2)


def test_a_model_without_a_plan_is_refused() -> None:
    model = served_model("tiny-llama")
    with pytest.raises(ModelUnsupported, match="its plan splits nothing"):
        split_model(model, {}, describe(model.config), Part(0, 2, "0"))


def test_ranks_that_do_not_divide_the_heads_are_refused() -> None:
    with pytest.raises(SettingsError, match=r"^tensor_parallel: got 4, allowed .* 4 query heads, 2 KV heads .*: 1, 2$"):
        split("tiny-llama", 4)


def test_parts_add_up_to_the_whole_and_older_names_mean_the_same() -> None:
    whole = load("tiny-llama", "d2o")
    plan = {**whole.tp_plan, "lm_head": "colwise_rep", "model.norm": "replicate"}
    parts = [load("tiny-llama", "d2o") for _ in range(2)]
    shape = describe(whole.config)
    for number, part in enumerate(parts):
        own = split_model(part, plan, shape, Part(number, 2, "0"))
        assert own == replace(shape, query_heads=2, kv_heads=1)
    for name, dim in (("lm_head", 0), ("model.layers.1.self_attn.k_proj", 0), ("model.layers.2.mlp.down_proj", 1)):
        weights: list[Tensor] = [part.get_parameter(f"{name}.weight") for part in parts]
        assert torch.equal(torch.cat(weights, dim), whole.get_parameter(f"{name}.weight"))
        assert all(weight.untyped_storage().nbytes() == weight.nbytes for weight in weights)
    assert type(parts[0].get_submodule("model.layers.0.self_attn.q_proj")) is nn.Linear


def test_an_output_layer_that_cannot_be_divided_stays_whole() -> None:
    model = load("tiny-llama", "d2o")
    model.lm_head = nn.Linear(64, 511, bias=False)
    split_model(model, model.tp_plan, describe(model.config), Part(0, 2, "0"))
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight.shape == (511, 64)


def test_a_step_that_fails_on_one_rank_is_not_survived() -> None:
    harness = Harness()
    harness.core.in_lockstep = True
    harness.submit(PROMPTS[0])
    with failing_forward(harness, lambda _: torch.OutOfMemoryError("device full")), pytest.raises(OutOfDeviceMemory):
        harness.step()
    harness.submit(PROMPTS[1])
    with failing_forward(harness, lambda _: ValueError("a defect")), pytest.raises(ValueError, match="a defect"):
        harness.step()


@pytest.mark.parametrize("failing", ["hear_prompts", "finish_prompt", "_evict", "_fix_late"])
def test_memory_that_runs_out_on_one_rank_in_compression_is_not_survived(
    failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it would ask of the other ranks a second time they would take for something else."""

    class Two(Ranks):
        count = 2

        def all_heads(self, values: Tensor) -> Tensor:
            return torch.cat([values, values], 1)

    def short_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("device full")

    config = D2OConfig(budget_tokens=110 if failing == "_fix_late" else 40, evict_interval=4)
    harness = Harness()
    harness.core.in_lockstep, harness.core.runner.caches.ranks = True, Two()
    monkeypatch.setattr(CacheManager, failing, short_of_memory)
    harness.submit(random_prompts((100,))[0], config)
    with pytest.raises(torch.OutOfMemoryError):
        harness.run()
