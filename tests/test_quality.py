"""The quality benchmark: its copies of a prompt are what a sequence reads itself, and it can tell good from bad."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks._cli import RESULTS
from benchmarks._prompts import tokenizer
from benchmarks.quality import __main__ as quality
from benchmarks.quality import contenders, report, texts
from benchmarks.quality.cases import agreement_cases, long_cases, own_cases, text_cases
from benchmarks.quality.probe import FULL, Contender, Probe, rounded
from benchmarks.quality.retrieval import TASKS, retrieval_cases
from benchmarks.quality.summary import PARTS, REPEATED, own_row, row, said_before, summary
from d2o.config import D2OConfig
from d2o_server.engine.loss_table import RATIOS
from d2o_server.engine.types import MaxLoss
from d2o_server.models.source import resolve
from d2o_server.tokenizer import Tokenizer
from d2o_server.worker.loader import load_model

MODEL = "random:tiny-llama"
PROMPT = tuple(7 + (31 * place * place + place) % 400 for place in range(150))
CONTINUATION = tuple(9 + (17 * place) % 300 for place in range(40))
TIGHT = Contender(name="tight", config=D2OConfig(budget_tokens=32))


@pytest.fixture(scope="module")
def probe() -> Probe:
    return Probe(MODEL, dtype="float32", threads=1, tokens=len(PROMPT) + len(CONTINUATION), contenders=4)


def test_the_full_cache_gives_the_losses_of_transformers_own_attention(probe: Probe) -> None:
    (full,) = probe.run(PROMPT, CONTINUATION, [Contender(name="full", config=FULL)])
    model = load_model(resolve(MODEL), dtype=torch.float32, device=torch.device("cpu"), attn_implementation="eager")
    ids = torch.tensor([PROMPT + CONTINUATION])
    with torch.inference_mode():
        found = torch.log_softmax(model(input_ids=ids).logits[0, len(PROMPT) - 1 : -1], -1)
    expected = -found.gather(-1, torch.tensor(CONTINUATION)[:, None])[:, 0]
    torch.testing.assert_close(full.loss, expected, atol=2e-4, rtol=1e-4)
    assert full.divergence.abs().max() < 1e-5
    assert full.slots == len(PROMPT) + len(CONTINUATION) - 1


def test_a_copied_prompt_is_compressed_like_one_that_the_sequence_reads_itself(probe: Probe) -> None:
    (copied,) = probe.run(PROMPT, CONTINUATION, [TIGHT])
    alone = probe._sequence("alone", PROMPT, CONTINUATION, TIGHT.config)
    losses: list[float] = []
    probe.runner.watch = lambda logits, rows: losses.append(
        -float(torch.log_softmax(logits[0].float(), -1)[CONTINUATION[rows[0].launched]])
    )
    probe.core.scheduler.add(alone)
    while alone.launched < len(CONTINUATION):
        probe.core.step()
    probe.runner.watch = None
    probe.runner.close(alone)
    probe.core.scheduler.remove(alone)
    torch.testing.assert_close(copied.loss, torch.tensor(losses), atol=1e-3, rtol=1e-3)


def test_compression_costs_what_it_loses_and_leaves_no_page(probe: Probe) -> None:
    scrambled = Contender(name="scrambled", config=TIGHT.config, scrambled=True)
    roomy = Contender(name="roomy", config=D2OConfig(budget_tokens=500))
    tight, random, whole = probe.run(PROMPT, CONTINUATION, [TIGHT, scrambled, roomy])
    assert whole.divergence.abs().max() < 1e-5
    assert tight.divergence.mean() > 1e-4
    assert not torch.allclose(tight.loss, random.loss, atol=1e-4)
    assert tight.slots < 64 < whole.slots
    assert probe.caches.pool.used_pages == 0
    probe.core.check_integrity()


def test_rounding_to_eight_bits_costs_a_little_and_to_two_bits_much(probe: Probe) -> None:
    values = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    assert (rounded(values, 8) - values).abs().max() <= values.abs().max() / 127 / 2 + 1e-6
    assert all(row.unique().numel() <= 3 for row in rounded(values, 2))
    eight, two = (Contender(name=f"{bits} bits", config=FULL, bits=bits) for bits in (8, 2))
    some, much = (trace.divergence.mean() for trace in probe.run(PROMPT, CONTINUATION, [eight, two]))
    assert 0 < some < much / 10


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_finds_what_a_cpu_finds(tmp_path: Path) -> None:
    source = resolve(MODEL)
    load_model(source, dtype=torch.float32, device="cpu", attn_implementation="eager").save_pretrained(tmp_path)
    contenders = [Contender(name="full", config=FULL), TIGHT, Contender(name="bits", config=TIGHT.config, bits=8)]
    traces = {}
    for device in ("cpu", "cuda"):
        probe = Probe(str(tmp_path), dtype="float32", threads=1, tokens=200, contenders=4, device=device)
        traces[device] = probe.run(PROMPT, CONTINUATION, contenders)
        assert probe.caches.pool.used_pages == 0
    for one, other in zip(traces["cpu"], traces["cuda"], strict=True):
        assert other.slots == one.slots
        torch.testing.assert_close(other.loss, one.loss, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(other.divergence, one.divergence, atol=1e-3, rtol=1e-3)


def test_a_prompt_that_is_too_short_is_refused(probe: Probe) -> None:
    with pytest.raises(ValueError, match=r"got 1 and 40 tokens, allowed are at least 2 and 1"):
        probe.run(PROMPT[:1], CONTINUATION, [TIGHT])
    with pytest.raises(ValueError, match="contenders: got 'best', allowed are streaming, h2o"):
        contenders.forms(["best"])


def test_any_configuration_can_enter_by_its_fields() -> None:
    forms = contenders.forms(["snapkv"], ["wide:d2o:window_quota=0.5,window_pool=21,window_ahead=None", "as-is:h2o"])
    full, snapkv, wide, as_is = contenders.at_ratios(forms, [0.2])
    assert [full.name, snapkv.name, wide.name, as_is.name] == ["full", "snapkv@0.2", "wide@0.2", "as-is@0.2"]
    assert as_is.config == D2OConfig.of("h2o", ratio=0.2, min_budget=1)
    expected = D2OConfig(ratio=0.2, min_budget=1, window_quota=0.5, window_pool=21, window_ahead=None)
    assert wide.config == expected
    forms = contenders.forms([], ["last:d2o:score_queries=last:64,merge_keys=true,merge_bias=false"])
    _, last = contenders.at_ratios(forms, [0.2])
    assert (str(last.config.score_queries), last.config.merge_keys, last.config.merge_bias) == ("last:64", True, False)
    for wrong, message in (("x:d2o:window_pool=0", "window_pool"), ("x:best", "set: got 'x:best', allowed is LABEL:")):
        with pytest.raises(ValueError, match=message):
            contenders.forms([], [wrong])


def test_no_window_of_one_half_shares_a_token_with_the_other() -> None:
    numbered = [" ".join(map(str, range(start, start + 1000))) for start in range(0, 200_000, 1000)]
    halves: dict[int, set[int]] = {texts.CHOOSING: set(), texts.CONFIRMING: set()}
    for tokens, count in ((3328, 4), (1000, 7), (96, 1), (8192, 10)):
        made = texts.windows(iter(numbered), lambda text: list(map(int, text.split())), tokens=tokens, count=count)
        assert len({ids[0] for _, ids in made}) == len(made) == count
        for half, ids in made:
            assert len(ids) == tokens
            halves[half].update(ids)
    assert max(halves[texts.CHOOSING]) < min(halves[texts.CONFIRMING])
    with pytest.raises(ValueError, match="got 50 tokens a half, needed are 2 windows of 30 tokens"):
        texts.windows(iter(["x"]), lambda _: list(range(100)), tokens=30, count=4)


def test_facts_are_in_the_prompt_and_the_answer_is_what_counts() -> None:
    bytewise = tokenizer(MODEL)
    cases = list(retrieval_cases(bytewise, TASKS, per_kind=1, prompt=2400, folder=None))
    assert {case.task for case in cases} == set(TASKS)
    assert len({case.key for case in cases}) == len(cases) == 4 * len(TASKS)
    for case in cases:
        prompt, answer = bytewise.decode(case.prompt), bytewise.decode(case.continuation[case.counts_from :])
        codes = answer.split(", ")
        assert all(code.strip().isdecimal() and f"is {code.strip()}." in prompt for code in codes)
        assert len(codes) == (3 if "multivalue" in case.task else 1)
        place = prompt.index(f"is {codes[0].strip()}.") / len(prompt)
        assert place < 0.2 if case.depth is None else abs(place - case.depth) < 0.2
        question = prompt.count("Question:") + prompt.count("What is the secret")
        assert (question == 0) == case.task.endswith("after")


def test_what_a_model_wants_before_a_text_stands_there_and_nowhere_else() -> None:
    plain = tokenizer(MODEL)
    first = plain.encode_part("<|im_start|>")[0]
    begun = Tokenizer(
        plain._fast,
        chat_template="{{ messages[0].content }}",
        adds={"bos_token": True},
        special_tokens={"bos_token": "<|im_start|>"},
    )
    assert (plain.prefix, begun.prefix) == ((), (first,))
    tasks = [task for task in TASKS if task != "turns"]
    made = [
        *retrieval_cases(begun, tasks, per_kind=1, prompt=2400, folder=None),
        *text_cases(begun, per_kind=2, prompt=300, follow=20, folder=None),
        *agreement_cases(begun, per_kind=1, prompt=120, follow=30, folder=None),
    ]
    for case in made:
        assert case.prompt[0] == first
        assert first not in case.prompt[1:] + case.continuation
    assert {len(case.prompt) for case in made if case.task == "text"} == {300}


def test_windows_of_text_do_not_overlap_and_follow_on() -> None:
    for made in (text_cases, long_cases):
        told = list(made(tokenizer(MODEL), per_kind=2, prompt=300, follow=20, folder=None))
        assert len({case.prompt for case in told}) == len(told) == 8
        assert {(len(case.prompt), len(case.continuation), case.absolute) for case in told} == {
            (300, 20, made is long_cases)
        }


def test_what_the_full_cache_says_is_what_it_would_choose(probe: Probe) -> None:
    (case, *_) = agreement_cases(tokenizer(MODEL), per_kind=1, prompt=120, follow=30, folder=None)
    said = probe.greedy(case.prompt, case.greedy)
    full, tight = probe.run(case.prompt, said, [Contender(name="full", config=FULL), TIGHT])
    assert row(case, "full", full)["prefix"] == len(said) == 30
    assert row(case, "tight", tight)["prefix"] == next((i for i, hit in enumerate(tight.hit) if not hit), 30)
    assert probe.caches.pool.used_pages == 0


def test_what_a_cache_says_itself_is_looked_through_for_what_it_said_before(probe: Probe) -> None:
    once = list(range(20))
    assert said_before([*once, *once]).tolist() == [False] * (20 + REPEATED - 1) + [True] * (20 - REPEATED + 1)
    (case, *_) = own_cases(tokenizer(MODEL), per_kind=1, prompt=120, follow=40, samples=2, folder=None)
    everyone = [Contender(name="full", config=FULL), TIGHT]
    full, tight = probe.own_words(case.prompt, case.own, everyone, case.samples)
    assert full[0].tokens != full[1].tokens != tight[1].tokens
    assert full[0].slots == len(case.prompt) + case.own - 1
    assert 32 <= tight[0].slots < 64
    assert probe.caches.pool.used_pages == 0
    # What it drew is as likely as the same model says when it is told to say it.
    (forced,) = probe.run(case.prompt, full[0].tokens, [everyone[0]])
    torch.testing.assert_close(full[0].loss, forced.loss, atol=1e-4, rtol=1e-4)
    rows = [own_row(case, name, said) for name, said in (("full", full), ("tight@32", tight))]
    assert rows[0]["repeated"] == pytest.approx(sum(rows[0]["repeated_by_part"]) / PARTS)
    whole, less = summary(rows)
    assert less["rise"] == pytest.approx(rows[1]["loss"] - rows[0]["loss"], abs=1e-4)
    assert whole["repeated"] <= 1
    assert "divergence" not in whole


def test_a_run_that_is_started_again_goes_on_where_it_was(tmp_path: Path) -> None:
    arguments = ["--model", MODEL, "--threads", "1", "--texts", "1", "--questions", "1", "--prompt-tokens", "96"]
    arguments += ["--follow-tokens", "8", "--question-tokens", "900", "--ratios", "0.3", "--out", str(tmp_path)]
    arguments += ["--tasks", "text", "multikey-inside", "agreement", "long", "own", "--budgets", "40"]
    arguments += ["--agreement-tokens", "6", "--long-tokens", "64", "24"]
    assert quality.main([*arguments, "--contenders", "h2o"]) == 0
    log = tmp_path / "quality.log.jsonl"
    first = log.read_text()
    assert quality.main([*arguments, "--contenders", "h2o", "d2o"]) == 0
    assert log.read_text().startswith(first)
    added = [json.loads(line)["contender"] for line in log.read_text()[len(first) :].splitlines()]
    assert sorted(added) == ["d2o@0.3"] * 12 + ["d2o@40"] * 8
    document = json.loads((tmp_path / "quality.json").read_text())
    rows = document["summary"]["all"]
    assert {each["contender"] for each in rows if each["task"] not in ("long", "own")} == {"full", "h2o@0.3", "d2o@0.3"}
    assert all(each["rise"] == 0 for each in rows if each["contender"] == "full")
    kept = tmp_path / "cases.json"
    assert quality.main([*arguments, "--contenders", "h2o", "d2o", "--write-cases", str(kept)]) == 0
    everything = log.read_text()
    assert quality.main([*arguments, "--contenders", "h2o", "d2o", "--cases", str(kept), "--texts", "9"]) == 0
    assert log.read_text() == everything
    again = json.loads((tmp_path / "quality.json").read_text())
    assert {key: again[key] for key in document if key != "machine"} == {
        key: document[key] for key in document if key != "machine"
    }
    peers = tmp_path / "peers.jsonl"
    theirs = [json.loads(line) for line in everything.splitlines() if '"text"' in line and '"h2o@0.3"' in line][:2]
    peers.write_text("".join(json.dumps(each | {"contender": "peer@0.3", "loss": 9.0}) + "\n" for each in theirs))
    assert quality.main([*arguments, "--contenders", "h2o", "--cases", str(kept), "--peers", str(peers)]) == 0
    beside = json.loads((tmp_path / "quality.json").read_text())["summary"]["all"]
    assert [(each["contender"], each["cases"]) for each in beside] == [("full", 2), ("h2o@0.3", 2), ("peer@0.3", 2)]
    assert beside[-1]["loss"] == 9
    with pytest.raises(SystemExit, match="cases: got none of turns in choosing of the halves, needed is one"):
        quality.main([*arguments, "--cases", str(kept), "--tasks", "turns", "--half", "choosing"])
    kept.write_text('[{"name": 3}]')
    with pytest.raises(ValueError, match=r"cases: .*cases\.json has none that --write-cases has written"):
        quality.main([*arguments, "--cases", str(kept)])
    parts = {each["contender"]: each["rise_by_part"] for each in rows if each["task"] == "long"}
    assert (set(parts), parts["full"]) == ({"full", "h2o@40", "d2o@40"}, [0.0] * PARTS)
    assert {each["depth"] for each in document["by_depth"]} <= {0.1, 0.35, 0.6, 0.85}
    with pytest.raises(SystemExit, match="tasks: got 'sums', allowed are text, agreement, long, own, single-inside"):
        quality.main([*arguments, "--tasks", "sums"])


def test_each_max_loss_was_measured_and_a_higher_one_loses_more() -> None:
    summary = json.loads((RESULTS / "quality_full.json").read_text())["summary"]["all"]
    measured = {each["contender"]: each["rise"] for each in summary if each["task"] == "text"}
    low, medium, high = (measured[f"d2o@{RATIOS[name]:g}"] for name in (MaxLoss.LOW, MaxLoss.MEDIUM, MaxLoss.HIGH))
    assert low < medium < high


def test_the_page_says_what_the_results_say(tmp_path: Path) -> None:
    page = report.PAGE.read_text()
    assert report.filled(page, RESULTS) == page
    assert (RESULTS / "quality.png").exists()
    marked = "<!-- table: made, confirming half -->\nold\n<!-- end -->"
    result = json.loads((RESULTS / "quality_full.json").read_text())
    (tmp_path / "made.json").write_text(json.dumps(result))
    filled = report.filled(marked, tmp_path)
    confirmed = {each["contender"] for each in result["summary"]["confirming half"]}
    assert all(f"| {name} |" in filled for name in confirmed)
    assert "old" not in filled
