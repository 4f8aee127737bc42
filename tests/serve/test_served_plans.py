"""A plan between instances: layers of different sizes cross the wire, and only to those who hold the same plan."""

from pathlib import Path

import pytest
import torch
from serve_cases import NAN_TOKEN, prompt, start_pair, tiny, twin
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

import homkv
from homkv.errors import FormatError, UnsupportedError
from homkv.models import LoadedModel, load_model
from homkv.plan import LayerPlan, spelled
from homkv.serve.client import Client, Query
from homkv.serve.engine import expectation, plan_sequence, serving_codec
from homkv.serve.settings import load_settings
from homkv.serve.spawn import InstanceOptions, LocalCluster
from homkv.transport.assemble import encode_layer
from homkv.transport.wire import FrameError, decode_frame

LAYERS = ("k8420v4222", "k4220v2222")
IDS = prompt(300)


def one_process(loaded: LoadedModel, kv_cache_dtype: str, new_tokens: int) -> list[int]:
    model, inputs = twin(loaded).model, torch.tensor([IDS])
    with homkv.attach(model, kv_cache_dtype):
        settings = {"do_sample": False, "pad_token_id": NAN_TOKEN, "max_new_tokens": new_tokens}
        out = model.generate(inputs, attention_mask=torch.ones_like(inputs), **settings)
    tokens: list[int] = out[0, len(IDS) :].tolist()
    return tokens


def test_a_plan_between_two_processes_answers_as_one_process_does(tmp_path: Path) -> None:
    """The plan is a file; children, requests and the wire know it by its spelling, and no other file is needed."""
    folder = tmp_path / "model"
    tiny().model.save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(200)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)
    loaded = load_model(str(folder))
    LayerPlan(loaded.fingerprint, LAYERS).save(tmp_path / "plan.json")
    name = spelled(str(tmp_path / "plan.json"))
    expected = one_process(loaded, str(tmp_path / "plan.json"), 60)
    options = InstanceOptions(str(folder), (name,), num_threads=1, max_tokens=2048)
    with LocalCluster(options) as pair:
        (prefill,), (decode,) = pair.addresses("prefill"), pair.addresses("decode")
        with Client(prefill, decode, pair.security) as client:
            answer = client.generate(Query(IDS, name, 60), timeout_s=120.0)
    assert answer.tokens == expected
    assert len(set(answer.tokens)) > 5


def test_another_models_plan_is_refused_where_the_model_is(loaded: LoadedModel) -> None:
    wrong_model = LayerPlan("f" * 32, LAYERS).spelling
    wrong_length = LayerPlan(loaded.fingerprint, LAYERS * 2).spelling
    for name, message in ((wrong_model, "belongs to one model"), (wrong_length, "2 layers")):
        with pytest.raises(FormatError, match=message):
            start_pair(loaded, formats=[name])
        with pytest.raises(FormatError, match=message):
            homkv.attach(loaded.model, name)
    with start_pair(loaded) as pair, pytest.raises(FormatError, match=r"belongs to one model|this decode instance"):
        pair.ask(Query(IDS, wrong_model, 4))
    with pytest.raises(UnsupportedError, match="one size"):
        start_pair(loaded, source=LayerPlan(loaded.fingerprint, LAYERS).spelling)


def test_a_frame_of_one_layers_format_is_refused_in_another(loaded: LoadedModel) -> None:
    ours = LayerPlan(loaded.fingerprint, LAYERS).spelling
    codec = serving_codec(ours, loaded.head_dim, loaded.rope)
    plan = plan_sequence(loaded, codec, "r", 1, 300)
    assert [plan.page_row_bytes(i) for i in (0, 1)] == [codec.at_layer(i, 2).page_bytes for i in (0, 1)]
    assert plan.total_bytes == plan.layer_bytes(0) + plan.layer_bytes(1)
    for layer in (0, 1):
        exact = [bytes(plan.exact_bytes)] * 2
        (buffers,) = encode_layer(plan, layer, exact, bytes(plan.num_pages * plan.page_row_bytes(layer)))
        header = decode_frame(b"".join(buffers)).header
        plan.expect.check(header)
        uniform = expectation(loaded, serving_codec("balanced", loaded.head_dim, loaded.rope))
        swapped = expectation(loaded, serving_codec(ours.replace("k8420v4222", "k8888v8888"), 64, loaded.rope))
        for other in (uniform, swapped):
            with pytest.raises(FrameError) as caught:
                other.check(header)
            assert caught.value.reason == "format"


def test_a_plan_is_a_setting(tmp_path: Path) -> None:
    plan = LayerPlan("ab" * 16, LAYERS)
    plan.save(tmp_path / "plan.json")
    flags = ["--kv-cache-dtype", str(tmp_path / "plan.json")]
    assert load_settings(flags).kv_cache_dtype == [plan.spelling]
    with pytest.raises(UnsupportedError, match="homkv calibrate"):
        load_settings(["--kv-cache-dtype", str(tmp_path / "absent.json")])


def test_a_request_never_names_a_file(loaded: LoadedModel, tmp_path: Path) -> None:
    LayerPlan(loaded.fingerprint, LAYERS).save(tmp_path / "plan.json")
    with pytest.raises(FormatError, match="kABCDvEFGH"):
        serving_codec(str(tmp_path / "plan.json"), 64)
