"""The balanced basis: its algebra, the law, what it is for, its tables on disk and from a model."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import homkv
from homkv.errors import FormatError, ShapeError, UnsupportedError
from homkv.formats import EIGHT_BIT, UNROUNDED, make_codec
from homkv.formats.basis import BasisCodec, BasisTables, balance, class_bits, class_rotation
from homkv.quant import code_rows
from homkv.testing.compare import assert_relative
from homkv.testing.inputs import make_tokens

G, D = 2, 64


def covariance(seed: int, spread: float = 3.0) -> Tensor:
    """Random symmetric positive ``[G, D, D]`` with directions of very different variance."""
    gen = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(G, D, D, generator=gen, dtype=torch.float64))[0]
    variance = torch.logspace(-spread, spread / 2, D, dtype=torch.float64)
    return turn * variance @ turn.transpose(-1, -2)


def drawn(cov: Tensor, count: int, seed: int) -> Tensor:
    gen = torch.Generator().manual_seed(seed)
    return (torch.randn(G, count, D, generator=gen, dtype=torch.float64) @ torch.linalg.cholesky(cov).mT).float()


KEY_COV, QUERY_SQUARE = covariance(1), covariance(2)
MEAN = 5 * torch.randn(G, D, generator=torch.Generator().manual_seed(3))
TABLES = balance(MEAN, KEY_COV, QUERY_SQUARE)
CODEC = BasisCodec(D, TABLES).at_layer(0, 1)


def test_the_sides_cancel_and_are_balanced() -> None:
    a, b = TABLES.key_side[0].double(), TABLES.query_side[0].double()
    torch.testing.assert_close(a @ b.mT, torch.eye(D).double().expand(G, D, D), atol=1e-4, rtol=0)
    rotation = class_rotation(D)
    torch.testing.assert_close(rotation @ rotation, torch.eye(D).double(), atol=1e-12, rtol=0)
    keys, queries = (rotation @ side.mT @ cov @ side @ rotation for side, cov in ((a, KEY_COV), (b, QUERY_SQUARE)))
    for x in (keys, queries):  # in the eigenbasis nothing is correlated, but for the ridge
        diagonal = x.diagonal(dim1=-2, dim2=-1)
        scale = (diagonal.unsqueeze(-1) * diagonal.unsqueeze(-2)).sqrt()
        off = (x / scale - torch.eye(D).double()).abs()
        assert off[:, : D // 4, : D // 4].max() < 0.05
    assert (class_bits(D) == 4).sum() == D // 4


@pytest.mark.parametrize("rounding", [UNROUNDED, EIGHT_BIT])
def test_the_law(rounding: object) -> None:
    k, v = drawn(KEY_COV, 192, 4) + MEAN.unsqueeze(1), make_tokens("normal", G, 192, D, seed=5)
    pages = CODEC.encode(k, v)
    assert pages.shape == (G, 3, CODEC.page_bytes)
    k_dense, v_dense = CODEC.dense(pages, torch.float64)
    q, p = drawn(QUERY_SQUARE, 5, 6).double(), torch.rand(G, 5, 192, dtype=torch.float64)
    tolerance = 1e-12 if rounding is UNROUNDED else 0.02
    assert_relative(CODEC.scores(q, pages, rounding, torch.float64), q @ k_dense.mT, tolerance)
    assert_relative(CODEC.weigh(p, pages, rounding, torch.float64), p @ v_dense, tolerance)


def test_scores_are_better_than_in_the_natural_basis() -> None:
    """The reason: with unequal channels, one scale per token fits only where keys and queries are balanced."""
    k, q = drawn(KEY_COV, 256, 7) + MEAN.unsqueeze(1), drawn(QUERY_SQUARE, 50, 8)
    eye = torch.eye(D).double().expand(G, D, D)
    plain = BasisCodec(D, balance(MEAN, eye * KEY_COV.diagonal(dim1=-2, dim2=-1).mean(), eye)).at_layer(0, 1)
    exact = q @ k.mT
    errors = [(c.scores(q, c.encode(k, k)) - exact).norm().item() for c in (CODEC, plain)]
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("kind", ["normal", "outliers", "constant", "zeros", "tiny"])
def test_every_lane_is_the_nearest_at_its_scale(kind: str) -> None:
    k = make_tokens(kind, G, 64, D, seed=1)
    pages = CODEC.encode(k, k)
    lane, scale = CODEC._lanes(pages)
    x = (k - TABLES.mean[0].unsqueeze(1)) @ TABLES.key_side[0]
    for bits in (2, 4):
        at = class_bits(D) == bits
        expected = code_rows(x[..., at], scale.float(), bits)
        assert (lane[..., at].float() == expected).float().mean() > 0.999  # a float32 tie may fall either way
    assert CODEC.page_bytes == 64 * (D // 4 * 4 + 3 * D // 4 * 2 + 2 * D) // 8 + 64 * 3


def test_a_codec_without_its_layer_or_heads_says_so() -> None:
    k = torch.zeros(G, 64, D)
    with pytest.raises(ShapeError, match="at_layer"):
        BasisCodec(D, TABLES).encode(k, k)
    with pytest.raises(ShapeError, match="2 kv heads"):
        CODEC.encode(k[:1], k[:1])
    with pytest.raises(UnsupportedError, match="30 layers"):
        CODEC.at_layer(0, 30)
    with pytest.raises(UnsupportedError, match="head_dim 128"):
        BasisCodec(128, TABLES)
    for bad in (float("nan"), 1e9):
        with pytest.raises(FormatError):
            CODEC.encode(k + bad, k)


def test_tables_come_back_from_their_file_and_nothing_else_does(tmp_path: Path) -> None:
    path = tmp_path / "tables.safetensors"
    TABLES.save(path)
    codec = make_codec(f"basis:file={path}", D)
    assert codec.name == f"basis:id={TABLES.digest}" == CODEC.name
    assert codec.layout_id == CODEC.layout_id
    other = replace(TABLES, mean=TABLES.mean + 1)
    assert BasisCodec(D, other).layout_id != codec.layout_id
    for bad in ({"mean": TABLES.mean}, {**vars(TABLES), "mean": TABLES.mean * torch.nan}, {"x": torch.zeros(1)}):
        save_file(bad, path)
        with pytest.raises(FormatError, match="homkv basis"):
            BasisTables.load(path)
    path.write_bytes(b"not tensors")
    for name in (f"basis:file={path}", f"basis:file={path}.missing", "basis", "basis:id=12"):
        with pytest.raises(FormatError, match="homkv basis"):
            make_codec(name, D)


def test_a_model_is_calibrated_and_runs_on_its_tables(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from homkv.eval.basis import calibrate
    from homkv.models import describe_model

    shape = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=100, num_hidden_layers=3, head_dim=64, max_position_embeddings=512, **shape)
    model = LlamaForCausalLM(config)
    loaded = describe_model(model, SimpleNamespace(model_max_length=512), "tiny")  # type: ignore[arg-type]
    texts = torch.randint(0, 100, (2, 120)).tolist()
    before = model.config._attn_implementation
    tables = calibrate(loaded, texts)
    assert model.config._attn_implementation == before
    assert tables.mean.shape == (3, 2, 64)
    keys = model(torch.tensor(texts), use_cache=True).past_key_values.layers[1].keys[:, :, 4:]  # [2, G, T, D]
    torch.testing.assert_close(tables.mean[1], keys.transpose(0, 1).flatten(1, 2).mean(1), atol=1e-4, rtol=1e-3)
    tables.save(tmp_path / "tiny.safetensors")
    with homkv.attach(model, f"basis:file={tmp_path}/tiny.safetensors") as attached:
        out = model.generate(torch.tensor(texts[:1]), max_new_tokens=30, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 150)
    assert attached.last_cache is not None
    attached.last_cache.paged.check()
    assert attached.last_cache.paged.kv_bytes(attached.last_cache.seq_ids[0]) < 149 * 3 * 2 * 64 * 2 * 2
