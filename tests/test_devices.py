"""Everything computes where its input lies: torch's "meta" device refuses to meet tensors of another one."""

import numpy as np
import pytest
import torch

import homkv.upload
from homkv.digests import PageDigests, checksum, random_weights
from homkv.formats import format_names, make_codec
from homkv.formats.hack_prefill import quantized_prefill
from homkv.formats.minmax import uniform_noise
from homkv.page import write_page
from homkv.quant import QuantizedRows
from homkv.upload import Uploader, to_device

META = torch.device("meta")


@pytest.mark.parametrize("name", [*format_names(), "hack:se=0", "hack-2026:bits=4"])
def test_formats_compute_on_the_device_of_their_pages(name: str) -> None:
    codec = make_codec(name, 64)
    pages = torch.empty(2, 3, codec.page_bytes, dtype=torch.uint8, device=META)
    q = torch.empty(2, 5, 64, device=META)
    scores = codec.scores(q, pages)
    assert scores.device == codec.weigh(torch.softmax(scores, -1), pages).device == META
    k, v = codec.dense(pages)
    assert k.device == v.device == META


def test_pages_are_written_on_the_device_of_their_codes() -> None:
    layout = make_codec("balanced", 64).layout

    def rows(width: int) -> QuantizedRows:
        lanes = torch.empty(3, 64, width, dtype=torch.int8, device=META)
        return QuantizedRows(lanes, torch.empty(3, 64, dtype=torch.uint8, device=META))

    k_rows, v_rows = ([rows(cls.width) for cls in classes] for classes in (layout.k_classes, layout.v_classes))
    centre = torch.empty(3, 64, dtype=torch.float16, device=META)
    assert write_page(k_rows, v_rows, centre, layout).device == META
    assert uniform_noise(1, 2, 3, 4, 5, META).device == META


def test_cache_parts_work_on_the_device_of_the_pages() -> None:
    pool, blocks = torch.empty(4, 2, 64, dtype=torch.uint8, device=META), torch.empty(2, dtype=torch.long, device=META)
    digests = PageDigests(3, 4, 128, META)
    digests.record(1, pool, blocks)
    assert digests._digest(pool, blocks).device == META
    assert to_device(torch.ones(3), META).device == META


def test_a_checksum_notices_any_change() -> None:
    pages = torch.randint(0, 256, (5, 2, 64), dtype=torch.uint8)
    weights = random_weights(32)
    assert bool((weights % 2 == 1).all())
    before = checksum(pages, weights)
    assert len(set(before.tolist())) == 5
    for bit in range(0, 8 * 128, 37):
        changed = pages.clone()
        changed[3].view(-1)[bit // 8] ^= 1 << bit % 8
        assert (checksum(changed, weights) != before).tolist() == [False, False, False, True, False]
    swapped = pages.flip(1)
    assert bool((checksum(swapped, weights) != before).all())


def test_counters_travel_together_and_only_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []

    def send(x: torch.Tensor, device: torch.device) -> torch.Tensor:
        sent.append(x.clone())
        return sent[-1]

    monkeypatch.setattr(homkv.upload, "to_device", send)
    upload = Uploader(META)
    table, counts, slots = np.arange(6, dtype=np.int32).reshape(2, 3), np.array([7, 8], np.int32), np.zeros(2, np.int32)
    for _ in range(2):
        parts = upload(table, counts, slots)
        assert [x.tolist() for x in parts] == [[[0, 1, 2], [3, 4, 5]], [7, 8], [0, 0]]
        assert all(x.is_contiguous() and x.storage_offset() % 4 == 0 for x in parts)
    assert len(sent) == 1
    upload(table.reshape(3, 2), counts, slots)  # the same numbers in another shape
    counts[0] = 9
    assert upload(table, counts, slots)[1].tolist() == [9, 8]
    assert len(sent) == 3
    assert [upload.width(n) for n in (1, 16, 17)] == [16, 16, 32]
    assert Uploader(torch.device("cpu")).width(17) == 17


def test_quantized_prefill_runs_on_the_device_of_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    from homkv.formats import minmax

    monkeypatch.setattr(minmax, "require_finite", lambda x, what: None)  # reads values, of which "meta" has none
    monkeypatch.setattr(minmax, "bool", lambda x: True, raising=False)  # all are finite
    q, k = torch.empty(1, 4, 100, 64, device=META), torch.empty(1, 2, 100, 64, device=META)
    codec = make_codec("hack:prefill=int8", 64)
    assert quantized_prefill(q, k, k, codec, 0.1).device == META
    assert codec.encode(k[0, :, :64], k[0, :, :64]).device == META
