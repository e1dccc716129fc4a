"""Strict JSON: what other readers might read differently is refused with a short error."""

import json
import sys

import pytest

from grok1.strict_json import read_json
from paths import DATA

REFUSED = {
    "repeated": ('{"a": 1, "a": 1}', "the key 'a' is repeated in an object"),
    "repeated-inside": ('[{"b": {"é": 1, "\\u00e9": 2}}]', r"the key '\xe9' is repeated"),
    "repeated-long": (f'{{"{"k" * 10**5}": 1, "{"k" * 10**5}": 1}}', "kkk... is repeated"),
    "nan": ('{"a": NaN}', "NaN is not a JSON number"),
    "infinity": ("[-Infinity]", "-Infinity is not a JSON number"),
    "large-float": ("[1e400]", "the number 1e400 is too large for a float"),
    "large-negative": ("-1e999", "the number -1e999 is too large for a float"),
    "large-integer": ("-2" + "0" * 308, "000... is too large for a float"),
    "endless-integer": ("9" * 10**6, "999... is too large for a float"),
    "deep": ("[" * 10**6, "it is nested more than 64 levels deep"),
    "deep-objects": ('{"a":' * 10**5, "it is nested more than 64 levels deep"),
    "empty": ("", "Expecting value"),
    "two-values": ("{} {}", "Extra data"),
    "latin-1": (b'{"a": "\xff"}', "can't decode byte 0xff"),
}


@pytest.mark.parametrize(("text", "part"), REFUSED.values(), ids=REFUSED.keys())
def test_ambiguous_json_is_refused_with_a_short_error(text, part):
    with pytest.raises(ValueError) as caught:
        read_json(text)
    message = str(caught.value)
    assert part in message and "\n" not in message and len(message) < 200


@pytest.mark.parametrize(("begin", "end"), [("[", "]"), ('{"a":', "}")], ids=["lists", "objects"])
def test_nesting_is_limited_to_64_levels(begin, end):
    """At Python's own limit, json may still read what repr cannot print."""
    for depth in (1, 2, 63, 64, 65, 300, *range(900, 1100)):
        text = f'[{begin * depth}"x"{end * depth}, 1]'
        if depth < 64:
            assert read_json(text) == json.loads(text)
        else:
            with pytest.raises(ValueError, match="^it is nested more than 64 levels deep$"):
                read_json(text)


def test_all_other_json_is_read_as_by_json():
    most = int(sys.float_info.max)
    text = json.dumps([{"a": [1, -2, 0.5, 1e-400, "é\n", None, True, {}]}, most, -most, 1e308])
    content = (DATA / "golden/three-layers/config.json").read_bytes()
    for good in (text, text.encode(), b"\xef\xbb\xbf{}", "\ufeff{}".encode(), content):
        found, expected = read_json(good), json.loads(good)
        assert found == expected and repr(found) == repr(expected)
