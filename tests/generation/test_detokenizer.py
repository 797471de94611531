"""Text while it is made: nothing is split, nothing is said too early, nothing is lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from llm_quest.generation.detokenizer import IncrementalDetokenizer


class Letters:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    def decode_stream(self, prompt_ids=()) -> Letters:
        self.bytes = b""
        return self

    def feed(self, token: int) -> str:
        self.bytes += bytes([token])
        try:
            text, self.bytes = self.bytes.decode(), b""
        except UnicodeDecodeError:
            text = ""
        return text

    def flush(self) -> str:
        text, self.bytes = self.bytes.decode(errors="replace"), b""
        return text


def stream_pieces(text: str, stops: list[str]) -> tuple[list[str], bool]:
    """What is said after each byte, and whether a stop string ended it."""
    row, pieces = IncrementalDetokenizer(Letters(), stops), []
    for byte in text.encode():
        pieces.append(row.feed(byte))
        if row.stopped:
            break
    return [*pieces, row.flush()], row.stopped


def test_what_may_become_a_stop_string_is_held_back_until_it_is_clear():
    assert stream_pieces("a END.", ["END"]) == (["a", " ", "", "", "", ""], True)
    assert stream_pieces("a ENT.", ["END"]) == (["a", " ", "", "", "ENT", ".", ""], False)


def test_an_unfinished_stop_string_is_said_at_the_end():
    assert stream_pieces("a EN", ["END"]) == (["a", " ", "", "", "EN"], False)


def test_the_earliest_of_several_stop_strings_cuts():
    assert "".join(stream_pieces("one two three", ["three", "two"])[0]) == "one "
    assert "".join(stream_pieces("a stop", ["top", "stop"])[0]) == "a ", "one token completes both"


def test_a_character_of_several_bytes_is_said_whole():
    assert stream_pieces("é!", []) == (["", "é", "!", ""], False)


@given(st.text("abé", max_size=20), st.lists(st.text("abé", min_size=1, max_size=4), max_size=3))
def test_the_pieces_are_the_text_up_to_the_first_stop_string(text, stops):
    pieces, stopped = stream_pieces(text, stops)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    first = min(ends, default=None)  # the stop that is complete first ends the row
    read = text if first is None else text[:first]
    cut = min((read.find(stop) for stop in stops if stop in read), default=len(read))
    assert "".join(pieces) == read[:cut]
    assert stopped == (first is not None)
