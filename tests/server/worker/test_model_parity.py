"""Ragged, chunked, continuously batched logits are those of transformers' eager attention, one prompt at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.server.worker.conftest import Harness, eager_model, random_prompts, served_model

MODELS = (
    "tiny-llama",
    "tiny-qwen2",
    "tiny-qwen3",
    "tiny-mistral",
    "tiny-gemma2",
    "tiny-gemma3",
    "tiny-phi3",
    "tiny-gpt-neox",
    "tiny-olmo2",
    "tiny-mixtral",
    "tiny-qwen3-moe",
)
# Windows are 64: prompts within, at and far beyond it, and one whose decoding leaves it.
LENGTHS = (1, 64, 203, 2, 300, 50, 17, 81, 128)
NEW = 40


@torch.inference_mode()
def _expected(name: str, prompt: list[int], tokens: list[int]) -> Tensor:
    """Eager logits [tokens, vocabulary] of the prompt's last token and of every token but the last after it."""
    whole = torch.tensor([prompt + tokens[:-1]])
    logits: Tensor = eager_model(name)(whole, use_cache=False).logits[0]
    return logits[len(prompt) - 1 :]


@pytest.mark.parametrize("name", MODELS)
def test_every_logit_of_a_ragged_batch_is_the_eager_one(name: str) -> None:
    harness = Harness(served_model(name), chunk=96)
    prompts = random_prompts(LENGTHS)
    for prompt in prompts[:4]:
        harness.submit(prompt, new=NEW)
    for _ in range(5):
        harness.step()
    for prompt in prompts[4:]:
        harness.submit(prompt, new=NEW)
    answers = harness.run()
    for prompt, answer in zip(prompts, answers.values(), strict=True):
        assert answer.failure is None
        assert len(answer.tokens) == len(answer.logits) == NEW
        expected = _expected(name, prompt, answer.tokens)
        # Near zero a logit is a difference of larger numbers: there its error is a share of their size.
        torch.testing.assert_close(torch.stack(answer.logits), expected, rtol=1e-4, atol=1e-5 * float(expected.std()))
        assert answer.tokens == expected.argmax(-1).tolist()
