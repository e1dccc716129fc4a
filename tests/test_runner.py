"""A runner: prompts and settings in, answers out, and the reason why each answer ends."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import checkpoint
import golden
import reference
from grok1.serving import steps
from grok1.serving.request import CheckedRequest
from grok1.serving.scheduler import chunk_lengths
from grok1.serving.steps import EMBEDDINGS, MOST_TOKENS
from model import LanguageModelConfig
from runner import (
    InferenceRunner,
    ModelRunner,
    Request,
    load_server,
    load_tokenizer,
    sample_from_model,
)
from servers import SLOTS, TINY, TOKENIZER, drain, logprobs, make, server


def test_slots_are_per_device_and_fill_the_data_axis():
    for mesh, per_device, slots in (
        ((1, 8), 0.125, 1),
        ((1, 8), 1, 8),
        ((1, 8), 2, 16),
        ((4, 2), 0.125, 4),
    ):
        assert ModelRunner(TINY, per_device, None).num_slots(golden.device_mesh(mesh)) == slots


@pytest.mark.parametrize(
    "name", ["three-layers", pytest.param("twelve-layers", marks=pytest.mark.exhaustive)]
)
def test_greedy_tokens_are_exact_until_a_near_tie(name):
    """And equal to those of the original, which are bfloat16, until a less near one."""
    recorded = golden.recorded(name).greedy
    prompts = [entry["prompt"] for entry in recorded]
    requests = [Request(prompt, temperature=0.0, max_len=40) for prompt in prompts]
    answers = [answer.token_ids for answer in golden.runner(name, "float32").generate(requests)]
    tokens = np.zeros([len(prompts), max(map(len, prompts)) + 40], np.int32)  # 0 is the pad
    for row, prompt, answer in zip(tokens, prompts, answers, strict=True):
        row[: len(prompt) + len(answer)] = prompt + answer
    logits = reference.forward(*golden.reference_model(name), tokens)
    for row, entry, answer in zip(logits, recorded, answers, strict=True):
        first = len(entry["prompt"]) - 1
        given = row[first : first + len(answer)]  # the logits that each token is drawn from
        second, best = np.sort(given)[:, -2:].T
        certain = np.logical_and.accumulate(best - second >= 1e-3)
        assert certain.sum() > 10
        assert (given.argmax(-1) == answer)[certain].all()
        differs = [i for i, token in enumerate(answer) if token != entry["greedy"][i]]
        assert not differs or (best - second)[differs[0]] < 0.15


def test_nothing_compiles_after_the_first_request():
    own = make(slots=2, pad_sizes=(8,))
    own.generate([Request([5], max_len=2)])
    functions = (steps.start, steps.prefill, steps.first_token, steps.decode, steps.new_state)
    compiled = [function._cache_size() for function in functions]
    requests = [
        Request([*range(3, 23)], temperature=0.0, max_len=4),
        Request([4], temperature=2.0, nucleus_p=0.1, top_k=3, rng_seed=9, max_len=7),
        Request([9, 9], allowed_tokens=[5, 6, 7], max_len=5, num_samples=3),
        Request("The cat", min_p=0.1, repetition_penalty=1.1, logit_bias={5: 1.0}, max_len=9),
    ]
    handles = [own.submit(request) for request in requests]
    for _ in range(3):
        own.step()
    own.cancel(handles[2])
    while own.busy:
        own.step(8)
    own._scheduler.release()
    own.generate([Request([5] * 40, max_len=2)])
    assert [function._cache_size() for function in functions] == compiled


# --------------------------------------------------------------------------- the compiled steps


@pytest.mark.parametrize(
    ("length", "chunks"), [(1, [8]), (8, [8]), (9, [32]), (32, [32]), (40, [32, 8]), (63, [32, 32])]
)
def test_rest_of_prompt_is_read_in_the_smallest_chunk(length, chunks):
    assert chunk_lengths(length, [8, 32]) == chunks


def decode(limits, running, count, until_free):
    """Decode one sequence for each limit on its tokens, in the first slots of the shared server."""
    how = {"config": TINY, "execution": server().executions.decode}
    state = steps.new_state(batch=SLOTS, **how)
    state = jax.device_put(state, jax.tree.leaves(server().params)[0].sharding)
    for slot, limit in enumerate(limits):
        request = Request([5], max_len=limit, ignore_eos=True)
        row = CheckedRequest(request, TINY, None).slot()
        state = steps.start(state, np.int32(slot), row, np.int32(0), **how)
    given = np.array(running), np.int32(count), np.bool_(until_free)
    rows, state = steps.decode(server().params, state, *given, **how, hook_args=())
    return steps.unpack(np.asarray(rows)), state


def test_decode_changes_only_active_running_slots():
    found, state = decode([40, 40], [True, False, True, True], 3, until_free=False)
    assert state.memory.layers.step.tolist() == state.slots.drawn.tolist() == [3, 0, 0, 0]
    assert found.drawn.sum(axis=0).tolist() == [3, 0, 0, 0]
    assert not found.token[:, 1:].any()
    assert state.slots.settings.active.tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("until_free", "drawn"), [(False, [2, MOST_TOKENS, 0, 0]), (True, [2, 2, 0, 0])]
)
def test_decode_stops_at_the_first_end_if_others_wait(until_free, drawn):
    found, state = decode([2, 40], [True] * SLOTS, MOST_TOKENS, until_free)
    assert found.drawn.sum(axis=0).tolist() == state.slots.drawn.tolist() == drawn
    assert state.slots.settings.active.tolist() == [False, True, False, False]


# -------------------------------------------------------------------------- how an answer ends


def test_answer_ends_at_max_len_or_with_the_context():
    prompt = [*range(10, 70)]
    open_ended, exact = server().generate(
        [Request(prompt, temperature=0.0), Request(prompt, temperature=0.0, max_len=4)]
    )
    assert len(prompt) + len(exact.token_ids) == TINY.sequence_len
    assert open_ended.token_ids == exact.token_ids
    assert (open_ended.finish_reason, exact.finish_reason) == ("context", "length")


def test_truncated_prompt_keeps_its_newest_tokens():
    prompt, left = [*range(10, 110)], {"temperature": 0.0, "truncate": "left"}
    truncated, expected, short, full = server().generate(
        [
            Request(prompt, **left, max_len=5),
            Request(prompt[-59:], temperature=0.0, max_len=5),
            Request([5, 6], **left, max_len=5),
            Request(prompt, **left),
        ]
    )
    assert truncated == expected and len(truncated.token_ids) == 5
    assert truncated.prompt_ids == prompt[-59:]
    assert short.prompt_ids == [5, 6]
    assert full.prompt_ids == prompt[-63:] and len(full.token_ids) == 1


def test_eos_ends_answer_unless_ignored_or_too_early(monkeypatch):
    """The original code never stops at it."""
    eos = 77
    monkeypatch.setitem(vars(server()), "config", dataclasses.replace(TINY, eos_token=eos))
    asked = {"temperature": 0.0, "max_len": 6, "logit_bias": {eos: 1e4}}
    ended, ignored, later = server().generate(
        [
            Request([5], **asked),
            Request([5], **asked, ignore_eos=True),
            Request([5], **asked, min_len=4),
        ]
    )
    assert (ended.token_ids, ended.finish_reason) == ([eos], "eos")
    assert (ignored.token_ids, ignored.finish_reason) == ([eos] * 6, "length")
    assert later.finish_reason == "eos" and later.token_ids.index(eos) == 4


def test_answer_ends_without_its_stop_token_or_string():
    asked = {"rng_seed": 4, "max_len": 30, "temperature": 0.0}
    (free,) = server().generate([Request("The cat", **asked)])
    middle = free.token_ids[12]
    first = free.token_ids.index(middle)
    (by_token,) = server().generate([Request("The cat", **asked, stop_tokens=[middle])])
    assert by_token.token_ids == free.token_ids[: first + 1] and by_token.finish_reason == "stop"
    text = server().tokenizer.decode([*free.prompt_ids, *free.token_ids[:first]])
    assert by_token.text == text.removeprefix("The cat")
    stop = free.text[20:26]
    cut = free.text.index(stop)
    stops = ["not in the text", stop]
    *_, last = events = list(server().generate_events([Request("The cat", **asked, stop=stops)]))
    by_text = last.completion
    assert by_text.text == "".join(event.text for event in events) == free.text[:cut]
    assert by_text.finish_reason == "stop"
    count = len(by_text.token_ids)
    assert by_text.token_ids == free.token_ids[:count] and count < len(free.token_ids)
    # A stop string may begin before min_len, but not end before it.
    *same, late = server().generate(
        [Request("The cat", **asked, stop=stop, min_len=least) for least in range(count + 2)]
    )
    assert {(answer.text, *answer.token_ids) for answer in same} == {
        (by_text.text, *by_text.token_ids)
    }
    assert late.text.startswith(free.text[: cut + len(stop)])


# ------------------------------------------------------------------------------- what is drawn


def test_mask_bias_and_penalties_reach_the_sampler():
    free = server().generate([5, 6], temperature=0.0, max_len=30)
    wanted, before = 77, [5, 6, *free.token_ids]
    masked, biased, once, novel = server().generate(
        [
            Request([5, 6], allowed_tokens=[70, 71, 72], max_len=20),
            Request([5, 6], temperature=0.0, max_len=3, logit_bias={wanted: 1e4, 3: -5}),
            Request([5, 6], temperature=0.0, max_len=30, presence_penalty=1e4),
            Request(before, temperature=0.0, max_len=30, repetition_penalty=1e4),
        ]
    )
    assert set(masked.token_ids) <= {70, 71, 72} and len(set(masked.token_ids)) > 1
    assert biased.token_ids == [wanted] * 3
    assert len(set(free.token_ids)) < 30  # without a penalty, greedy answers repeat tokens
    assert len(set(once.token_ids)) == 30
    assert len(set(novel.token_ids)) == 30 and not {*before} & {*novel.token_ids}


def test_frequency_penalty_counts_tokens():
    penalty = 0.25
    answer = server().generate(
        [5, 6], temperature=0.0, max_len=30, frequency_penalty=penalty, ignore_eos=True
    )
    logits = server().logits([[5, 6, *answer.token_ids]])[0]
    counts = np.zeros(logits.shape[-1])
    for position, token in enumerate(answer.token_ids, 1):
        assert token == np.argmax(logits[position] - penalty * counts)
        counts[token] += 1
    assert counts.max() > 1  # also with the penalty, some token is drawn twice


def test_logprobs_are_the_models_own_before_filters():
    asked, plain = server().generate(
        [
            Request([5, 6, 7], temperature=0.3, nucleus_p=0.2, top_k=5, max_len=6, top_logprobs=3),
            Request([9], max_len=2),
        ]
    )
    ids = asked.prompt_ids + asked.token_ids
    scores = logprobs(ids)[2:-1]
    expected = scores[np.arange(6), asked.token_ids]
    np.testing.assert_allclose(asked.logprobs, expected, atol=1e-5)
    for found, row in zip(asked.top_logprobs, scores, strict=True):
        best = np.argsort(-row, kind="stable")[:3]
        assert [token for token, _ in found] == best.tolist()
        np.testing.assert_allclose([p for _, p in found], row[best], atol=1e-5)
    assert plain.top_logprobs == []


# -------------------------------------------------------------------------- prompts and their text


def test_text_is_what_the_tokens_add_to_the_prompt():
    prompt = "The cat sat on"
    *_, last = events = list(server().generate_events([Request(prompt, rng_seed=4, max_len=20)]))
    answer = last.completion
    whole = server().tokenizer.decode(answer.prompt_ids + answer.token_ids)
    assert whole == prompt + answer.text
    assert "".join(event.text for event in events) == answer.text


def test_prompt_special_pieces_are_text_unless_parsed():
    prompt = "The end.<|separator|>[EOS]"
    plain = server().generate(prompt, max_len=1)
    special = server().generate(prompt, max_len=1, parse_special=True)
    assert plain.prompt == special.prompt == server().tokenizer.decode(plain.prompt_ids) == prompt
    assert not {2, 47} & set(plain.prompt_ids)
    assert special.prompt_ids[-2:] == [47, 2]


def test_sample_from_model_works_as_published():
    running = server().run()
    text = sample_from_model(running, "Once upon a time", max_len=8, temperature=0.01)
    again = sample_from_model(running, "Once upon a time", max_len=8, temperature=0.01)
    request = Request("Once upon a time", 0.01, 1.0, 42, 8)
    assert text == again == server().generate([request])[0].text
    assert text


@pytest.mark.parametrize("one", ["The cat", np.array([5, 6]), jnp.array([5, 6])], ids=repr)
def test_text_or_ids_are_equal_to_a_request(one):
    greedy = {"temperature": 0.0, "max_len": 5}
    (expected,) = server().generate([Request(one, **greedy)])
    assert server().generate(one, **greedy) == expected
    assert server().generate(Request(one, **greedy)) == expected
    assert server().generate([one, one], **greedy) == [expected] * 2
    ids = [event.token_id for event in server().stream(server().submit(one, **greedy))]
    assert ids == expected.token_ids
    assert [event.token_id for event in server().generate_events(one, **greedy)] == ids


def test_one_prompt_gets_one_result_and_several_a_list():
    ids = server().encode("The cat")
    for one in ("The cat", ids):
        np.testing.assert_array_equal(server().score(one), server().score([ids])[0])
        np.testing.assert_array_equal(server().logits(one), server().logits([ids]))
        found, (same, other) = server().inspect(one), server().inspect([one, ids[::-1]])
        assert found.pieces == same.pieces == other.pieces[::-1]
        np.testing.assert_array_equal(found.captured.router_probs, same.captured.router_probs)
    assert server().logits(["The cat", "The cat"]).shape == (2, len(ids), 4096)
    assert server().score_tokens("The cat").greedy.shape == (len(ids),)
    assert server().decode(ids) == "The cat" and server().decode([ids, [5]]) == ["The cat", "\n\n"]
    two = server().generate(Request("The cat", num_samples=2, max_len=3))
    assert [len(answer.token_ids) for answer in two] == [3, 3]
    mixed = server().generate(["The cat", [5, 6], Request([9], max_len=3)])
    assert [answer.prompt_ids for answer in mixed] == [ids, [5, 6], [9]]
    for method in ("generate", "score", "inspect", "decode"):
        assert getattr(server(), method)([]) == []


def test_ids_from_an_iterator_are_read_once():
    assert server().encode(iter([5, 6])) == [5, 6]
    np.testing.assert_array_equal(server().score([map(int, "56")])[0], server().score([[5, 6]])[0])


# ------------------------------------------------------------------------------------- errors


def test_wrong_request_is_named_before_any_token():
    with pytest.raises(ValueError, match="request 2: max_len must be an integer of at least 1"):
        next(server().generate_events([Request([5]), Request([5], max_len=0)]))
    assert not server().busy


@pytest.mark.parametrize("prompts", [None, 5, b"cat", {5, 6}, {"cat": 1}, np.array(5)], ids=str)
def test_what_is_no_prompt_is_refused(prompts):
    with pytest.raises(ValueError, match="expected a string, token ids, a Request, or a list of"):
        server().decode(prompts)


@pytest.mark.parametrize(
    "method", ["generate", "generate_events", "score", "inspect", "submit", "check"]
)
def test_every_method_refuses_a_number_for_a_prompt(method):
    with pytest.raises(ValueError, match="expected a string(, token ids, a Request,)? or a list "):
        getattr(server(), method)(5)


def test_settings_unknown_or_with_request_are_refused():
    with pytest.raises(ValueError, match="max_len is given with a Request, which has its own"):
        server().generate(["The cat", Request("The cat")], max_len=3)
    with pytest.raises(TypeError, match="no field 'max_length'; the nearest is max_len"):
        server().generate("The cat", max_length=3)


@pytest.mark.parametrize("tokens", [0, MOST_TOKENS + 1, 1.5, None, True])
def test_wrong_number_of_tokens_per_step_ends_nothing(tokens):
    drain()
    handle = server().submit(Request([5], max_len=2, ignore_eos=True))
    expected = f"tokens must be an integer from 1 to {MOST_TOKENS}, got {tokens}"
    with pytest.raises(ValueError, match=expected):
        server().step(tokens)
    with pytest.raises(ValueError, match=expected):
        server().stream(handle, tokens)
    with pytest.raises(ValueError, match="tokens must be"):
        next(server().generate_events([Request([6])], tokens=tokens))
    assert len(list(server().stream(handle, tokens=MOST_TOKENS))) == 2 and not server().busy


def test_runner_not_initialized_says_what_to_call():
    early = InferenceRunner("early", ModelRunner(TINY, 1, None), None, None)
    message = r"early: nothing is loaded yet; call initialize\(\)"
    for method in ("generate", "generate_events", "submit", "logits", "score", "inspect"):
        with pytest.raises(ValueError, match=message):
            getattr(early, method)([5])
    for method in ("step", "model"):
        with pytest.raises(ValueError, match=message):
            getattr(early, method)()


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
        ({"directory": "no/such"}, "no/such: expected a directory that holds ckpt-0, model"),
        ({"directory": ""}, "directory: expected a path, or None, got ''"),
        ({"tokenizer_path": 5}, "tokenizer_path: expected a path, or None, got 5"),
        ({"kernels": "no"}, "kernels: expected true or false, got 'no'"),
        ({"compile_cache": 1}, "compile_cache: expected true or false, got 1"),
    ],
)
def test_load_server_names_a_wrong_argument(options, message):
    directory = golden.DIRECTORY / "three-layers"
    with pytest.raises(ValueError, match=message):
        load_server(**{"directory": directory, **options})


@pytest.mark.parametrize("name", ["jax_enable_x64", "jax_disable_jit", "jax_no_tracing"])
def test_unsupported_jax_settings_are_refused(name):
    jax.config.update(name, True)
    try:
        with pytest.raises(ValueError, match=f"{name}: expected False, got True; leave"):
            make()
    finally:
        jax.config.update(name, False)


def test_tokenizer_of_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match="131072 pieces .* got 4096; fetch the tokenizer.model"):
        load_tokenizer(TOKENIZER, 131072)


def test_embedding_is_stored_in_the_activation_dtype(monkeypatch):
    module, name = EMBEDDINGS
    config, path = golden.config("three-layers", "bfloat16"), golden.DIRECTORY / "three-layers"
    stored = ModelRunner(config, 1, path).load_or_init(None)
    random = {module: {name: np.zeros([2, 2], np.float32)}}
    monkeypatch.setattr(LanguageModelConfig, "init_params", lambda *_, **__: random)
    created = ModelRunner(config, 1, None).load_or_init(None)
    assert created[module][name].dtype == stored[module][name].dtype == "bfloat16"


def test_files_in_place_may_be_larger_than_memory(tmp_path, monkeypatch):
    """Only the cache is held, and a table that is cast."""
    config = golden.config("three-layers", "float32")
    checkpoint.convert(golden.DIRECTORY / "three-layers", tmp_path, "mapped")
    cache = 2 * 4 * 3 * config.sequence_len * config.model.num_kv_heads * config.model.key_size
    table = 2 * config.vocab_size * config.model.emb_size
    bf16 = dataclasses.replace(config, fprop_dtype=jnp.bfloat16)
    for model, directory, free, fits in (
        (config, golden.DIRECTORY / "three-layers", 2 * cache, False),
        (config, tmp_path, int(1.1 * cache), True),
        (config, tmp_path, int(0.9 * cache), False),
        (bf16, tmp_path, cache // 2 + int(1.1 * table), True),
        (bf16, tmp_path, cache // 2 + int(0.9 * table), False),
    ):
        monkeypatch.setattr("grok1.serving.memory_budget.available_memory", lambda free=free: free)
        with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="are free"):
            ModelRunner(model, 1, directory).check(None)


def test_too_little_memory_is_reported_before_loading(monkeypatch):
    class Small:
        platform = "gpu"

        def memory_stats(self):
            return {"bytes_limit": 1_200_000, "bytes_in_use": 200_000}

    config = golden.config("three-layers", "float32")
    runner = ModelRunner(config, 1, golden.DIRECTORY / "three-layers")
    monkeypatch.setattr("grok1.serving.memory_budget.jax.local_devices", lambda: [Small()])
    message = r"weights and cache take 0.0 GiB on each device, and 0.0 GiB are free; .*MEM_FRACTION"
    with pytest.raises(ValueError, match=message):
        runner.check(None)
