"""Options in a format's name, ``base:key=value,key=value``: read strictly, spelled in one way only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from homkv.errors import FormatError

LARGEST = (1 << 32) - 1
WHERE = "all options are in docs/hack.md and docs/rivals.md"
FLAG = {"0": False, "1": True}


@dataclass(frozen=True)
class Switch:
    """One ``key=value`` of a format's name. ``choices``: spelling -> value, or None for an integer below 2^32."""

    key: str
    field: str
    choices: Mapping[str, Any] | None

    def read(self, text: str) -> Any:
        """Value of one spelling. Raises FormatError."""
        if self.choices is not None and text in self.choices:
            return self.choices[text]
        if self.choices is None and text.isascii() and text.isdigit() and int(text) <= LARGEST:
            return int(text)
        raise FormatError(f"expected {self.key}={self.expected()}, found {self.key}={text}; {WHERE}")

    def spell(self, value: Any) -> str:
        """Spelling of one value. Raises FormatError if the switch has no such value."""
        if self.choices is None and isinstance(value, int) and 0 <= value <= LARGEST:
            return str(value)
        for text, choice in (self.choices or {}).items():
            if type(choice) is type(value) and choice == value:
                return text
        raise FormatError(f"expected {self.field} for {self.key}={self.expected()}, found {value!r}; {WHERE}")

    def expected(self) -> str:
        """The spellings, for messages."""
        return "|".join(self.choices) if self.choices is not None else f"0..{LARGEST}"


def numbers(*values: int) -> dict[str, int]:
    """Choices out of a few integers."""
    return {str(value): value for value in values}


class Options:
    """Base of a format's options: a frozen dataclass whose fields are what ``switches`` name, with defaults.

    Raises FormatError when built with a value that no switch spells.
    """

    base: ClassVar[str]
    switches: ClassVar[tuple[Switch, ...]]

    def __post_init__(self) -> None:
        for switch in self.switches:
            switch.spell(getattr(self, switch.field))

    @classmethod
    def parse(cls, options: Mapping[str, str]) -> Self:
        """Read the ``key=value`` pairs of a name. Raises FormatError for an unknown key or value."""
        known = {switch.key: switch for switch in cls.switches}
        unknown = sorted(set(options) - set(known))
        if unknown:
            first = cls.switches[0]
            example = f"{cls.base}:{first.key}={first.expected().split('|')[0]}"
            raise FormatError(
                f"expected options of {cls.base} among {', '.join(known)}, found {unknown}; for example {example}"
            )
        return cls(**{known[key].field: known[key].read(text) for key, text in options.items()})

    @property
    def name(self) -> str:
        """``base`` or ``base:key=value,...``: only what differs from the defaults, in the order of ``switches``."""
        default = type(self)()
        values = [(s, getattr(self, s.field)) for s in self.switches]
        shown = [f"{s.key}={s.spell(value)}" for s, value in values if value != getattr(default, s.field)]
        return self.base + (":" + ",".join(shown) if shown else "")
