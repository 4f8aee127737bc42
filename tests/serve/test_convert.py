"""From the source format to the wire's: the right bytes, and both names declared."""

import pytest
import torch
from serve_cases import PATIENCE_S, RawRequest, prompt, start_pair

from homkv.errors import UnsupportedError
from homkv.formats import make_codec
from homkv.models import LoadedModel
from homkv.seal import LayerContent, pack_layer
from homkv.serve.client import Query
from homkv.serve.convert import convert, dense
from homkv.testing.inputs import make_tokens
from homkv.transport.wire import FrameError

FORMATS = ("fp16", "quality", "small", "hack")


def tokens(length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return make_tokens("outliers", 2, length, 64, seed=1), make_tokens("normal", 2, length, 64, seed=2)


def same(a: LayerContent, b: LayerContent) -> bool:
    return all(torch.equal(getattr(a, x), getattr(b, x)) for x in ("pages", "exact_k", "exact_v"))


@pytest.mark.parametrize("length", [1, 64, 131, 132, 300])
@pytest.mark.parametrize("name", FORMATS)
def test_from_16_bits_the_bytes_are_those_of_packing_directly(name: str, length: int) -> None:
    source, target, (k, v) = make_codec("fp16", 64), make_codec(name, 64), tokens(length)
    assert same(convert(pack_layer(source, k, v), source, target), pack_layer(target, k, v))


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_format_is_not_touched(name: str) -> None:
    codec, (k, v) = make_codec(name, 64), tokens(300)
    content = pack_layer(codec, k, v)
    assert same(convert(content, codec, codec), content)
    assert torch.equal(convert(content, codec, codec, 1).pages, content.pages[1:])


@pytest.mark.parametrize("first_page", [0, 1, 3])
@pytest.mark.parametrize("source_name", ["fp16", "quality"])
def test_pages_that_the_receiver_has_are_left_out(source_name: str, first_page: int) -> None:
    source, target, (k, v) = make_codec(source_name, 64), make_codec("small", 64), tokens(300)
    content = pack_layer(source, k, v)
    whole, part = convert(content, source, target), convert(content, source, target, first_page)
    assert torch.equal(part.pages, whole.pages[first_page:])
    assert torch.equal(part.exact_k, whole.exact_k)


def test_two_lossy_formats_cost_little_more_than_the_coarser() -> None:
    quality, small, (k, v) = make_codec("quality", 64), make_codec("small", 64), tokens(300)
    exact = torch.stack((k, v)).half().double()

    def error(content: LayerContent) -> float:
        return float((torch.stack(dense(content, small)).double() - exact).norm() / exact.norm())

    through = error(convert(pack_layer(quality, k, v), quality, small))
    direct = error(pack_layer(small, k, v))
    assert direct < through < 1.2 * direct


@pytest.mark.parametrize("held", ["small", "fp16"])
def test_quality_here_and_another_format_there(loaded: LoadedModel, held: str) -> None:
    with start_pair(loaded, formats=[held], source="quality") as pair:
        answer = pair.ask(Query(prompt(300), held, 4))
        assert len(answer.tokens) == 4
        pair.assert_free()


def test_frames_of_another_source_are_refused(loaded: LoadedModel) -> None:
    with start_pair(loaded) as pair, RawRequest(pair) as request:
        expect = type(request.plan.expect)(**{**vars(request.plan.expect), "source": "quality"})
        with request.sender(expect=expect) as sender:
            request.send(sender, 0)
            with pytest.raises(FrameError, match="source") as caught:
                sender.finish(PATIENCE_S)
        assert caught.value.reason == "format"


def test_an_order_for_another_source_is_refused(loaded: LoadedModel) -> None:
    with start_pair(loaded) as pair:
        order = Query(prompt(20), "balanced", 2)
        with pair.client() as client:
            client.generate(order)
            member = client._dispatcher.members[0]
            assert member.status is not None
            member.status.formats[0] = "quality"  # as if it had been restarted with another one just now
            with pytest.raises(UnsupportedError, match="source 'fp16'"):
                client.generate(order)
