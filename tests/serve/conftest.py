"""One pair of instances that most tests share; a test that changes it makes its own."""

from collections.abc import Iterator

import pytest
from serve_cases import BYSTANDER, Pair, start_pair, tiny

from homkv.models import LoadedModel


@pytest.fixture(scope="session")
def loaded() -> LoadedModel:
    return tiny()


@pytest.fixture(scope="session")
def shared_pair(loaded: LoadedModel) -> Iterator[Pair]:
    with start_pair(loaded) as pair:
        yield pair


@pytest.fixture
def pair(shared_pair: Pair) -> Iterator[Pair]:
    """The shared pair; it must be empty again after every test."""
    yield shared_pair
    shared_pair.assert_free()


@pytest.fixture(scope="session")
def undisturbed(shared_pair: Pair) -> list[int]:
    """The bystander's tokens when it is alone."""
    return shared_pair.ask(BYSTANDER).tokens
