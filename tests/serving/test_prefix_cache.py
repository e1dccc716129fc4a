"""A prompt that begins like one that a slot holds reads only the rest, and gets the same bits."""

import functools
import random

import numpy as np
import pytest

from grok1.serving import scheduler
from grok1.serving.request import Request
from grok1.serving.scheduler import Scheduler, Statistics
from servers import SLOTS, drain, make, sample

CHUNK = 16
SIZES = (4, CHUNK)


def tokens(seed, count=48):
    """Return random token ids, without those that end a text or are padding."""
    return random.Random(seed).choices(range(3, 4096), k=count)


FIRST, SECOND, THIRD = (tokens(seed) for seed in range(3))
ASKED = {"max_len": 5, "ignore_eos": True, "top_logprobs": 2}


@functools.cache
def shared(slots=SLOTS, mesh=(1, 1), prefix_cache=True):
    return make(slots=slots, mesh=mesh, pad_sizes=SIZES, prefix_cache=prefix_cache)


def fresh(slots=SLOTS, mesh=(1, 1)):
    """Return a server whose slots hold nothing."""
    own = shared(slots, mesh)
    drain(own)
    own._scheduler.alone(own._scheduler.release)
    own.statistics = Statistics()
    return own


_known = {}


def expected(request, slots=SLOTS, mesh=(1, 1)):
    """Return the answers of a server that reads every prompt in full."""
    key = repr(request), slots, mesh
    if key not in _known:
        samples = [sample(request, i) for i in range(request.num_samples)]
        _known[key] = shared(slots, mesh, False).generate(samples)
    return _known[key]


def reused(own):
    """Return how many prompt tokens were not read since the last call."""
    found, own.statistics = own.statistics.reused_tokens, Statistics()
    return found


@pytest.fixture
def starts(monkeypatch):
    """The slot, the number of tokens kept and their source, for each start with the cache."""
    calls, run = [], Scheduler._run

    def recorded(self, step, *inputs, **options):
        if step is scheduler.start and self._prefix_cache:
            calls.append(tuple(int(inputs[i]) for i in (1, 3, 4)))
        return run(self, step, *inputs, **options)

    monkeypatch.setattr(Scheduler, "_run", recorded)
    return calls


@pytest.fixture
def chunks(monkeypatch):
    """The compiled length of each chunk read, its tokens, and whether with the cache."""
    calls, run = [], Scheduler._run

    def recorded(self, *inputs, kind=None, **options):
        if kind is not None:
            calls.append((kind[0], int(inputs[4].max()), self._prefix_cache))
        return run(self, *inputs, kind=kind, **options)

    monkeypatch.setattr(Scheduler, "_run", recorded)
    return calls


# ------------------------------------------------------------------------------- what is taken over


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("donor", ["finished", "decoding", "cancelled"])
def test_shared_chunks_are_copied_and_bits_are_equal(starts, count, donor):
    own, beginning = fresh(), FIRST[: count * CHUNK]
    first, second = (Request([*beginning, *tokens(9 + i, 3 + i)], **ASKED) for i in range(2))
    asked = own.submit(first)
    while len(asked.completion.token_ids) < (5 if donor == "finished" else 2):
        own.step()
    if donor == "cancelled":
        own.cancel(asked)
    assert own.generate([second]) == expected(second)
    assert reused(own) == len(beginning)
    slot = 1 if donor == "decoding" else 0  # a free slot is continued itself
    assert starts == [(0, 0, 0), (slot, len(beginning), 0)]
    assert donor == "cancelled" or [asked.completion] == expected(first)


def test_rest_of_a_prompt_is_read_in_its_own_chunks(chunks):
    own = fresh()
    requests = [Request([*FIRST[:32], *tokens(5 + i, 6)], **ASKED) for i in range(3)]
    answers = own.generate(requests)
    whole, rest = (CHUNK, CHUNK, True), (CHUNK, 6, True)
    assert chunks == [whole, whole, rest, rest, rest]
    assert answers == [answer for request in requests for answer in expected(request)]
    assert own.statistics.prompt_tokens == 3 * 38 and own.statistics.reused_tokens == 2 * 32


@pytest.mark.parametrize(
    ("held", "asked", "kept"),
    [
        (26, 40, 16),  # ten tokens filled no chunk, though they were read in one of the same length
        (20, 40, 16),
        (15, 40, 0),
        (32, 32, 16),  # the last chunk gives the logits after it
        (32, 33, 32),
        (48, 32, 16),
        (48, 17, 16),
        (48, 16, 0),
    ],
)
def test_only_whole_chunks_are_shared(held, asked, kept):
    own = fresh()
    own.generate([Request(FIRST[:held], **ASKED)])
    request = Request(FIRST[:asked], **ASKED)
    reused(own)
    assert own.generate([request]) == expected(request)
    assert reused(own) == kept


@pytest.mark.parametrize(("place", "kept"), [(0, 0), (15, 0), (16, 16), (31, 16), (32, 32)])
def test_chunks_before_the_first_difference_are_shared(place, kept):
    own, other = fresh(), [*FIRST]
    other[place] += 1
    own.generate([Request(FIRST, **ASKED)])
    request = Request(other, **ASKED)
    assert own.generate([request]) == expected(request)
    assert reused(own) == kept


@pytest.mark.parametrize("read", [1, 2])
def test_prompt_read_in_part_gives_what_was_read(read):
    own = fresh()
    stopped = own.submit(Request([*FIRST, 7], **ASKED))
    for _ in range(read):
        own.step()
    own.cancel(stopped)
    request = Request([*FIRST, 8, 9], **ASKED)
    assert own.generate([request]) == expected(request)
    assert reused(own) == read * CHUNK


@pytest.mark.parametrize("donor", ["free", "decoding"])
def test_padding_in_a_shared_beginning_stays_masked(donor):
    own, beginning = fresh(), [*FIRST[:32]]
    beginning[0] = beginning[5] = beginning[15] = beginning[16] = beginning[31] = 0
    own.generate([Request(SECOND, max_len=3)] * SLOTS)  # keys that were visible
    asked = own.submit(Request([*beginning, 7], max_len=12, ignore_eos=True))
    while len(asked.completion.token_ids) < (2 if donor == "decoding" else 12):
        own.step()
    reused(own)
    request = Request([*beginning, 8, 9], **ASKED)
    assert own.generate([request]) == expected(request)
    assert reused(own) == 32


def test_answer_of_an_earlier_request_is_read_again():
    """Decode steps round differently."""
    own, first = fresh(), Request(FIRST[:15], **{**ASKED, "max_len": 30})
    (answer,) = own.generate([first])
    request = Request([*FIRST[:15], *answer.token_ids, 9], **ASKED)
    assert own.generate([request]) == expected(request)
    assert reused(own) == 0


def test_waiting_prompts_share_with_those_before_them(starts):
    """They come at once: each takes what has been read when its own turn comes."""
    own = fresh()
    requests = [Request([*FIRST[:32], 5 + i], **ASKED) for i in range(2 * SLOTS)]
    answers = own.generate(requests)
    assert [kept for _, kept, _ in starts] == [0] + [32] * (2 * SLOTS - 1)
    assert answers == [answer for request in requests for answer in expected(request)]


# ----------------------------------------------------------------------------- which slot is taken


def visit(own, prompt, **changes):
    """Answer a request with this prompt, and return how much of it was not read."""
    request = Request(prompt, **ASKED | changes)
    answers = own.generate([request])
    answers = answers if isinstance(answers, list) else [answers]
    assert answers == expected(request, own.num_slots)
    return reused(own)


def test_least_recently_used_prefix_goes_first():
    own = fresh(slots=2)
    assert [visit(own, [*ids, 5]) for ids in (FIRST, SECOND)] == [0, 0]
    assert visit(own, [*FIRST, 6]) == 48
    assert visit(own, [*THIRD, 5]) == 0  # instead of SECOND
    assert visit(own, [*FIRST, 7]) == 48
    assert visit(own, [*SECOND, 7]) == 0  # instead of THIRD
    assert visit(own, [*FIRST, 8]) == 48


def test_prefix_is_used_as_long_as_its_answer_is_drawn():
    own = fresh(slots=2)
    long = own.submit(Request([*FIRST, 5], max_len=12, ignore_eos=True))
    short = own.submit(Request([*SECOND, 5], max_len=1))
    while not short.finished:
        own.step()
    assert not long.finished
    drain(own)
    assert reused(own) == 0
    assert visit(own, [*THIRD, 5]) == 0  # instead of SECOND
    assert visit(own, [*FIRST, 6]) == 48


def test_prefix_that_is_copied_counts_as_used(starts):
    own = fresh(slots=3)
    for ids in (SECOND, FIRST, THIRD):
        visit(own, [*ids, 5])
    assert visit(own, [*FIRST[:16], *tokens(7, 20)]) == 16
    assert starts[-1] == (0, 16, 1)  # instead of SECOND
    assert visit(own, tokens(8)) == 0  # instead of THIRD
    assert visit(own, [*FIRST, 6]) == 48


def test_longer_prefix_is_not_lost_while_a_slot_is_unused(starts):
    own = fresh()
    visit(own, [*FIRST, 5])
    assert visit(own, [*FIRST[:16], *SECOND[:20]]) == 16
    assert starts[-1] == (1, 16, 0)
    assert visit(own, [*FIRST, 6]) == 48 and starts[-1] == (0, 48, 0)
    assert visit(own, [5]) == 0 and starts[-1][0] == 2
    assert visit(own, [6]) == 0 and starts[-1][0] == 3
    assert visit(own, [7]) == 0 and starts[-1][0] == 2  # what it holds is shorter than a chunk


def test_beginning_is_copied_before_its_slot_is_overwritten(starts):
    """Both are given a slot in the same step, and the second takes that of the first's source."""
    own = fresh(slots=2)
    visit(own, [*SECOND[:20], 5])
    visit(own, [*FIRST, 5])
    requests = [Request([*FIRST[:16], *tokens(7, 20)], **ASKED), Request(THIRD, **ASKED)]
    answers = own.generate(requests)
    assert starts[-2:] == [(0, 16, 1), (1, 0, 1)]
    assert answers == [answer for request in requests for answer in expected(request, 2)]


# ---------------------------------------------------------------------------- what is not shared


@pytest.mark.parametrize("scored", [(True, False), (False, True), (True, True)])
def test_prompt_with_logprobs_neither_gives_nor_takes(scored):
    own = fresh()
    for place, each in enumerate(scored):
        assert visit(own, [*FIRST, 5 + place], prompt_logprobs=each) == 0


def test_samples_take_the_prompt_once_it_is_read(starts):
    own = fresh()
    visit(own, [*FIRST[:32], 5])
    assert visit(own, [*FIRST[:32], 6, 7], num_samples=SLOTS + 3) == 32 + (SLOTS + 2) * 34
    assert [kept for _, kept, _ in starts] == [0, 32] + [34] * (SLOTS + 2)
    scored = {"num_samples": SLOTS + 1, "prompt_logprobs": True}
    assert visit(own, [*FIRST[:32], 8], **scored) == SLOTS * 33


def test_failed_step_forgets_all_prefixes(monkeypatch):
    own = fresh()
    own.generate([Request([*FIRST, 5], **ASKED)])

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(scheduler, "decode", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            own.generate([Request([*SECOND, 5], **ASKED)])
    drain(own)
    reused(own)
    assert visit(own, [*FIRST, 6]) == visit(own, [*SECOND, 6]) == 0
    own.score([[5, 6]])  # which releases the memory of the slots
    assert visit(own, [*FIRST, 7]) == 0


def test_hooks_and_servers_without_the_cache_share_nothing(chunks):
    requests = [Request([*FIRST[:32], 5 + i], max_len=1) for i in range(2)]
    fresh().generate(requests)
    fresh().generate(requests, hooks={"embeddings": lambda _, h: h})
    plain = shared(prefix_cache=False)
    plain.statistics = Statistics()
    plain.generate(requests)
    assert [cached for *_, cached in chunks] == [True] * 4 + [False] * 12
    assert plain.statistics.prompt_tokens == 2 * 33 and plain.statistics.reused_tokens == 0
    with pytest.raises(ValueError, match="prefix_cache: expected true or false, got 'off'"):
        make(prefix_cache="off")


# ------------------------------------------------------------------------------------ on meshes


@pytest.mark.parametrize("mesh", [(2, 1), (2, 2)])
def test_shared_chunks_are_copied_between_data_shards(starts, mesh):
    """The first two of the four slots are in one part of the data axis."""
    own = fresh(mesh=mesh)
    donor = own.submit(Request([*FIRST, 5], max_len=12, ignore_eos=True))
    own.step()  # one chunk
    requests = [Request([*SECOND[:20], 6], **ASKED), Request([*FIRST, 7, 8], **ASKED)]
    requests += [Request([*FIRST[:32], 9], **ASKED), Request([*SECOND[:16], 0, 3], **ASKED)]
    answers = own.generate(requests)
    assert (2, 16, 0) in starts  # while the donor reads its second chunk
    assert answers == [a for request in requests for a in expected(request, SLOTS, mesh)]
    drain(own)
    assert [donor.completion] == expected(donor._checked.request, SLOTS, mesh)
    assert reused(own) == 16 + 32 + 16


# --------------------------------------------------------------------------------- any schedule


def random_request(chance):
    """Return a request that may begin like others, with padding in some of them."""
    base = [*chance.choice([FIRST, SECOND, [*FIRST[:16], *THIRD[:32]]])]
    if chance.random() < 0.3:
        base[3] = base[20] = 0
    length = chance.choice([0, 5, 16, 16, 20, 32, 32, 40, 48])
    tail = chance.choices(range(3, 9), k=chance.randint(1, 4))
    return Request(
        [*base[:length], *tail],
        temperature=chance.choice([0.0, 0.9]),
        rng_seed=chance.randint(0, 2),
        max_len=chance.choice([1, 2, 5, 9]),
        ignore_eos=True,
        top_logprobs=chance.choice([0, 2]),
        num_samples=chance.choice([1, 1, 1, 1, 3]),
        prompt_logprobs=chance.random() < 0.1,
    )


def check_schedule(seed):
    """Submit, step and cancel at random; compare with the answers of prompts read in full."""
    chance, own = random.Random(seed), fresh(slots=3)
    asked, cancelled = [], set()
    for _ in range(chance.randint(10, 60)):
        action = chance.random()
        if action < 0.4:
            asked.append(own.submit(random_request(chance)))
        elif action < 0.93 or not asked:
            own.step(chance.choice([1, 1, 2, 8]))
        else:
            handle = chance.choice(asked)
            if not handle.finished:
                cancelled.add(handle)
            own.cancel(handle)
    drain(own)
    for handle in asked:
        request = handle._checked.request
        for found, answer in zip(handle.completions, expected(request, 3), strict=True):
            if handle not in cancelled or found.finish_reason == "length":
                assert found == answer
                continue
            count = len(found.token_ids)
            assert found.token_ids == answer.token_ids[:count]
            assert found.logprobs == answer.logprobs[:count]
            assert found.top_logprobs == answer.top_logprobs[:count]
    return own.statistics


def test_random_schedules_give_the_answers_of_full_prompts():
    done = [check_schedule(seed) for seed in range(20)]
    shares = [each.reused_tokens / max(1, each.prompt_tokens) for each in done]
    assert np.mean(shares) > 0.3


@pytest.mark.exhaustive
def test_many_random_schedules_give_the_answers_of_full_prompts():
    for seed in range(100, 300):
        check_schedule(seed)
