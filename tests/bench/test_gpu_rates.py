"""Packing, prefill and extension in the GPU benchmark: checked before they are timed, with a reason where they fail."""

from collections.abc import Callable

import pytest
import torch

pytest.importorskip("triton")

from homkv.bench import gpu_rates
from homkv.bench.cpu import HeadShape
from homkv.bench.gpu_candidates import codec_for
from homkv.errors import FormatError
from homkv.formats.base import PageCodec


class InstantReplay:
    """Runs the calls once and makes a time up."""

    def __init__(self, calls: list[Callable[[], object]]) -> None:
        for call in calls:
            call()

    def __call__(self) -> float:
        return 5.0


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"SHAPE": HeadShape(128, 4, 2), "PACK_TOKENS": 128, "PREFILL_TOKENS": (64,), "EXTEND_OLD": 256}
    for name, value in (sizes | {"EXTEND_NEW": (64,), "Replay": InstantReplay}).items():
        monkeypatch.setattr(gpu_rates, name, value)


def test_every_rate_has_its_amount(device: torch.device) -> None:
    rows = list(gpu_rates.rate_rows("small", device, 3))
    done = {(row["kind"], row["candidate"]): row for row in rows if row["status"] == "ok"}
    pack = done["pack", "homkv k4220v2222"]
    assert pack["amount"] == 128 * 2 * (512 + 71)
    assert pack["rate"] == pytest.approx(pack["amount"] / 5.0 * 1e-6)
    assert done["prefill", "homkv int8"]["amount"] == done["prefill", "sdpa flash"]["amount"] == 2 * 64 * 64 * 128 * 4
    assert done["pack", "homkv hack"]["amount"] == 128 * 2 * 512 + 4 * codec_for("hack", 128).page_bytes
    assert {name for kind, name in done if kind == "prefill"} >= {"hack", "hack-2026"}
    assert done["extend", "homkv k4220v2222"]["amount"] == 4 * 128 * 4 * 64 * (256 + 32)
    assert all(row["reason"] for row in rows if row["status"] == "failed")


def test_wrong_pages_and_wrong_attention_are_refused(device: torch.device) -> None:
    codec = codec_for("small", 128)

    def encode(codec: PageCodec, k: torch.Tensor, v: torch.Tensor, **_: object) -> torch.Tensor:
        return codec.encode(k.cpu(), v.cpu()).transpose(0, 1).to(k.device) ^ 1

    with pytest.raises(FormatError, match="bytes"):
        gpu_rates.check_pack(codec, encode, torch.zeros(1, dtype=torch.int32, device=device))
    with pytest.raises(FormatError, match="error"):
        gpu_rates.right(torch.ones(3), torch.tensor([1.0, 1.0, 2.0]))


def test_a_rate_needs_a_rows_format(device: torch.device) -> None:
    with pytest.raises(FormatError, match="rows format"):
        list(gpu_rates.rate_rows("hack", device, 1))
