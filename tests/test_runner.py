"""Requests in, tokens out: each request gets what it would get alone."""

import dataclasses
import types

import jax
import numpy as np
import pytest

import golden
from grok1.execution import ONE_DEVICE
from grok1.serving.request import CheckedRequest
from grok1.serving.scheduler import chunk_lengths
from grok1.serving.steps import (
    EMBEDDINGS,
    MOST_TOKENS,
    apply_model,
    decode,
    new_state,
    prefill,
    start,
)
from model import LanguageModelConfig, TransformerConfig
from paths import ROOT
from runner import (
    InferenceRunner,
    ModelRunner,
    Request,
    load_server,
    load_tokenizer,
    sample_from_model,
)

TOKENIZER = ROOT / "tokenizer.model"
TINY = LanguageModelConfig(
    vocab_size=4096,
    sequence_len=64,
    output_multiplier_scale=1.0,
    embedding_multiplier_scale=6.0,
    fprop_dtype=np.float32,
    model=TransformerConfig(
        emb_size=32,
        key_size=8,
        num_q_heads=8,
        num_kv_heads=8,
        num_layers=2,
        attn_output_multiplier=0.35,
        num_experts=8,
        num_selected_experts=2,
    ),
)


def make(config=TINY, slots=4, mesh=(1, 1), execution=None, pad_sizes=(8, 32)):
    devices = mesh[0] * mesh[1]
    server = InferenceRunner(
        name="tiny",
        runner=ModelRunner(config, slots / devices, None, rng_seed=1, execution=execution),
        load=None,
        tokenizer_path=TOKENIZER,
        local_mesh_config=mesh,
        pad_sizes=pad_sizes,
    )
    server.initialize()
    return server


@pytest.fixture(scope="module")
def tiny():
    """Random int8 weights, words for tokens, four slots."""
    return make()


MIXED = [
    Request([7], temperature=0.0, max_len=12),
    Request([*range(20, 80)], temperature=0.7, nucleus_p=0.9, rng_seed=1, max_len=20),
    Request([300, 17, 250, 44], temperature=1.3, rng_seed=2, max_len=30),
    Request([*range(100, 117)], temperature=0.7, rng_seed=3, max_len=9, top_k=40),
    Request([9, 0, 8, 7, 6], temperature=1.3, nucleus_p=0.5, rng_seed=1, max_len=25),
]


@pytest.mark.parametrize("mesh", golden.DECODING_MESHES, ids=str)
def test_a_mixed_batch_gives_each_request_what_it_gets_alone(mesh):
    server = golden.runner("three-layers", "float32", mesh)
    together = server.generate(MIXED)
    for request, answer in zip(MIXED, together, strict=True):
        alone = server.generate([request])[0]
        assert dataclasses.astuple(alone) == dataclasses.astuple(answer)  # logprobs bit for bit
        assert len(answer.token_ids) == request.max_len or answer.finish_reason == "eos"


def test_more_requests_than_slots_wait_their_turn(tiny):
    requests = [Request([5 + i], temperature=1.0, rng_seed=i, max_len=3 + i) for i in range(9)]
    answers = tiny.generate(requests)
    assert [len(a.token_ids) for a in answers] == [3 + i for i in range(9)]
    assert answers[8] == tiny.generate(requests[8:])[0]


def test_the_seed_decides_the_tokens(tiny):
    def draw(seed):
        return tiny.generate([Request([5, 6], rng_seed=seed, max_len=12)])[0].token_ids

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_settings_and_prompts_of_any_kind_compile_nothing_new(tiny):
    tiny.generate([Request([5], max_len=2), Request([*range(3, 40)], max_len=2)])
    compiled = prefill._cache_size(), decode._cache_size()
    tiny.generate(
        [
            Request([*range(3, 23)], temperature=0.0, max_len=4),
            Request([4], temperature=2.0, nucleus_p=0.1, top_k=3, rng_seed=9, max_len=7),
            Request([9, 9], allowed_tokens=[5, 6, 7], max_len=5),
        ]
    )
    assert (prefill._cache_size(), decode._cache_size()) == compiled


@pytest.mark.parametrize(
    ("length", "chunks"), [(1, [8]), (8, [8]), (9, [32]), (32, [32]), (40, [32, 8]), (63, [32, 32])]
)
def test_a_prompt_is_read_in_the_largest_chunks_and_its_rest_in_the_smallest_that_holds_it(
    length, chunks
):
    assert chunk_lengths(length, [8, 32]) == chunks


def test_a_decode_step_does_no_work_for_slots_that_are_not_active(tiny):
    state = new_state(config=TINY, batch=4)
    row = CheckedRequest(Request([5], ignore_eos=True), TINY, None).slot()
    state = start(state, np.int32(0), row, config=TINY)
    everybody = np.ones(4, bool)
    given = everybody, np.int32(3), np.bool_(False)
    found, state = decode(tiny.params, state, *given, config=TINY)
    assert state.memory.layers.step.tolist() == state.slots.drawn.tolist() == [3, 0, 0, 0]
    assert found.drawn.sum(axis=0).tolist() == [3, 0, 0, 0]
    assert not found.sample.token_id[:, 1:].any()


@pytest.mark.parametrize(
    ("until_free", "drawn"), [(False, [2, MOST_TOKENS, 0, 0]), (True, [2, 2, 0, 0])]
)
def test_several_tokens_of_a_dispatch_end_with_the_first_answer_if_others_wait_for_its_slot(
    until_free, drawn, tiny
):
    state = new_state(config=TINY, batch=4)
    for slot, limit in enumerate((2, 40)):
        row = CheckedRequest(Request([5], max_len=limit, ignore_eos=True), TINY, None).slot()
        state = start(state, np.int32(slot), row, config=TINY)
    given = np.ones(4, bool), np.int32(MOST_TOKENS), np.bool_(until_free)
    found, state = decode(tiny.params, state, *given, config=TINY)
    assert found.drawn.sum(axis=0).tolist() == state.slots.drawn.tolist() == drawn
    assert state.slots.settings.active.tolist() == [False, True, False, False]


def test_only_allowed_tokens_are_drawn(tiny):
    answer = tiny.generate([Request([5, 6], allowed_tokens=[70, 71, 72], max_len=20)])[0]
    assert set(answer.token_ids) <= {70, 71, 72}
    assert len(set(answer.token_ids)) > 1


def test_generation_stops_at_max_len(tiny):
    answer = tiny.generate([Request([5], temperature=0.0, max_len=3)])[0]
    assert (len(answer.token_ids), answer.finish_reason) == (3, "length")


def test_generation_stops_when_the_context_is_full(tiny):
    prompt = [*range(10, 70)]
    open_ended, exact = tiny.generate(
        [Request(prompt, temperature=0.0), Request(prompt, temperature=0.0, max_len=4)]
    )
    assert len(prompt) + len(exact.token_ids) == TINY.sequence_len
    assert open_ended.token_ids == exact.token_ids
    assert (open_ended.finish_reason, exact.finish_reason) == ("context", "length")


def test_a_prompt_too_long_keeps_its_newest_tokens_if_asked(tiny):
    prompt = [*range(10, 110)]
    (answer,) = tiny.generate([Request(prompt, temperature=0.0, max_len=5, truncate="left")])
    assert answer.prompt_ids == prompt[-59:]
    (same,) = tiny.generate([Request(prompt[-59:], temperature=0.0, max_len=5)])
    assert answer == same and len(answer.token_ids) == 5
    (short,) = tiny.generate([Request([5, 6], temperature=0.0, max_len=5, truncate="left")])
    assert short.prompt_ids == [5, 6]
    (one,) = tiny.generate([Request(prompt, temperature=0.0, truncate="left")])
    assert len(one.prompt_ids) == 63 and len(one.token_ids) == 1


def test_generation_stops_at_the_end_of_sequence_token(tiny):
    """The original never stops at it."""
    free = tiny.generate([Request([5], temperature=0.0, max_len=6)])[0]
    eos = free.token_ids[3]
    first = free.token_ids.index(eos)
    stopping = make(dataclasses.replace(TINY, eos_token=eos))
    answers = stopping.generate(
        [Request([5], temperature=0.0, max_len=6), Request([99, 98], temperature=0.0, max_len=6)]
    )
    assert answers[0].token_ids == free.token_ids[: first + 1]
    assert answers[0].finish_reason == "eos"
    assert answers[1].finish_reason == "length" or answers[1].token_ids[-1] == eos


def test_the_end_of_sequence_token_can_be_ignored_or_put_off(tiny):
    free = tiny.generate([Request([5], temperature=0.0, max_len=6)])[0].token_ids
    stopping = make(dataclasses.replace(TINY, eos_token=free[2]))
    asked = {"temperature": 0.0, "max_len": 6}
    ended, ignoring, later = stopping.generate(
        [
            Request([5], **asked),
            Request([5], **asked, ignore_eos=True),
            Request([5], **asked, min_len=4),
        ]
    )
    assert ended.token_ids == free[: free.index(free[2]) + 1] and ended.finish_reason == "eos"
    assert ignoring.token_ids == free and ignoring.finish_reason == "length"
    assert len(later.token_ids) >= 4 and free[2] not in later.token_ids[:3]


def test_stop_tokens_and_stop_strings_end_an_answer_that_does_not_show_them(tiny):
    asked = {"rng_seed": 4, "max_len": 30, "temperature": 0.0}
    (free,) = tiny.generate([Request("The cat", **asked)])
    middle = free.token_ids[12]
    first = free.token_ids.index(middle)
    (by_token,) = tiny.generate([Request("The cat", **asked, stop_tokens=[middle])])
    assert by_token.token_ids == free.token_ids[: first + 1] and by_token.finish_reason == "stop"
    assert by_token.text == tiny.tokenizer.decode(
        [*free.prompt_ids, *free.token_ids[:first]]
    ).removeprefix("The cat")
    stop = free.text[20:26]
    cut = free.text.index(stop)
    events = list(
        tiny.generate_events([Request("The cat", **asked, stop=["never to be seen", stop])])
    )
    by_text = events[-1].completion
    assert by_text.text == "".join(event.text for event in events) == free.text[:cut]
    assert by_text.finish_reason == "stop"
    count = len(by_text.token_ids)
    assert by_text.token_ids == free.token_ids[:count] and count < len(free.token_ids)
    (late,) = tiny.generate([Request("The cat", **asked, stop=stop, min_len=count + 1)])
    assert late.text.startswith(free.text[: cut + len(stop)])
    for least in range(count + 1):  # also where the stop string has begun before
        (same,) = tiny.generate([Request("The cat", **asked, stop=stop, min_len=least)])
        assert (same.text, same.token_ids) == (by_text.text, by_text.token_ids)


def test_bias_and_penalties_change_what_is_drawn(tiny):
    (free,) = tiny.generate([Request([5, 6], temperature=0.0, max_len=30)])
    wanted, never = 77, free.token_ids[0]
    biased, once, novel = tiny.generate(
        [
            Request([5, 6], temperature=0.0, max_len=3, logit_bias={wanted: 1e4, 3: -5}),
            Request([5, 6], temperature=0.0, max_len=30, presence_penalty=1e4),
            Request([5, never], temperature=0.0, max_len=30, repetition_penalty=1e4),
        ]
    )
    assert biased.token_ids == [wanted] * 3
    assert len(set(free.token_ids)) < 30  # greedy, it repeats itself
    assert len(set(once.token_ids)) == 30
    assert len(set(novel.token_ids)) == 30 and not {5, never} & set(novel.token_ids)


def test_the_frequency_penalty_counts_tokens(tiny):
    penalty = 0.25
    (answer,) = tiny.generate(
        [Request([5, 6], temperature=0.0, max_len=30, frequency_penalty=penalty)]
    )
    logits = tiny.logits([[5, 6, *answer.token_ids]])[0]
    counts = np.zeros(logits.shape[-1])
    for position, token in enumerate(answer.token_ids, 1):
        assert token == np.argmax(logits[position] - penalty * counts)
        counts[token] += 1
    assert counts.max() > 1  # what is penalised more than once comes again


def test_the_models_own_first_choices_are_reported(tiny):
    asked, plain = tiny.generate(
        [Request([5, 6, 7], rng_seed=3, max_len=6, top_logprobs=3), Request([9], max_len=2)]
    )
    assert plain.top_logprobs == []
    ids = [5, 6, 7, *asked.token_ids]
    logits = tiny.logits([ids])[0].astype(np.float64)
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for position, found in enumerate(asked.top_logprobs, 2):
        best = np.argsort(-scores[position], kind="stable")[:3]
        assert [token for token, _ in found] == best.tolist()
        np.testing.assert_allclose([p for _, p in found], scores[position, best], atol=1e-5)


def test_logprobs_are_the_models_own_before_all_filters(tiny):
    request = Request([5, 6, 7], temperature=0.3, nucleus_p=0.2, top_k=5, max_len=6)
    answer = tiny.generate([request])[0]
    ids = answer.prompt_ids + answer.token_ids
    logits = tiny.logits(ids)[0].astype(np.float64)
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = [scores[i - 1, ids[i]] for i in range(3, len(ids))]
    np.testing.assert_allclose(answer.logprobs, expected, atol=1e-5)


def test_the_text_is_what_the_tokens_add_to_the_prompt(tiny):
    prompt = "The cat sat on"
    events = list(tiny.generate_events([Request(prompt, rng_seed=4, max_len=20)]))
    answer = events[-1].completion
    whole = tiny.tokenizer.decode(answer.prompt_ids + answer.token_ids)
    assert whole == prompt + answer.text
    assert "".join(event.text for event in events) == answer.text


def test_the_text_of_special_pieces_is_text_unless_asked_otherwise(tiny):
    prompt = "The end.<|separator|>[EOS]"
    (plain,) = tiny.generate([Request(prompt, max_len=1)])
    (special,) = tiny.generate([Request(prompt, max_len=1, parse_special=True)])
    assert plain.prompt == special.prompt == tiny.tokenizer.decode(plain.prompt_ids) == prompt
    assert not {2, 47} & set(plain.prompt_ids)
    assert special.prompt_ids[-2:] == [47, 2]


def test_sample_from_model_works_as_published(tiny):
    server = tiny.run()
    text = sample_from_model(server, "Once upon a time", max_len=8, temperature=0.01)
    again = sample_from_model(server, "Once upon a time", max_len=8, temperature=0.01)
    request = Request("Once upon a time", 0.01, 1.0, 42, 8)
    assert text == again == tiny.generate([request])[0].text
    assert text


def test_a_batch_is_padded_to_a_multiple_of_the_data_axis():
    server = make(slots=1, mesh=(4, 2))
    assert server.num_slots == 4
    requests = [Request([5], temperature=0.0, max_len=4), Request([9], temperature=0.0, max_len=5)]
    plain = make(slots=4).generate(requests)
    assert [a.token_ids for a in server.generate(requests)] == [a.token_ids for a in plain]


def test_bs_per_device_counts_devices():
    for per_device, slots in ((0.125, 1), (1, 8), (2, 16)):
        runner = ModelRunner(TINY, per_device, None)
        assert runner.num_slots(golden.device_mesh((1, 8))) == slots


@pytest.mark.parametrize("dtype", golden.DTYPES)
def test_the_embedding_lies_on_the_device_in_the_activation_type(dtype):
    module, name = EMBEDDINGS
    config = dataclasses.replace(TINY, fprop_dtype=golden.DTYPES[dtype])
    random = ModelRunner(config, 1, None).load_or_init(None)
    released = golden.runner("three-layers", dtype).params
    assert random[module][name].dtype == released[module][name].dtype == dtype


WRONG = {
    "an empty prompt": (Request(""), "the prompt is empty"),
    "no ids": (Request([]), "the prompt is empty"),
    "an id too large": (Request([5, 4096]), "expected token ids from 0 to 4095, got 4096"),
    "a negative id": (Request([-1]), "got -1"),
    "a prompt too long": (
        Request([5] * 64),
        "prompt has 64 tokens, and the context of 64 must hold at least one more",
    ),
    "prompt and answer too long": (
        Request([5] * 60, max_len=5),
        "has 60 tokens, and the context of 64 must hold max_len = 5 more; shorten it, or keep only",
    ),
    "no room": (
        Request([5], max_len=64, truncate="left"),
        "max_len = 64 leaves no room for a prompt in the context of 64; set it below 64",
    ),
    "truncate": (Request([5], truncate="right"), "truncate must be None or \"left\", got 'right'"),
    "min_len": (Request([5], max_len=3, min_len=4), "min_len must be .* 0 to max_len = 3, got 4"),
    "min_len that cannot be": (
        Request([5], min_len=1, allowed_tokens=[2]),
        "min_len = 1 needs a token in allowed_tokens",
    ),
    "min_p": (Request([5], min_p=2.0), "min_p must be a number from 0 to 1, got 2"),
    "repetition_penalty": (Request([5], repetition_penalty=0.0), "repetition_penalty must be .* 0"),
    "presence_penalty": (Request([5], presence_penalty=float("inf")), "presence_penalty must be"),
    "logit_bias": (
        Request([5], logit_bias={5: "x"}),
        "numbers from -1e.09 to 1e.09, got 'x' for 5",
    ),
    "a bias of no token": (Request([5], logit_bias={4096: 1.0}), "from 0 to 4095, got 4096"),
    "biases in a list": (Request([5], logit_bias=[1.0]), "logit_bias must map token ids"),
    "an empty stop": (Request([5], stop=["a", ""]), "stop must contain non-empty strings, got ''"),
    "a stop in ids": (Request([5], stop=[7]), "stop must contain non-empty strings, got 7"),
    "an array without axes": (Request([5], stop=np.array(7)), "stop must be a string or a list of"),
    "one stop": (Request([5], stop=7), "stop must be a string or a list of strings, got 7"),
    "one stop token": (Request([5], stop_tokens=7), "stop_tokens: expected .* ids, got 7"),
    "allowed words": (Request([5], allowed_tokens="ab"), "allowed_tokens: expected .* got 'ab'"),
    "stop_tokens": (Request([5], stop_tokens=[-1]), "expected token ids from 0 to 4095, got -1"),
    "half a choice": (Request([5], top_logprobs=2.0), "top_logprobs must be an integer, got 2.0"),
    "temperatures": (Request([5], temperature=[1.0, 2.0]), "temperature must be one number, got"),
    "top_logprobs": (Request([5], top_logprobs=21), "top_logprobs must be .* 0 to 20, got 21"),
    "max_len": (Request([5], max_len=0), "max_len must be an integer of at least 1, got 0"),
    "temperature": (Request([5], temperature=-0.5), "temperature must be .* got -0.5"),
    "not a number": (Request([5], temperature=float("nan")), "temperature must be .* got nan"),
    "nucleus_p": (Request([5], nucleus_p=0.0), "nucleus_p must be .* got 0"),
    "top_k": (Request([5], top_k=-1), "top_k must be .* got -1"),
    "a fraction": (Request([5], top_k=1.5), "top_k must be .* got 1.5"),
    "a fractional id": (Request([1.7]), "expected token ids from 0 to 4095, got 1.7"),
    "a fractional max_len": (Request([5], max_len=2.5), "max_len must be an integer"),
    "a seed in words": (Request([5], rng_seed="x"), "rng_seed must be .* 0 to 4294967295, got 'x'"),
    "a key for a seed": (Request([5], rng_seed=jax.random.key(0)), "rng_seed must be .* got Array"),
    "an endless top_k": (Request([5], top_k=float("inf")), "top_k must be an integer .* got inf"),
    "places to truncate": (Request([5], truncate=np.array(["left"] * 2)), "truncate must be None"),
    "a seed of 33 bits": (Request([5], rng_seed=2**32), "rng_seed must be .* got 4294967296"),
    "no top_k": (Request([5], top_k=None), "top_k must be one number, got None"),
    "a number in words": (
        Request([5], temperature="0.5"),
        "temperature must be one number, got '0",
    ),
    "a flag for a number": (Request([5], min_p=True), "min_p must be one number, got True"),
    "a prompt without axes": (Request(np.array(5)), "list of token ids, got array.5."),
    "a large seed of numpy": (Request([5], rng_seed=np.uint64(2**63)), "got 9223372036854775808"),
    "a prompt in bytes": (Request(b"cat"), "expected a string or a list of token ids, got b'cat'"),
    "a prompt in a bytearray": (Request(bytearray(b"cat")), "list of token ids, got bytearray"),
    "a prompt without an order": (Request({5, 6}), "list of token ids, got {5, 6}"),
    "stop tokens in bytes": (Request([5], stop_tokens=b"ab"), "stop_tokens: .* got b'ab'"),
    "no samples": (Request([5], num_samples=0), "num_samples must be .* 1 to 1024, got 0"),
    "too many samples": (Request([5], num_samples=1025), "num_samples must be .* got 1025"),
    "half a sample": (Request([5], num_samples=1.5), "num_samples must be .* got 1.5"),
    "a flag in words": (
        Request([5], prompt_logprobs="no"),
        "prompt_logprobs must be True or False, got 'no'",
    ),
    "a flag that is a number": (Request([5], ignore_eos=1), "ignore_eos must be True or False"),
    "a number beyond all": (Request([5], temperature=10**400), "temperature must be a finite"),
    "no allowed token": (Request([5], allowed_tokens=[]), "allowed_tokens must contain"),
}


@pytest.mark.parametrize("tokens", [0, -1, MOST_TOKENS + 1, 1.5, None, True])
def test_a_step_of_a_wrong_number_of_tokens_is_refused_and_ends_nothing(tokens, tiny):
    handle = tiny.submit(Request([5], max_len=2, ignore_eos=True))
    expected = f"tokens must be an integer from 1 to {MOST_TOKENS}, got {tokens}"
    with pytest.raises(ValueError, match=expected):
        tiny.step(tokens)
    with pytest.raises(ValueError, match="tokens must be"):
        next(tiny.generate_events([Request([6])], tokens=tokens))
    assert len(list(tiny.stream(handle, tokens=MOST_TOKENS))) == 2 and not tiny.busy


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_request_is_refused_by_name_before_any_token(case, tiny):
    request, message = WRONG[case]
    with pytest.raises(ValueError, match=f"request 2: .*{message}"):
        next(tiny.generate_events([Request([5]), request]))


@pytest.mark.parametrize(
    "use",
    [
        lambda server: server.generate([Request([5])]),
        lambda server: server.submit(Request([5])),
        lambda server: server.step(),
        lambda server: server.logits([5]),
        lambda server: server.score([[5]]),
    ],
    ids=("generate", "submit", "step", "logits", "score"),
)
def test_before_it_is_initialized_a_runner_says_what_to_call(use):
    server = InferenceRunner("early", ModelRunner(TINY, 1, None), None, None)
    with pytest.raises(
        ValueError, match=r"early: nothing is loaded yet; call initialize\(\) first"
    ):
        use(server)


GREEDY = {"temperature": 0.0, "max_len": 5}


@pytest.mark.parametrize("one", ["The cat", [5, 6, 7], np.array([5, 6, 7]), (5, 6, 7)])
def test_a_string_or_ids_are_as_good_as_a_request(one, tiny):
    (expected,) = tiny.generate([Request(one, **GREEDY)])
    assert tiny.generate(one, **GREEDY) == expected
    assert tiny.generate(Request(one, **GREEDY)) == expected
    assert tiny.generate([one, one], **GREEDY) == [expected] * 2
    handle = tiny.submit(one, **GREEDY)
    ids = [event.token_id for event in tiny.stream(handle)]
    assert ids == expected.token_ids
    assert [event.token_id for event in tiny.generate_events(one, **GREEDY)] == ids


def test_a_list_may_mix_strings_ids_and_requests(tiny):
    mixed = tiny.generate(["The cat", [5, 6], Request("The cat")])
    assert mixed == tiny.generate([Request("The cat"), Request([5, 6]), Request("The cat")])
    several = tiny.generate(Request("The cat", num_samples=2, max_len=3))
    assert several == tiny.generate([Request("The cat", num_samples=2, max_len=3)])
    assert tiny.generate([]) == tiny.score([]) == tiny.inspect([]) == tiny.decode([]) == []


def test_one_text_gets_one_result_and_several_a_list(tiny):
    ids = tiny.encode("The cat")
    for one in ("The cat", ids):
        np.testing.assert_array_equal(tiny.score(one), tiny.score([ids])[0])
        np.testing.assert_array_equal(tiny.logits(one), tiny.logits([ids]))
        found, (same, other) = tiny.inspect(one), tiny.inspect([one, [5, 6]])
        assert found.pieces == same.pieces and len(other.token_ids) == 2
        np.testing.assert_array_equal(found.captured.router_probs, same.captured.router_probs)
    assert tiny.logits(["The cat", "The cat"]).shape == (2, len(ids), 4096)
    assert tiny.score_tokens("The cat").greedy.shape == (len(ids),)
    assert tiny.decode(ids) == "The cat" and tiny.decode([ids, [5]]) == ["The cat", "\n\n"]


@pytest.mark.parametrize("prompts", [None, 5, b"cat", {5, 6}, {"cat": 1}, np.array(5)], ids=str)
@pytest.mark.parametrize("method", ["generate", "score", "inspect", "decode", "generate_events"])
def test_what_is_no_prompt_is_refused(method, prompts, tiny):
    with pytest.raises(ValueError, match="expected a string, token ids, a Request, or a list of"):
        getattr(tiny, method)(prompts)


@pytest.mark.parametrize("prompt", [5, np.array(5), {5: 6}, None], ids=str)
@pytest.mark.parametrize("method", ["submit", "check"])
def test_a_number_is_no_prompt(method, prompt, tiny):
    with pytest.raises(ValueError, match="expected a string or a list of token ids, got"):
        getattr(tiny, method)(prompt)
    with pytest.raises(ValueError, match="expected integer token ids"):
        tiny.logits(prompt)


def test_settings_beside_a_request_are_refused(tiny):
    with pytest.raises(ValueError, match="max_len is given with a Request, which has its own"):
        tiny.generate(["The cat", Request("The cat")], max_len=3)
    with pytest.raises(
        TypeError, match="Request has no field 'max_length'; the nearest is max_len"
    ):
        tiny.generate("The cat", max_length=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bf16"}, "dtype: expected float32 or bfloat16, got 'bf16'"),
        ({"slots": 0}, "slots: expected an integer >= 1, got 0"),
        ({"slots": "2"}, "slots: expected an integer >= 1, got '2'"),
        ({"mesh": (1,)}, "mesh: expected the sizes .data, model., two integers, got .1,"),
        ({"mesh": 8}, "mesh: expected the sizes"),
        ({"pad_sizes": [16.5]}, "pad_sizes: expected a list of integers >= 1, got .16.5."),
        ({"pad_sizes": []}, "pad_sizes: expected a list of integers >= 1"),
        ({"pad_sizes": 16}, "pad_sizes: expected a list of integers >= 1, got 16"),
        ({"directory": "no/such"}, "no/such: expected a directory that holds ckpt-0 or model"),
        ({"directory": ""}, "directory: expected a path, or None, got ''"),
        ({"directory": 5}, "directory: expected a path, or None, got 5"),
        ({"tokenizer_path": 5}, "tokenizer_path: expected a path, or None, got 5"),
        ({"kernels": "no"}, "kernels: expected true or false, got 'no'"),
        ({"compile_cache": 1}, "compile_cache: expected true or false, got 1"),
    ],
)
def test_load_server_says_what_is_wrong(options, message):
    directory = golden.DIRECTORY / "three-layers"
    with pytest.raises(ValueError, match=message):
        load_server(**{"directory": directory, **options})


@pytest.mark.parametrize("name", ["jax_enable_x64", "jax_disable_jit", "jax_no_tracing"])
def test_settings_of_jax_that_the_model_does_not_know_are_refused(name):
    jax.config.update(name, True)
    try:
        with pytest.raises(ValueError, match=f"{name}: expected False, got True; leave"):
            make()
    finally:
        jax.config.update(name, False)


def test_words_need_a_tokenizer():
    with pytest.raises(ValueError, match="needs a tokenizer"):
        golden.runner("three-layers").generate([Request("words")])


def test_a_tokenizer_of_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="131072 pieces .* got 4096; fetch the tokenizer.model"):
        load_tokenizer(TOKENIZER, 131072)


@pytest.mark.parametrize("length", [1, 8, 9, 31, 64])
def test_logits_are_those_of_one_forward_pass(length, tiny):
    ids = np.random.default_rng(0).integers(3, 4096, [2, length])
    expected = jax.jit(lambda p, t: apply_model(TINY, ONE_DEVICE, p, t).logits)(tiny.params, ids)
    got = tiny.logits(ids)
    assert got.shape == (2, length, 4096)
    assert got.dtype == np.float32
    assert golden.relative_error(got, np.asarray(expected)).max() < 1e-5


def test_logits_of_more_rows_than_slots(tiny):
    ids = np.random.default_rng(0).integers(3, 4096, [6, 5])
    assert np.array_equal(tiny.logits(ids)[5], tiny.logits(ids[5])[0])


def test_logits_refuse_more_than_the_context(tiny):
    with pytest.raises(ValueError, match="at most the context of 64 tokens, got 65"):
        tiny.logits([5] * 65)


def test_logits_and_score_refuse_what_are_no_tokens(tiny):
    with pytest.raises(ValueError, match="rows of different lengths"):
        tiny.logits([[5, 6], [7]])
    with pytest.raises(ValueError, match="expected integer token ids"):
        tiny.logits([[5.5, 6]])
    with pytest.raises(ValueError, match="expected a string or a list of token ids, got None"):
        tiny.score([None, 6])
    with pytest.raises(ValueError, match="expected token ids from 0 to 4095, got 5.5"):
        tiny.score([5.5, 6])


def test_scores_need_a_tokenizer_with_bos(monkeypatch, tiny):
    without = types.SimpleNamespace(bos_id=lambda: -1)
    monkeypatch.setitem(vars(tiny), "tokenizer", without)
    with pytest.raises(ValueError, match="tokenizer with a piece for the beginning of a text"):
        tiny.score(["The cat"])


def score_by_hand(server, ids, start, end, bos=True):
    """Log-probabilities of ids[start:end], read from the logits of one window."""
    window = ([1] if bos else []) + ids[start:end]
    logits = server.logits(window[:-1])[0].astype(np.float64)
    scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return scores[np.arange(len(window) - 1), window[1:]]


def test_score_counts_every_token_once_given_bos(tiny):
    text = "The cat sat on the mat."
    ids = tiny.tokenizer.encode(text)
    [scores] = tiny.score([text])
    assert len(scores) == len(ids)
    np.testing.assert_allclose(scores, score_by_hand(tiny, ids, 0, len(ids)), atol=1e-5)


@pytest.mark.parametrize("length", [64, 65, 96, 97, 150])
def test_long_texts_are_scored_in_windows_that_overlap_by_half(length, tiny):
    ids = np.random.default_rng(length).integers(3, 4096, length).tolist()
    [scores] = tiny.score([ids])
    expected = list(score_by_hand(tiny, ids, 0, 64))
    # A window from `begin` reads ids[begin - 1 : begin + 63] and counts its second half.
    for begin in range(32, length - 32, 32):
        end = min(begin + 64, length)
        window = score_by_hand(tiny, ids, begin - 1, end, bos=False)
        expected += list(window[32:])
    np.testing.assert_allclose(scores, expected, atol=1e-5)


def test_scores_do_not_depend_on_what_else_is_scored(tiny):
    rng = np.random.default_rng(5)
    texts = [rng.integers(3, 4096, n).tolist() for n in (3, 64, 100, 1, 33)]
    together = tiny.score(texts)
    for text, scores in zip(texts, together, strict=True):
        np.testing.assert_allclose(tiny.score([text])[0], scores, atol=1e-5)


def test_score_of_nothing_is_nothing(tiny):
    assert [len(scores) for scores in tiny.score(["", "Once"])] == [0, len(tiny.encode("Once"))]


def test_a_device_with_too_little_memory_is_told_before_anything_is_loaded(monkeypatch):
    """Forgetting the mesh with the real weights ended in an error of the allocator, if at all."""

    class Small:
        platform = "gpu"

        def memory_stats(self):
            return {"bytes_limit": 1_200_000, "bytes_in_use": 200_000}

    config = golden.config("three-layers", "float32")
    runner = ModelRunner(config, 1, golden.DIRECTORY / "three-layers")
    monkeypatch.setattr("grok1.serving.memory_budget.jax.local_devices", lambda: [Small()])
    monkeypatch.setattr("runner.checkpoint.load", None)
    message = r"weights and cache take 0.0 GiB on each device, and 0.0 GiB are free; .*MEM_FRACTION"
    with pytest.raises(ValueError, match=message):
        runner.check(None)
