"""Where a prompt of code ends, by tokenizers that treat the line break before a body differently."""

import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.trainers import WordLevelTrainer
from transformers import PreTrainedTokenizerFast

from homkv.eval.code import few_shot, problems, prompt_ids

PIECES = {  # what the pattern matches is a token
    "before": r"\w+|[^\w\s]+\n*|[^\S\n]+|\n+",  # Qwen's: a sign and the line breaks behind it
    "alone": r"\w+|[^\w\s]+|\n|[^\S\n]+",
    "behind": r"\w+|[^\w\s]+|\s+",  # SmolLM2's: a line break and the indentation
}
ENDS = {"before": '"""\n', "alone": '"""\n', "behind": '"""'}


def tokenizer(pattern: str, text: str) -> PreTrainedTokenizerFast:
    """Knows the pieces of one text, however its body is indented."""
    words = Tokenizer(WordLevel(unk_token="?"))
    words.pre_tokenizer = Split(Regex(pattern), "removed", invert=True)
    words.train_from_iterator([f"{text}\n    return", f"{text}\n\treturn"], WordLevelTrainer(special_tokens=["?"]))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")


@pytest.mark.parametrize("joins", PIECES)
def test_a_prompt_ends_where_every_body_goes_on(joins: str) -> None:
    text = 'def f():\n    """One."""'
    words = tokenizer(PIECES[joins], text)
    pieces = words.convert_ids_to_tokens(prompt_ids(words, text))
    assert "".join(pieces) == 'def f():\n    """One.' + ENDS[joins]
    body = words.encode(f"{text}\n    return", add_special_tokens=False)
    assert body[: len(pieces)] == prompt_ids(words, text)


def test_a_tokenizer_without_indentation_ends_with_the_text() -> None:
    words = tokenizer(r"\w+", "def f")
    assert words.convert_ids_to_tokens(prompt_ids(words, "def f")) == ["def", "f"]


def test_solved_problems_come_first_and_the_text_ends_with_its_last_sign() -> None:
    everything = problems()
    text = few_shot(everything, 0, 2)
    assert text.endswith('"""')
    places = [text.index(f"def {p.entry_point}(") for p in (everything[1], everything[2], everything[0])]
    assert places == sorted(places)
    assert everything[1].canonical_solution.rstrip() in text
    assert everything[0].canonical_solution.rstrip() not in text
