"""Formats of the comparison, between two instances: the tokens that one process alone gets with the same format."""

import pytest
import torch
from serve_cases import NAN_TOKEN, prompt, start_pair, twin

import homkv
from homkv.models import LoadedModel
from homkv.serve.client import Query

NEW_TOKENS = 60


@pytest.mark.parametrize("name", ["fp8", "kivi:r=64", "kvquant:page=64"])
def test_a_served_format_answers_as_one_process_does(loaded: LoadedModel, name: str) -> None:
    """The prompt becomes pages on one side, further tokens on the other."""
    ids, model = prompt(300), twin(loaded).model
    inputs = torch.tensor([ids])
    with homkv.attach(model, name):
        settings = {"do_sample": False, "pad_token_id": NAN_TOKEN, "max_new_tokens": NEW_TOKENS}
        out = model.generate(inputs, attention_mask=torch.ones_like(inputs), **settings)
    with start_pair(loaded, formats=[name]) as pair:
        answer = pair.ask(Query(ids, name, NEW_TOKENS))
        pair.assert_free()
    assert answer.tokens == out[0, 300:].tolist()
    assert len(set(answer.tokens)) > 8
    assert answer.kv_bytes < 360 * 2 * 2 * 64 * 2 * 0.9  # two layers in 16 bits
