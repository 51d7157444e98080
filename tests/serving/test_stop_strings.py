"""A text is cut before its first stop string, however it is divided into parts."""

import itertools

import pytest

from tinyllama_hf.serving.stop_strings import StopStrings


def cut(parts, stops) -> list[str]:
    written = []
    text = StopStrings(stops, written.append)
    for part in parts:
        text.put(part)
    text.end()
    return written


def all_parts(text):
    """Every division of a text."""
    for places in itertools.product((False, True), repeat=len(text) - 1):
        ends = [i for i, is_end in enumerate(places, start=1) if is_end]
        yield [text[a:b] for a, b in itertools.pairwise([0, *ends, len(text)])]


@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        ("abcdefgh", [], "abcdefgh"),
        ("abcdefgh", ["x", "hi"], "abcdefgh"),
        ("abcdefgh", ["cd"], "ab"),
        ("abcdefgh", ["abc"], ""),
        ("abcdefgh", ["gh", "e"], "abcd"),
        ("abcdefgh", ["bc", "abcd"], "a"),  # the one that ends first
        ("abcdefgh", ["abcd", "cd"], ""),  # both end at the same place
        ("ababac a", ["abac"], "ab"),  # a beginning within a beginning
        ("aaaaaaab", ["aab"], "aaaaa"),
        ("cd\n\nefgh", ["\n\n"], "cd"),
    ],
)
def test_every_division_gives_the_same_text(text, stops, wanted):
    for parts in all_parts(text):
        assert "".join(cut(parts, stops)) == wanted, parts


def test_only_a_possible_beginning_is_held_back():
    written = []
    text = StopStrings(["\n\nUser:", "!!"], written.append)
    parts = {"Hi": "Hi", "!\n": "Hi!", "ok!": "Hi!\nok", "\n\nUse": "Hi!\nok!", "r.": "Hi!\nok!\n\nUser."}
    for part, wanted in parts.items():
        text.put(part)
        assert "".join(written) == wanted
    text.put("\n\nUser")
    assert text.is_complete_with(": no") and not text.is_complete_with(" is") and not text.is_found
    text.put(":")
    assert text.is_found
    text.put("more")
    text.end()
    assert "".join(written) == "Hi!\nok!\n\nUser."
