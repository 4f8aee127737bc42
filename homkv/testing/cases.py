"""The one table of shapes that tests and benchmarks run on: edges of pages and windows, odd groups, every head_dim."""

from dataclasses import dataclass

from homkv.spec import HEAD_DIMS

LENGTHS = (0, 1, 63, 64, 65, 127, 1000)  # tokens: nothing, one, around a page, several pages
GROUPS = (1, 3, 4, 5, 7, 8)  # query heads per kv head: MHA, SmolLM2 is 3, Llama 3 is 4, Qwen2.5 is 7
RAGGED = (0, 1, 64, 203, 1000)  # lengths of the sequences of one batch


@dataclass(frozen=True)
class Case:
    """One shape of attention: G kv heads, R query heads each, S tokens, D channels."""

    length: int
    group: int
    head_dim: int
    num_kv_heads: int = 2

    @property
    def num_q_heads(self) -> int:
        """Query heads: group x kv heads."""
        return self.group * self.num_kv_heads

    @property
    def id(self) -> str:
        """Name for pytest, for example ``S64-R3-D128``."""
        return f"S{self.length}-R{self.group}-D{self.head_dim}"


def _cases() -> tuple[Case, ...]:
    """Vary one thing at a time around (1000 tokens, group 4, head_dim 128), then every length at SmolLM2's shape."""
    cases = [Case(length, 4, 128) for length in LENGTHS]
    cases += [Case(1000, group, 128) for group in GROUPS if group != 4]
    cases += [Case(1000, 4, head_dim) for head_dim in HEAD_DIMS if head_dim != 128]
    cases += [Case(length, 3, 64) for length in LENGTHS]
    return tuple(cases)


CASES = _cases()
