"""What is said between instances and client, and the arithmetic of answers, without sockets."""

import msgspec
import numpy as np
import pytest
import torch

from homkv import errors
from homkv.errors import FormatError, HomkvError, TransferError
from homkv.serve.choose import choose, sample
from homkv.serve.client import PHASES, Answer
from homkv.serve.engine import serving_codec
from homkv.serve.messages import DecodeTimes, Done, Failed, FromDecode, PrefillDone, PrefillTimes, Sampling, Status
from homkv.transport.endpoint import LinkError
from homkv.transport.wire import FrameError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, HomkvError)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_arrives_as_what_it_was(kind: type[HomkvError]) -> None:
    failed = msgspec.msgpack.decode(msgspec.msgpack.encode(Failed.of("r", kind("why"))), type=Failed)
    error = failed.to_error()
    assert (type(error), str(error)) == (kind, "why")


@pytest.mark.parametrize("error", [FrameError("digest", "why"), LinkError("vanished", "why")])
def test_an_error_of_the_transport_arrives_as_a_transfer_error(error: HomkvError) -> None:
    assert type(Failed.of("r", error).to_error()) is TransferError


@pytest.mark.parametrize("name", ["SystemExit", "annotations", "__builtins__", ""])
def test_only_our_errors_are_raised(name: str) -> None:
    assert type(Failed("r", name, "why").to_error()) is TransferError


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), -1.0])
def test_temperatures_that_mean_nothing_are_refused(temperature: float) -> None:
    data = msgspec.msgpack.encode({"temperature": temperature})
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(data, type=Sampling)


def test_counts_of_bytes_hold_a_long_context() -> None:
    done = Done("r", 8, 80 << 30, DecodeTimes(0, 0, 0))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(done), type=FromDecode) == done


def test_an_instance_has_a_format() -> None:
    data = msgspec.msgpack.encode(Status(1, "prefill", "i", 0.0, "m", [], {}, {}))
    with pytest.raises(msgspec.ValidationError, match="formats"):
        msgspec.msgpack.decode(data, type=FromDecode)


def answer(*moments: float) -> Answer:
    """Prefill begins, computed, packed, sent; verified; first token. Submitted at 1."""
    start_s, computed_s, packed_s, sent_s, verified_s, first_s = moments
    times = PrefillTimes(1.0, start_s, computed_s, packed_s, sent_s, 0.0, 0.0, 0.0)
    return Answer(
        tokens=[1, 2, 3],
        submitted_s=1.0,
        arrived_s=[first_s, first_s + 1, first_s + 4],
        prefill=PrefillDone("r", 0, 0, times),
        decode=DecodeTimes(verified_s, verified_s, verified_s),
    )


def test_phases_in_order_are_their_differences() -> None:
    split = answer(2.0, 4.0, 5.0, 5.5, 6.5, 7.0).phases_s()
    assert list(split) == list(PHASES)
    assert list(split.values()) == pytest.approx([1, 2, 1, 0.5, 1, 0.5])


@pytest.mark.parametrize(
    "moments",
    [
        (2.0, 9.0, 5.0, 5.5, 8.0, 10.0),  # packed, sent and verified while the prompt still computed
        (2.0, 4.0, 5.0, 5.5, 8.0, 7.0),  # a verification stamped behind the token it allowed
        (0.5, 0.6, 0.7, 0.8, 0.9, 1.0),  # nothing took time
    ],
)
def test_phases_sum_to_the_time_to_first_token(moments: tuple[float, ...]) -> None:
    made = answer(*moments)
    assert sum(made.phases_s().values()) == pytest.approx(made.ttft_s)
    assert min(made.phases_s().values()) >= 0


def test_time_per_token_is_the_mean_behind_the_first() -> None:
    assert answer(2.0, 4.0, 5.0, 5.5, 6.5, 7.0).tpot_s == pytest.approx(2.0)


def test_an_unfinished_answer_has_no_phases() -> None:
    with pytest.raises(TransferError, match="finished answer"):
        Answer().phases_s()


def draw(logits: list[float], n: int = 4000, **settings: float) -> np.ndarray:
    drawn = [sample(torch.tensor(logits), Sampling(**settings), index) for index in range(n)]  # type: ignore[arg-type]
    return np.bincount(drawn, minlength=len(logits)) / n


def test_samples_follow_the_softmax() -> None:
    logits = [1.0, 0.0, 2.0]
    expected = torch.softmax(torch.tensor(logits) / 0.5, 0).numpy()
    np.testing.assert_allclose(draw(logits, temperature=0.5), expected, atol=0.03)


def test_the_nucleus_is_the_smallest_set_that_reaches_top_p() -> None:
    p = np.array([0.5, 0.3, 0.15, 0.05])
    found = draw(np.log(p).tolist(), temperature=1.0, top_p=0.75)
    np.testing.assert_allclose(found, [0.625, 0.375, 0, 0], atol=0.03)


def test_a_masked_token_is_never_drawn() -> None:
    assert draw([0.0, float("-inf"), 0.0], temperature=5.0)[1] == 0


def test_log_probabilities_are_numbers_that_json_has() -> None:
    top = choose(torch.tensor([0.0, float("-inf")]), Sampling(num_logprobs=2), 0).top
    assert top == [(0, 0.0), (1, -9999.0)]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_overflowing_logits_are_an_error(bad: float, temperature: float) -> None:
    with pytest.raises(FormatError, match="finite logits"):
        sample(torch.tensor([0.0, bad, 1.0]), Sampling(temperature), 0)


def test_formats_to_serve_are_checked_by_name() -> None:
    assert serving_codec("balanced", 64).layout_id.startswith("rows/")
    with pytest.raises(FormatError):
        serving_codec("nonsense", 64)
    with pytest.raises(HomkvError, match="head_dim"):
        serving_codec("balanced", 20)
