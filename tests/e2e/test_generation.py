"""What a caller gets: text, tokens, facts and reasons, from a real server."""

from __future__ import annotations

import asyncio

import pytest

from d2o_client import AsyncClient, ChatMessage, Compression, FinishReason, Generation, Policy

STORY = "Once upon a time there was a cache. "
LONG = STORY * 40
# The built-in tokenizer of random models: ids below 256 are bytes, then three special tokens, then words.
SPECIAL = range(256, 259)


def spelled(token_id: int) -> bytes:
    if token_id < 256:
        return bytes([token_id])
    return b"" if token_id in SPECIAL else f" w{token_id}".encode()


def text_of(token_ids: tuple[int, ...]) -> str:
    return b"".join(map(spelled, token_ids)).decode(errors="replace")


@pytest.mark.parametrize(
    "prompt",
    [STORY, tuple(STORY.encode()), [ChatMessage("system", "Be brief."), ChatMessage("user", STORY)]],
    ids=["text", "tokens", "chat"],
)
async def test_a_whole_answer_is_its_stream_put_together(client: AsyncClient, prompt: str) -> None:
    whole = await client.generate(prompt, max_new_tokens=40)
    async with client.stream(prompt, max_new_tokens=40) as stream:
        chunks = [chunk async for chunk in stream]
    assert "".join(chunk.text for chunk in chunks) == whole.text == text_of(whole.token_ids)
    assert tuple(i for chunk in chunks for i in chunk.token_ids) == whole.token_ids
    assert stream.finished is not None
    assert stream.finished.cache.layers == whole.cache.layers
    assert stream.started is not None
    assert stream.started.prompt_tokens == whole.usage.prompt_tokens == len((await client.tokenize(prompt)).ids)


async def test_text_and_its_tokens_give_the_same_answer(client: AsyncClient) -> None:
    tokens = await client.tokenize(STORY, with_text=True)
    assert "".join(tokens.texts) == STORY
    by_text = await client.generate(STORY, max_new_tokens=16)
    by_tokens = await client.generate(tokens.ids, max_new_tokens=16)
    assert by_text.token_ids == by_tokens.token_ids


async def test_a_conversation_is_rendered_with_the_model_s_chat_template(client: AsyncClient) -> None:
    tokens = await client.tokenize([("user", "Hi")], with_text=True)
    assert "".join(tokens.texts) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("policy", Policy)
async def test_every_token_that_was_seen_is_kept_merged_or_dropped(client: AsyncClient, policy: Policy) -> None:
    compression = Compression(policy=policy, ratio=0.2, min_budget=32)
    answer = await client.generate(LONG, max_new_tokens=150, ignore_end_of_text=True, compression=compression)
    info = await client.model_info()
    # The last token is sampled and never fed.
    seen = answer.usage.prompt_tokens + answer.usage.completion_tokens - 1
    layers = answer.cache.layers
    assert len(layers) == info.layers
    for layer in layers:
        assert layer.kept + layer.merged + layer.dropped == pytest.approx(seen)
    kept = sum(layer.kept for layer in layers)
    assert answer.cache.ratio_reached == pytest.approx(kept / (seen * info.layers))
    assert 0 < answer.cache.peak_pages <= answer.started.reserved_pages


@pytest.mark.parametrize("policy", [Policy.D2O, Policy.H2O, Policy.STREAMING])
async def test_the_cache_stays_within_its_budget_however_long_the_answer(client: AsyncClient, policy: Policy) -> None:
    compression = Compression(policy=policy, budget_tokens=128)
    answer = await client.generate(LONG, max_new_tokens=300, ignore_end_of_text=True, compression=compression)
    info = await client.model_info()
    assert answer.started.compression.policy is policy
    assert answer.started.budget_per_layer == 128
    assert sum(layer.budget for layer in answer.cache.layers) <= 128 * info.layers
    for layer in answer.cache.layers:
        assert layer.budget > 0
        assert layer.kept <= layer.budget + info.page_size
        assert layer.dropped + layer.merged > 0


async def test_the_full_cache_keeps_everything(client: AsyncClient) -> None:
    answer = await client.generate(LONG, max_new_tokens=8, compression="none")
    assert answer.started.compression.policy is Policy.NONE
    assert answer.started.budget_per_layer == 0
    assert answer.cache.ratio_reached == 1
    assert {(layer.budget, layer.merged, layer.dropped) for layer in answer.cache.layers} == {(0, 0, 0)}


async def test_a_budget_that_covers_everything_gives_the_full_cache_s_tokens(client: AsyncClient) -> None:
    whole = await client.generate(LONG, max_new_tokens=64, compression="none")
    roomy = await client.generate(LONG, max_new_tokens=64, compression=Compression(policy="d2o", budget_tokens=4000))
    assert roomy.token_ids == whole.token_ids
    assert roomy.started.compression.policy is Policy.NONE


async def test_times_of_an_answer_are_in_order(client: AsyncClient) -> None:
    usage = (await client.generate(LONG, max_new_tokens=20, ignore_end_of_text=True)).usage
    assert 0 <= usage.queue_seconds <= usage.first_token_seconds <= usage.total_seconds
    assert usage.completion_tokens == 20


async def test_log_probabilities_come_with_every_token(client: AsyncClient) -> None:
    answer = await client.generate(STORY, max_new_tokens=12, logprobs=3, ignore_end_of_text=True)
    assert [entry.token_id for entry in answer.logprobs] == list(answer.token_ids)
    for entry in answer.logprobs:
        assert len(entry.top) == 3
        assert [top.logprob for top in entry.top] == sorted((top.logprob for top in entry.top), reverse=True)
        assert entry.token_id == entry.top[0].token_id
        assert entry.logprob == pytest.approx(entry.top[0].logprob)
        assert entry.logprob <= 0
    alone = await client.generate(STORY, max_new_tokens=3, logprobs=0, ignore_end_of_text=True)
    assert [entry.top for entry in alone.logprobs] == [(), (), ()]
    assert not (await client.generate(STORY, max_new_tokens=3)).logprobs


def stop_across_tokens(answer: Generation, first: int) -> tuple[str, str]:
    """A stop string that begins inside token ``first`` and ends in the next, and the text before it."""
    stop = text_of(answer.token_ids[first : first + 2])[1:-1]
    return stop, answer.text[: answer.text.index(stop)]


async def test_a_stop_string_across_tokens_ends_the_text_before_it(client: AsyncClient) -> None:
    words_only = dict.fromkeys(range(256), -100.0)
    free = await client.generate(STORY, max_new_tokens=40, logit_bias=words_only, ignore_end_of_text=True)
    stop, before = stop_across_tokens(free, 10)
    answer = await client.generate(
        STORY, max_new_tokens=40, logit_bias=words_only, ignore_end_of_text=True, stop=["never", stop]
    )
    assert answer.text == before
    assert (answer.finish_reason, answer.stop_string, answer.stop_token_id) == (FinishReason.STOP, stop, None)
    assert answer.token_ids == free.token_ids[: answer.usage.completion_tokens]
    assert answer.usage.completion_tokens < 40


async def test_a_stop_string_ends_an_answer_below_its_least_length_too(client: AsyncClient) -> None:
    forced = {ord("a"): 100.0}
    answer = await client.generate(STORY, max_new_tokens=20, min_new_tokens=10, logit_bias=forced, stop="aaa")
    assert (answer.text, answer.stop_string, answer.usage.completion_tokens) == ("", "aaa", 3)


async def test_text_held_back_for_a_stop_string_appears_at_the_end(client: AsyncClient) -> None:
    answer = await client.generate(STORY, max_new_tokens=5, logit_bias={ord("a"): 100.0}, stop="aaaaaaaaaab")
    assert (answer.text, answer.finish_reason) == ("aaaaa", FinishReason.LENGTH)


async def test_a_stop_token_ends_generation_and_shows_no_text(client: AsyncClient) -> None:
    free = await client.generate(STORY, max_new_tokens=20, ignore_end_of_text=True)
    stop = free.token_ids[7]
    first = free.token_ids.index(stop)
    answer = await client.generate(STORY, max_new_tokens=20, ignore_end_of_text=True, stop_token_ids=[stop])
    assert (answer.finish_reason, answer.stop_token_id) == (FinishReason.STOP, stop)
    assert answer.token_ids == free.token_ids[: first + 1]
    assert answer.text == text_of(free.token_ids[:first])


async def test_the_end_of_text_is_held_off_until_the_least_length(client: AsyncClient) -> None:
    (end,) = (await client.model_info()).end_of_text_ids
    eager = {end: 100.0}
    at_once = await client.generate(STORY, max_new_tokens=20, logit_bias=eager)
    assert (at_once.finish_reason, at_once.text) == (FinishReason.END_OF_TEXT, "")
    later = await client.generate(STORY, max_new_tokens=20, min_new_tokens=6, logit_bias=eager)
    assert later.finish_reason is FinishReason.END_OF_TEXT
    assert end not in later.token_ids[:6]
    assert 6 <= later.usage.completion_tokens < 20
    never = await client.generate(STORY, max_new_tokens=20, logit_bias=eager, ignore_end_of_text=True)
    assert (never.finish_reason, never.usage.completion_tokens) == (FinishReason.LENGTH, 20)


async def test_a_seed_gives_the_same_tokens_alone_and_in_a_crowd(client: AsyncClient) -> None:
    def sampled(seed: int | None) -> asyncio.Task[Generation]:
        return asyncio.ensure_future(
            client.generate(STORY, max_new_tokens=30, temperature=1.5, seed=seed, ignore_end_of_text=True)
        )

    alone = await sampled(7)
    crowd = await asyncio.gather(*(sampled(seed) for seed in range(16)))
    assert crowd[7].token_ids == alone.token_ids
    assert len({answer.token_ids for answer in crowd}) == 16
    unseeded = await sampled(None)
    assert (await sampled(unseeded.started.seed)).token_ids == unseeded.token_ids


async def test_penalties_and_biases_change_what_is_chosen(client: AsyncClient) -> None:
    plain = await client.generate(STORY, max_new_tokens=120, ignore_end_of_text=True)
    for penalty in ({"frequency_penalty": 2.0}, {"presence_penalty": 2.0}, {"repetition_penalty": 10.0}):
        varied = await client.generate(STORY, max_new_tokens=120, ignore_end_of_text=True, **penalty)  # type: ignore[arg-type]
        assert len(set(varied.token_ids)) > len(set(plain.token_ids))
    banned = await client.generate(STORY, max_new_tokens=1, logit_bias={plain.token_ids[0]: -100.0})
    assert banned.token_ids != plain.token_ids[:1]


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}], ids=str)
async def test_the_narrowest_filter_is_greedy(client: AsyncClient, filters: dict[str, float]) -> None:
    greedy = await client.generate(STORY, max_new_tokens=20, ignore_end_of_text=True)
    narrow = await client.generate(
        STORY,
        max_new_tokens=20,
        ignore_end_of_text=True,
        temperature=2.0,
        seed=1,
        **filters,  # type: ignore[arg-type]
    )
    assert narrow.token_ids == greedy.token_ids


async def test_half_a_character_is_never_sent(client: AsyncClient) -> None:
    snowman = "\N{SNOWMAN}".encode()
    async with client.stream(
        STORY,
        max_new_tokens=400,
        temperature=10.0,
        top_k=3,
        seed=3,
        logit_bias=dict.fromkeys(snowman, 100.0),
    ) as stream:
        texts = [chunk.text async for chunk in stream]
    token_ids = stream.token_ids
    assert set(token_ids) <= set(snowman)
    assert stream.text == text_of(token_ids)
    assert stream.text.count("\N{SNOWMAN}") == bytes(token_ids).count(snowman) > 0
    assert "" in texts


async def test_any_text_comes_through_a_prompt_unharmed(client: AsyncClient) -> None:
    prompt = "nul \0, é, 日本語, 🧑‍🚀, \u202e and a lone \ufffd"
    tokens = await client.tokenize(prompt)
    assert text_of(tokens.ids) == prompt
    assert (await client.generate(prompt, max_new_tokens=2)).usage.prompt_tokens == len(prompt.encode())


async def test_the_longest_request_that_the_context_takes(client: AsyncClient) -> None:
    info = await client.model_info()
    prompt = [ord("x")] * (info.max_model_len - 3)
    answer = await client.generate(prompt, max_new_tokens=3, ignore_end_of_text=True)
    assert answer.usage.completion_tokens == 3
    # A default length is shortened to what fits.
    shortened = await client.generate(prompt, ignore_end_of_text=True)
    assert (shortened.usage.completion_tokens, shortened.finish_reason) == (3, FinishReason.LENGTH)
