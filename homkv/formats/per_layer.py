"""A plan bound to a model's head: every layer its own rows format. Bytes: those of the layer's format."""

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
import xxhash
from torch import Tensor

from homkv.errors import UnsupportedError
from homkv.formats.base import EIGHT_BIT, PageCodec, Rounding
from homkv.formats.rows import RowsCodec
from homkv.plan import LayerPlan
from homkv.spec import RowsSpec


class PerLayerCodec(PageCodec):
    """What the layers of a plan have in common: sinks, window, tokens of a page. Pages are :meth:`at_layer`'s.

    ``order [D]``: slot -> channel, as in RowsCodec; ``rows``: makes the codecs of the layers. ``page_bytes`` is the
    largest layer's.
    """

    page_tokens = RowsCodec.page_tokens
    num_sinks = RowsCodec.num_sinks
    impls = RowsCodec.impls

    def __init__(
        self,
        head_dim: int,
        plan: LayerPlan,
        order: Sequence[int] | None = None,
        rows: Callable[[int, RowsSpec, Sequence[int] | None], RowsCodec] = RowsCodec,
    ) -> None:
        super().__init__(head_dim)
        self.plan, self.name, self.order = plan, plan.title, order
        codecs = {name: rows(head_dim, RowsSpec.parse(name), order) for name in dict.fromkeys(plan.layers)}
        self.min_window = codecs[plan.layers[0]].min_window
        self._layers = [codecs[name] for name in plan.layers]
        self.page_bytes = max(codec.page_bytes for codec in codecs.values())
        digest = xxhash.xxh3_128_hexdigest("/".join(codec.layout_id for codec in self._layers).encode())
        self.layout_id = f"per-layer/1 {digest} D={head_dim}"

    def at_layer(self, layer: int, num_layers: int) -> RowsCodec:
        """The codec of one layer. Raises FormatError for another number of layers than the plan's."""
        self.plan.check_layers(num_layers)
        return self._layers[layer]

    def wire_bytes(self, num_tokens: int, exact_bytes: int = 2) -> int:
        """Mean over the layers, rounded up; see PageCodec.wire_bytes."""
        return -(-sum(c.wire_bytes(num_tokens, exact_bytes) for c in self._layers) // len(self._layers))

    def bits_per_element(self, num_tokens: int, exact_bytes: int = 2) -> float:
        """Mean over the layers; see PageCodec.bits_per_element."""
        return sum(c.bits_per_element(num_tokens, exact_bytes) for c in self._layers) / len(self._layers)

    def encode(self, k: Tensor, v: Tensor, first_position: int = 0) -> Tensor:
        """Refuse: see at_layer."""
        self._refuse()

    def dense(self, pages: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Refuse: see at_layer."""
        self._refuse()

    def scores(
        self, q: Tensor, pages: Tensor, rounding: Rounding = EIGHT_BIT, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Refuse: see at_layer."""
        self._refuse()

    def weigh(
        self, p: Tensor, pages: Tensor, rounding: Rounding = EIGHT_BIT, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Refuse: see at_layer."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UnsupportedError(f"expected the pages of one layer, found {self.name}; use at_layer(layer, num_layers)")


def require_model(codec: PageCodec, fingerprint: Callable[[], str], num_layers: int) -> None:
    """Raise FormatError if the codec is of a plan that was made for another model."""
    if isinstance(codec, PerLayerCodec):
        codec.plan.check_model(fingerprint(), num_layers)
