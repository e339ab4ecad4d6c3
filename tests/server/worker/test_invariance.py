"""A request's tokens depend on the request alone: not on its neighbours, not on how its prompt is cut."""

from __future__ import annotations

import pytest
import torch

from d2o.config import D2OConfig, Merge, Policy, Scope
from d2o_server.engine.types import SamplingParams
from tests.server.worker.conftest import NONE, Answer, Harness, generate, random_prompts, served_model

POLICIES = {
    "none": NONE,
    "default": D2OConfig(min_budget=1, ratio=0.3),
    "default-late": D2OConfig(budget_tokens=90),
    "paper": D2OConfig.paper(min_budget=1, ratio=0.3),
    "authors": D2OConfig.authors(min_budget=1, ratio=0.3),
    "h2o": D2OConfig.of(Policy.H2O, min_budget=20, ratio=0.2),
    "streaming": D2OConfig.of(Policy.STREAMING, min_budget=20, ratio=0.2),
    "snapkv": D2OConfig.of(Policy.SNAPKV, min_budget=40, ratio=0.2),
    "dense-last": D2OConfig(min_budget=130, ratio=0.3, dense_layers=(0,), score_queries="last:50"),  # type: ignore[arg-type]
    "stride-layer": D2OConfig(
        budget_tokens=40,
        score_queries="stride:2",  # type: ignore[arg-type]
        merge=Merge.CONSERVE,
        merge_keys=True,
        heads=Scope.LAYER,
    ),
}
SAMPLINGS = (
    SamplingParams(),
    SamplingParams(temperature=0.9, top_p=0.9, top_k=40),
    SamplingParams(
        temperature=1.3,
        min_p=0.01,
        repetition_penalty=1.2,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        logit_bias=((5, 3.0), (6, -3.0)),
    ),
)
NEW = 30


def _dense_fits(config: D2OConfig, prompt: list[int]) -> bool:
    """Whether the request's dense layers leave its other layers room; else it is refused."""
    return not config.dense_layers or len(prompt) <= 150


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-gemma3"])
def test_a_request_gets_the_same_tokens_alone_and_among_31_others(model: str) -> None:
    draw = torch.Generator().manual_seed(11)
    lengths = torch.randint(1, 320, (32,), generator=draw).tolist()
    prompts = random_prompts(lengths)
    configs = [list(POLICIES.values())[i % len(POLICIES)] for i in range(32)]
    configs = [config if _dense_fits(config, p) else NONE for config, p in zip(configs, prompts, strict=True)]
    samplings = [SAMPLINGS[i % len(SAMPLINGS)] for i in range(32)]
    together = Harness(served_model(model), chunk=128)
    for index, (prompt, config) in enumerate(zip(prompts, configs, strict=True)):
        together.submit(prompt, config, seed=index, new=NEW, sampling=samplings[index])
        if index % 3 == 0:
            together.step()
    crowd = together.run()
    for index, (prompt, config) in enumerate(zip(prompts, configs, strict=True)):
        alone = Harness(served_model(model), chunk=2000)
        alone.submit(prompt, config, name=str(index), seed=index, new=NEW, sampling=samplings[index])
        lonely = alone.run()[str(index)]
        assert lonely.failure is None
        assert lonely.tokens == crowd[str(index)].tokens
        assert _kept(lonely) == _kept(crowd[str(index)])


def _kept(answer: Answer) -> list[tuple[int, int]]:
    assert answer.facts is not None
    return [(layer.budget, layer.kept) for layer in answer.facts.layers]


@pytest.mark.parametrize("name", POLICIES)
def test_chunk_sizes_change_no_token(name: str) -> None:
    config = POLICIES[name]
    prompts = [p for p in random_prompts((1, 63, 64, 65, 129, 300, 700), seed=3) if _dense_fits(config, p)]
    whole = generate(prompts, config, chunk=5000, new=NEW)
    for chunk in (64, 512):
        chunked = generate(prompts, config, chunk=chunk, new=NEW)
        assert [a.tokens for a in chunked] == [a.tokens for a in whole]
        assert [_kept(a) for a in chunked] == [_kept(a) for a in whole]


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "none"])
def test_a_budget_of_the_whole_prompt_changes_no_bit_until_decoding_outgrows_it(name: str) -> None:
    """The policy stays in force here: the budget covers the prompt and not all that may follow."""
    prompts = random_prompts((40, 170, 230), seed=5)
    room = 12
    for prompt in prompts:
        config = POLICIES[name].with_changes(budget_tokens=len(prompt) + room, dense_layers=())
        (plain,) = generate([prompt], NONE, new=NEW)
        (budgeted,) = generate([prompt], config, new=NEW)
        assert budgeted.config == config
        # The prompt's own token and one for each token that fits.
        same = NEW if config.policy is Policy.SNAPKV else room + 1
        assert budgeted.tokens[:same] == plain.tokens[:same]
        # Sampled queries cut the prompt's tiles elsewhere, which moves the last bits.
        sampled = config.score_queries.kind == "last" or config.score_queries.stride(len(prompt)) > 1
        tolerance = 1e-4 if sampled else 0.0
        expected = torch.stack(plain.logits[:same])
        torch.testing.assert_close(torch.stack(budgeted.logits[:same]), expected, rtol=tolerance, atol=tolerance)
        if config.evicts_in_decode:
            assert not torch.equal(budgeted.logits[-1], plain.logits[-1])


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "none"])
def test_a_budget_of_everything_gives_the_uncompressed_tokens_bit_for_bit(name: str) -> None:
    prompts = random_prompts((40, 170), seed=5)
    config = POLICIES[name].with_changes(budget_tokens=170 + NEW)
    plain, budgeted = generate(prompts, NONE, new=NEW), generate(prompts, config, new=NEW)
    for a, b in zip(plain, budgeted, strict=True):
        assert a.tokens == b.tokens
        assert torch.equal(torch.stack(a.logits), torch.stack(b.logits))
        assert b.config is not None
        assert b.config.policy is Policy.NONE


@pytest.mark.parametrize("name", ["default", "paper", "snapkv"])
def test_a_model_whose_layers_all_have_windows_is_served_whatever_the_policy(name: str) -> None:
    prompts, model = random_prompts((40, 170), seed=5), served_model("tiny-mistral")
    plain, budgeted = (generate(prompts, config, model=model, new=NEW) for config in (NONE, POLICIES[name]))
    assert [a.tokens for a in plain] == [a.tokens for a in budgeted]


def test_compression_does_change_tokens() -> None:
    """So the equalities above are not those of a server that never compresses."""
    prompts = random_prompts((300,), seed=5)
    plain = generate(prompts, NONE, new=NEW)[0].tokens
    compressed = {
        name: generate(prompts, config, new=NEW)[0].tokens
        for name, config in POLICIES.items()
        if _dense_fits(config, prompts[0])
    }
    assert all(tokens != plain for name, tokens in compressed.items() if name != "none")


@pytest.mark.parametrize("seed", [1, 2])
def test_a_seed_gives_the_same_tokens_every_time_and_another_seed_others(seed: int) -> None:
    (prompt,) = random_prompts((30,))
    sampling = SamplingParams(temperature=1.0)

    def tokens(seed: int) -> list[int]:
        harness = Harness()
        harness.submit(prompt, seed=seed, sampling=sampling, name="a")
        return harness.run()["a"].tokens

    assert tokens(seed) == tokens(seed)
    assert tokens(seed) != tokens(seed + 1)
