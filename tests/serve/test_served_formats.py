"""Formats of the comparison, between two instances: the tokens that one process alone gets with the same format."""

import sys

import pytest
import torch
from serve_cases import NAN_TOKEN, prompt, start_pair, twin

import homkv
from homkv.errors import UnsupportedError
from homkv.models import LoadedModel
from homkv.serve.client import Query
from homkv.serve.engine import serving_codec


@pytest.mark.parametrize(
    ("name", "new_tokens", "share_held", "share_sent"),
    [
        ("fp8", 60, 0.7, 0.7),
        ("kivi:r=64", 60, 0.5, 0.55),
        ("kvquant:page=64", 60, 0.5, 0.5),
        ("turbo", 60, 0.6, 0.6),
        ("decoquant:page=64", 60, 0.6, 0.6),
        ("cachegen", 60, 1, 0.8),
        ("cachegen:as=published", 15, 1, 0.7),
    ],
)
def test_a_served_format_answers_as_one_process_does(
    loaded: LoadedModel, name: str, new_tokens: int, share_held: float, share_sent: float
) -> None:
    """The prompt becomes pages on one side, further tokens on the other. CacheGen's instance seals none of its own, so
    it is asked for no more tokens than its window takes. ``share_held share_sent``: largest part of 16-bit bytes.
    """
    ids, model = prompt(300), twin(loaded).model
    inputs = torch.tensor([ids])
    with homkv.attach(model, name):
        settings = {"do_sample": False, "pad_token_id": NAN_TOKEN, "max_new_tokens": new_tokens}
        out = model.generate(inputs, attention_mask=torch.ones_like(inputs), **settings)
    with start_pair(loaded, formats=[name]) as pair:
        answer = pair.ask(Query(ids, name, new_tokens))
        pair.assert_free()
    assert answer.tokens == out[0, 300:].tolist()
    assert len(set(answer.tokens)) > 5
    sixteen_bits = 2 * loaded.num_layers * 2 * loaded.head_dim  # per token
    assert answer.kv_bytes <= share_held * sixteen_bits * (300 + new_tokens - 1)
    assert answer.prefill is not None
    assert answer.prefill.wire_bytes <= share_sent * sixteen_bits * 300


def test_a_missing_library_is_noticed_before_anything_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "constriction", None)  # as if it were not installed
    with pytest.raises(UnsupportedError, match="pip install"):
        serving_codec("cachegen", 64)
    assert serving_codec("kivi", 64).coder is None
