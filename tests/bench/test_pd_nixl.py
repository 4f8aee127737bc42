"""The link by NIXL: the same tokens as over sockets, and what is refused without NIXL."""

import time
from pathlib import Path

import pytest

from homkv.bench.pd import nixl
from homkv.bench.pd.cell import run_cell
from homkv.bench.pd.messages import Cell
from homkv.bench.pd.options import PdOptions
from homkv.bench.pd.pool import Pool, PoolOptions
from homkv.bench.pd.workload import WORKLOADS, poisson
from homkv.errors import UnsupportedError


@pytest.mark.skipif(not nixl.is_available(), reason="needs NIXL")
def test_nixl_carries_the_same_bytes() -> None:
    lengths = WORKLOADS["tiny"]
    options = PoolOptions(("cpu",), ("cpu", "cpu"), "tiny", lanes=2, use_nixl=True)
    with Pool(options, time.monotonic() + 300) as pool:
        found = {}
        pool.join("nixl", time.monotonic() + 300)
        for link in ("nixl", "tcp"):
            cell = Cell("balanced", link, True, "exact", 2, lengths.prompt, lengths.longest)
            outcome = run_cell(pool, cell, poisson(lengths, 5, 50.0, 0), time.monotonic() + 300)
            found[link] = [life.finished.tokens for life in outcome.lives if life.finished]
            sent = sum(life.prefilled.link_bytes for life in outcome.lives if life.prefilled)
            assert sum(outcome.closed[rank].digest_bytes for rank in (1, 2)) == sent
    assert found["nixl"] == found["tcp"]


@pytest.mark.skipif(nixl.is_available(), reason="NIXL is installed")
def test_without_nixl_the_link_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="pip install nixl"):
        PdOptions(("cpu",), ("cpu",), Path("unused"), model="tiny", workloads=("tiny",), links=("nixl",)).require_here()
