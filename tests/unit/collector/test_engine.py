"""Continuous batching: rows join, leave and are cancelled, and every request's text and tokens stay its own."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import MixtralForCausalLM

from moe_collector import engine as engine_module
from moe_collector.engine import (
    DuplicateRequestError,
    EngineClosedError,
    Finished,
    Generation,
    GenerationEngine,
    GenerationError,
    Limits,
    QueueFullError,
    Started,
    Token,
)
from moe_debugger.errors import InvalidInputError, ModelNotSupportedError
from moe_debugger.wire.ids import new_id

PROMPTS = [
    "a",
    "def f(x): return x + 1",
    "The quick brown fox jumps over the lazy dog. " * 3,
    "3.14159 2.71828",
    '{"a": [1, 2, 3]}',
    "x" * 90,
    "hello",
    "import os\n",
]


def encode(text: str) -> list[int]:
    return list(text.encode())


def reference(model: Any, prompt: str, num_tokens: int) -> list[int]:
    """Greedy tokens of one request alone, by the library's own generation."""
    ids = torch.tensor([encode(prompt)])
    with torch.inference_mode():
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0
        )
    tokens: list[int] = output[0, ids.shape[1] :].tolist()
    return tokens


MakeEngine = Callable[..., GenerationEngine]


@pytest.fixture
def make_engine(model: MixtralForCausalLM) -> Iterator[MakeEngine]:
    engines: list[GenerationEngine] = []

    def make(**options: Any) -> GenerationEngine:
        engines.append(GenerationEngine(options.pop("model", model), encode, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


async def collect(engine: GenerationEngine, generation: Generation) -> tuple[Started, list[Token], Finished]:
    started, *tokens, finished = [event async for event in engine.generate(generation)]
    assert isinstance(started, Started)
    assert isinstance(finished, Finished)
    assert all(isinstance(token, Token) for token in tokens)
    return started, [token for token in tokens if isinstance(token, Token)], finished


async def take(events: AsyncIterator[Any], num_tokens: int) -> list[Token]:
    tokens: list[Token] = []
    async for event in events:
        if isinstance(event, Token):
            tokens.append(event)
            if len(tokens) == num_tokens:
                break
    return tokens


async def drain(events: AsyncIterator[Any]) -> None:
    async for _ in events:
        pass


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - the worker thread has no event to wait for
            await asyncio.sleep(0.001)


async def test_eight_requests_share_forwards_and_keep_their_own_text_and_rows(
    model: MixtralForCausalLM, make_engine: MakeEngine, recount: Any
) -> None:
    lengths = [5, 40, 17, 60, 33, 9, 51, 24]
    expected = [reference(model, prompt, length) for prompt, length in zip(PROMPTS, lengths, strict=True)]
    engine = make_engine(debugger=recount)
    cancelled_prompt = "cancelled midway"

    async def cancelled() -> str:
        events = engine.generate(Generation(cancelled_prompt, 400))
        started = await anext(events)
        assert isinstance(started, Started)
        await take(events, 6)
        await events.aclose()
        return started.request_id

    first = [
        asyncio.create_task(collect(engine, Generation(prompt, length)))
        for prompt, length in zip(PROMPTS[:7], lengths[:7], strict=True)
    ]
    cancelled_id = await cancelled()
    late = await collect(engine, Generation(PROMPTS[7], lengths[7]))
    results = [*await asyncio.gather(*first), late]

    for (started, tokens, finished), want, prompt, length in zip(results, expected, PROMPTS, lengths, strict=True):
        assert [token.token_id for token in tokens] == want
        assert [token.position for token in tokens] == list(range(len(prompt), len(prompt) + length))
        assert finished.reason == "length"
        assert (finished.num_prompt_tokens, finished.num_generated_tokens) == (len(prompt), length)
        routed = len(prompt) + length - 1
        assert recount.tokens[started.request_id] == recount.routed[started.request_id] == routed
        assert recount.positions[started.request_id] == list(range(routed))
        assert recount.phases[started.request_id] == ["prefill"] + ["decode"] * (length - 1)
    # The cancelled one left long before its end, and took nothing with it.
    assert 6 <= recount.tokens[cancelled_id] - len(cancelled_prompt) + 1 < 400
    statistics = engine.statistics()
    assert statistics.num_forward_rows / statistics.num_forwards > 2
    assert statistics.num_forwards == len(recount.batches)
    assert (statistics.num_active, statistics.num_waiting) == (0, 0)
    # The late one was prefilled after others had begun to decode, then decoded beside them.
    phases = [(phase, late[0].request_id in names, len(names)) for phase, names in recount.batches]
    joined_at = phases.index(("prefill", True, 1))
    assert any(phase == "decode" for phase, _, _ in phases[:joined_at])
    assert any(is_in and size > 1 for phase, is_in, size in phases[joined_at:] if phase == "decode")


async def test_a_prompt_longer_than_a_chunk_gives_the_same_text_while_others_decode(
    model: MixtralForCausalLM, make_engine: MakeEngine, recount: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "".join(f"{number} squared is {number * number}; " for number in range(20))
    expected = reference(model, prompt, 12)
    expected_short = reference(model, "short", 60)
    monkeypatch.setattr(engine_module, "PREFILL_CHUNK_TOKENS", 64)
    engine = make_engine(debugger=recount)
    short = engine.generate(Generation("short", 60))
    beginning = await take(short, 1)
    started, tokens, _ = await collect(engine, Generation(prompt, 12))
    rest = [event async for event in short if isinstance(event, Token)]
    assert [token.token_id for token in tokens] == expected
    assert [token.token_id for token in [*beginning, *rest]] == expected_short
    assert recount.positions[started.request_id] == list(range(len(prompt) + 11))
    chunks = [index for index, (phase, names) in enumerate(recount.batches) if started.request_id in names]
    prefills = [index for index in chunks if recount.batches[index][0] == "prefill"]
    assert len(prefills) == -(-len(prompt) // 64)
    assert prefills[-1] - prefills[0] > len(prefills) - 1, "the short request decoded between the chunks"


async def test_sampling_repeats_with_its_seed_whoever_shares_the_batch(make_engine: MakeEngine) -> None:
    engine = make_engine()
    alone = await collect(engine, Generation("seeded", 30, temperature=1.5, seed=2**64 - 1))
    shared = await asyncio.gather(
        collect(engine, Generation("seeded", 30, temperature=1.5, seed=2**64 - 1)),
        collect(engine, Generation("seeded", 30, temperature=1.5, seed=8)),
        collect(engine, Generation("other", 40)),
    )
    texts = [[token.token_id for token in tokens] for _, tokens, _ in (alone, *shared)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


async def test_an_end_token_ends_the_text_and_is_counted(model: MixtralForCausalLM, make_engine: MakeEngine) -> None:
    expected = reference(model, "to its end", 20)
    end = next(token for token in expected[3:] if token not in expected[:3])
    engine = make_engine(eos_token_ids=[end])
    _, tokens, finished = await collect(engine, Generation("to its end", 20))
    assert [token.token_id for token in tokens] == expected[: expected.index(end) + 1]
    assert finished.reason == "end_of_text"
    assert finished.num_generated_tokens == len(tokens)


@pytest.mark.parametrize(
    ("generation", "words"),
    [
        (Generation("x" * 101), ["101 bytes", "100"]),
        (Generation("é" * 60), ["120 bytes", "100"]),
        (Generation("x", 51), ["max_new_tokens is 51", "50"]),
        (Generation("x", -1), ["max_new_tokens is -1"]),
        (Generation("x", temperature=-0.5), ["temperature is -0.5"]),
        (Generation("x", temperature=float("nan")), ["temperature is nan"]),
        (Generation("x", seed=-1), ["seed is -1"]),
        (Generation("", 5), ["prompt is empty"]),
        (Generation("x", request_id="Not-A-Ulid"), ["request_id", "Not-A-Ulid"]),
    ],
)
async def test_a_value_out_of_its_limit_is_refused_with_both_values(
    make_engine: MakeEngine, generation: Generation, words: list[str]
) -> None:
    engine = make_engine(limits=Limits(max_prompt_bytes=100, max_new_tokens=50))
    with pytest.raises(InvalidInputError) as caught:
        await collect(engine, generation)
    assert all(word in str(caught.value) for word in words)
    assert engine.statistics().num_forwards == 0


async def test_a_prompt_without_room_for_its_text_is_refused(make_engine: MakeEngine) -> None:
    with pytest.raises(InvalidInputError, match="prompt has 4090 tokens and max_new_tokens is 10, the model has 4096"):
        await collect(make_engine(), Generation("x" * 4090, 10))


async def test_waiting_is_bounded_and_a_full_queue_says_so(make_engine: MakeEngine) -> None:
    engine = make_engine(limits=Limits(max_batch_size=1, max_waiting=2))
    running = engine.generate(Generation("runs", 500))
    await take(running, 1)
    waiting = [asyncio.create_task(collect(engine, Generation(f"waits {index}", 3))) for index in range(2)]
    await until(lambda: engine.statistics().num_waiting == 2)
    with pytest.raises(QueueFullError, match="2 requests wait already"):
        await collect(engine, Generation("one too many", 3))
    await running.aclose()
    for _, tokens, _ in await asyncio.gather(*waiting):
        assert len(tokens) == 3


async def test_an_id_in_use_is_refused_and_free_again_at_the_end(make_engine: MakeEngine) -> None:
    engine = make_engine()
    request_id = new_id()
    running = engine.generate(Generation("one", 500, request_id=request_id))
    await take(running, 1)
    with pytest.raises(DuplicateRequestError, match=request_id):
        await collect(engine, Generation("two", 3, request_id=request_id))
    await running.aclose()
    await until(lambda: engine.statistics().num_active == 0)
    await collect(engine, Generation("two", 3, request_id=request_id))
    await collect(engine, Generation("three", 3, request_id=request_id))


async def test_a_request_that_waits_can_be_cancelled(make_engine: MakeEngine) -> None:
    engine = make_engine(limits=Limits(max_batch_size=1))
    running = engine.generate(Generation("runs", 500))
    await take(running, 1)
    waiting = engine.generate(Generation("waits", 5))
    await anext(waiting)
    assert engine.statistics().num_waiting == 1
    await waiting.aclose()
    assert engine.statistics().num_waiting == 0
    await running.aclose()


async def test_closing_ends_running_and_waiting_requests_with_a_clear_error(make_engine: MakeEngine) -> None:
    engine = make_engine(limits=Limits(max_batch_size=1))
    running, waiting = engine.generate(Generation("runs", 500)), engine.generate(Generation("waits", 5))
    await take(running, 1)
    await anext(waiting)
    engine.close()
    for events in (running, waiting):
        with pytest.raises(EngineClosedError, match="stopped during generation"):
            await drain(events)
    with pytest.raises(EngineClosedError, match="is stopping"):
        await collect(engine, Generation("too late", 3))


async def test_a_model_that_fails_ends_its_requests_and_the_engine_goes_on(
    model: MixtralForCausalLM, make_engine: MakeEngine
) -> None:
    engine = make_engine()

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    handle = model.register_forward_pre_hook(fail)
    with pytest.raises(GenerationError, match="RuntimeError: out of memory"):
        await collect(engine, Generation("fails", 3))
    handle.remove()
    _, tokens, _ = await collect(engine, Generation("works", 3))
    assert len(tokens) == 3
    assert engine.statistics().num_active == 0


def test_a_model_whose_cache_cannot_be_merged_is_refused(model: MixtralForCausalLM, make_engine: MakeEngine) -> None:
    class Config:
        layer_types = ("full_attention", "linear_attention")

        def get_text_config(self) -> "Config":
            return self

    class Hybrid:
        config = Config()

    with pytest.raises(ModelNotSupportedError, match="linear_attention"):
        make_engine(model=Hybrid())
