"""Text that is given out while tokens come: whole characters, never a part of a stop text, and in the end all of it."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

from kvstrata.serve.text import TextStream

TEXT = "Ein naïver Fuchs 🦊 sagt: 日本語 is fine.\n\n- one\n- two  three"


@pytest.fixture(scope="module")
def tokenizer(smollm_directory: Any) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(smollm_directory)


def parts(tokenizer: Any, text: str, *stops: str) -> tuple[list[str], bool]:
    stream = TextStream(tokenizer, stops)
    given = [stream.push(token) for token in tokenizer(text)["input_ids"]]
    return [*given, stream.finish()], stream.stopped


def test_the_parts_are_the_text_and_hold_whole_characters(tokenizer: Any) -> None:
    given, stopped = parts(tokenizer, TEXT)

    assert "".join(given) == TEXT
    assert not any("\ufffd" in part for part in given)
    assert len([part for part in given if part]) > 10
    assert not stopped


@pytest.mark.parametrize("stop", ["🦊", "日本", "- two", "fine.\n\n", "E", "three"])
def test_nothing_of_a_stop_text_or_behind_it_is_given_out(tokenizer: Any, stop: str) -> None:
    given, stopped = parts(tokenizer, TEXT, "never said", stop)

    assert "".join(given) == TEXT[: TEXT.index(stop)]
    assert stopped


def test_the_stop_text_that_is_complete_first_ends_it(tokenizer: Any) -> None:
    given, _ = parts(tokenizer, TEXT, "fine", "is", "日本語 is fine")

    assert "".join(given) == TEXT[: TEXT.index("is fine")]


def test_what_only_looked_like_a_stop_text_is_given_out_after_all(tokenizer: Any) -> None:
    given, stopped = parts(tokenizer, TEXT, "two  threesome", "naïver Wolf")

    assert "".join(given) == TEXT
    assert not stopped


def test_special_tokens_are_no_text(tokenizer: Any) -> None:
    given, _ = parts(tokenizer, "one<|im_end|>")

    assert "".join(given) == "one"
