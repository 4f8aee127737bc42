"""Entropy coding of pages for the wire: one distribution per channel, range coding by the ``constriction`` library."""

import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from homkv.errors import FormatError, UnsupportedError

HEAD = struct.Struct("<BBI")  # largest magnitude of K and of V codes, bytes of their tables
INT8_MAX = 127


def library() -> Any:
    """The coder's library. Raises UnsupportedError if it is not installed."""
    try:
        import constriction
    except ImportError as error:
        raise UnsupportedError(
            "expected the package constriction for formats with an entropy coder, found none; run: pip install "
            "'homkv[eval]'"
        ) from error
    return constriction


class ChannelCoder:
    """Codes of pages ``[N, G, P] uint8`` packed by a range coder, the rest of a page as it is. Lossless.

    A page begins with ``k_code [T, D]`` and ``v_code [T, D]``, int8. Every kv head and channel has its distribution:
    how often each code occurs in ``chunk_pages`` pages (None: in all that travel together), stored as counts of
    ``table`` (uint16 or uint8) before the coded words, in the order chunk, K | V, head, channel.
    """

    def __init__(self, head_dim: int, page_tokens: int, page_bytes: int, chunk_pages: int | None, table: str) -> None:
        self._dim, self._tokens, self._page_bytes = head_dim, page_tokens, page_bytes
        self._code_bytes, self._chunk_pages, self._table = 2 * page_tokens * head_dim, chunk_pages, np.dtype(table)

    def require(self) -> None:
        """Raise UnsupportedError if the coder's library is not installed."""
        library()

    def encode(self, pages: memoryview, num_pages: int) -> bytes:
        """Pack ``num_pages`` pages of all heads, at least one."""
        rows = np.frombuffer(pages, np.uint8).reshape(num_pages, -1, self._page_bytes)
        codes = self._split(rows[..., : self._code_bytes].view(np.int8))  # [N, 2, G, D, T]
        largest = [max(1, int(np.abs(codes[:, i].astype(np.int16)).max(initial=0))) for i in (0, 1)]
        coder, tables = library().stream.queue.RangeEncoder(), []
        for chunk in self._chunks(num_pages):
            for side in (0, 1):
                symbols = codes[chunk, side].astype(np.int32) + largest[side]  # [n, G, D, T]
                symbols = symbols.transpose(1, 2, 0, 3).reshape(-1, symbols.shape[0] * self._tokens)
                for channel in symbols:
                    counts = self._counts(channel, 2 * largest[side] + 1)
                    tables.append(counts.tobytes())
                    coder.encode(channel, self._model(counts))
        table = b"".join(tables)
        words: NDArray[np.uint32] = coder.get_compressed()
        rest = rows[..., self._code_bytes :].tobytes()
        return HEAD.pack(*largest, len(table)) + table + rest + words.astype("<u4").tobytes()

    def decode(self, data: memoryview, num_pages: int, num_heads: int) -> bytes:
        """Unpack what :meth:`encode` made of ``num_pages`` pages. Raises FormatError for anything else."""
        rest_bytes = self._page_bytes - self._code_bytes
        rest_size = num_pages * num_heads * rest_bytes
        if len(data) < HEAD.size:
            raise _damaged(f"at least {HEAD.size} bytes", len(data))
        *largest, table_bytes = HEAD.unpack_from(data)
        num_tables = len(self._chunks(num_pages)) * num_heads * self._dim
        expected = num_tables * sum(2 * x + 1 for x in largest) * self._table.itemsize
        words_at = HEAD.size + table_bytes + rest_size
        if table_bytes != expected or 0 in largest or max(largest) > INT8_MAX or len(data) < words_at:
            raise _damaged(f"tables of {expected} bytes and {rest_size} more", f"{table_bytes} and {len(data)} in all")
        if (len(data) - words_at) % 4:
            raise _damaged("whole 32-bit words", len(data) - words_at)
        counts = np.frombuffer(data[HEAD.size : HEAD.size + table_bytes], self._table.newbyteorder("<"))
        words = np.frombuffer(data[words_at:], "<u4").astype(np.uint32)
        rows = np.empty((num_pages, num_heads, self._page_bytes), np.uint8)
        rest = np.frombuffer(data[HEAD.size + table_bytes : words_at], np.uint8)
        rows[..., self._code_bytes :] = rest.reshape(num_pages, num_heads, rest_bytes)
        codes = self._decode_codes(words, counts, largest, num_pages, num_heads)
        rows[..., : self._code_bytes] = codes.transpose(0, 2, 1, 4, 3).reshape(num_pages, num_heads, -1).view(np.uint8)
        return rows.tobytes()

    def _decode_codes(
        self, words: NDArray[np.uint32], counts: NDArray[Any], largest: list[int], num_pages: int, num_heads: int
    ) -> NDArray[np.int8]:
        """``[N, 2, G, D, T]``. Raises FormatError."""
        codes = np.empty((num_pages, 2, num_heads, self._dim, self._tokens), np.int8)
        coder, at = library().stream.queue.RangeDecoder(words), 0
        for chunk in self._chunks(num_pages):
            pages = len(range(num_pages)[chunk])
            for side in (0, 1):
                size = 2 * largest[side] + 1
                channels = np.empty((num_heads * self._dim, pages * self._tokens), np.int32)
                for channel in channels:
                    table, at = counts[at : at + size], at + size
                    if not table.any():
                        raise _damaged("a distribution for every channel", "one without any count")
                    try:
                        channel[:] = coder.decode(self._model(table), channel.size)
                    except AssertionError as error:  # what the library says of words that no encoder made
                        raise _damaged("words of a range coder", str(error)) from error
                shape = (num_heads, self._dim, pages, self._tokens)
                codes[chunk, side] = (channels - largest[side]).reshape(shape).transpose(2, 0, 1, 3)
        if not coder.maybe_exhausted():
            raise _damaged("no words behind the last code", "some")
        return codes

    def _split(self, codes: NDArray[np.int8]) -> NDArray[np.int8]:
        """``[N, G, 2 * T * D]`` to ``[N, 2, G, D, T]``."""
        n, heads, _ = codes.shape
        return codes.reshape(n, heads, 2, self._tokens, self._dim).transpose(0, 2, 1, 4, 3)

    def _chunks(self, num_pages: int) -> list[slice]:
        step = self._chunk_pages or max(num_pages, 1)
        return [slice(at, min(at + step, num_pages)) for at in range(0, num_pages, step)]

    def _counts(self, channel: NDArray[np.int32], size: int) -> NDArray[Any]:
        """How often each symbol occurs, scaled to the table's dtype; what occurs has at least 1."""
        counts = np.bincount(channel, minlength=size)
        top = np.iinfo(self._table).max
        if counts.max() > top:
            counts = np.where(counts > 0, np.maximum(counts * top // counts.max(), 1), 0)
        return counts.astype(self._table.newbyteorder("<"))

    def _model(self, counts: NDArray[Any]) -> Any:
        return library().stream.model.Categorical(counts / counts.sum(dtype=np.float64), perfect=False)


def _damaged(expected: object, found: object) -> FormatError:
    return FormatError(f"expected {expected} in entropy-coded pages, found {found}; send the layer again")
