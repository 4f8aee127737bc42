"""Tokens become text; stop strings cut it where they begin."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from transformers import PreTrainedTokenizerFast

from homkv.errors import UnsupportedError
from homkv.serve.gateway.text import TextStream, backend_of

LETTERS = "abc"
CHARACTERS = Tokenizer(WordLevel({c: i for i, c in enumerate(LETTERS)}, unk_token="a"))
CHARACTERS.decoder = decoders.Fuse()


def expected(text: str, stops: list[str]) -> str:
    """What is in front of the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


@given(st.text(LETTERS, max_size=30), st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3))
def test_a_stop_string_is_never_shown_not_even_in_part(text: str, stops: list[str]) -> None:
    stream, shown = TextStream(CHARACTERS, stops), ""
    for letter in text:
        shown += stream.push(LETTERS.index(letter))
        assert expected(text, stops).startswith(shown)
        if stream.is_stopped:
            break
    else:
        shown += stream.flush()
    assert shown == expected(text, stops)
    assert stream.is_stopped == any(stop in text for stop in stops)


def test_text_that_cannot_begin_a_stop_is_shown_at_once() -> None:
    stream = TextStream(CHARACTERS, ["ca"])
    assert [stream.push(LETTERS.index(c)) for c in "abcb"] == ["a", "b", "", "cb"]


def test_a_character_of_several_tokens_is_shown_whole() -> None:
    octets = Tokenizer(BPE({f"<0x{i:02X}>": i for i in range(256)}, []))
    octets.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    stream = TextStream(octets, [])
    assert [stream.push(byte) for byte in "é!".encode()] == ["", "é", "!"]


def test_bytes_that_never_become_a_character_end_no_answer() -> None:
    """tokenizers' stream gives up here: it has told "a", and now takes both bytes for one broken character."""
    octets = Tokenizer(BPE({f"<0x{i:02X}>": i for i in range(256)} | {"b": 256}, []))
    octets.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    stream = TextStream(octets, ["bc"])
    assert [stream.push(token) for token in (0x61, 0xC3, 256, 0x64)] == ["a", "", "", "bd"]


def test_a_tokenizer_without_a_fast_half_is_refused() -> None:
    assert backend_of(PreTrainedTokenizerFast(tokenizer_object=CHARACTERS)) is not None
    with pytest.raises(UnsupportedError, match=r"tokenizer\.json"):
        backend_of(object())  # type: ignore[arg-type]
