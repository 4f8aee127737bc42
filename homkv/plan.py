"""Per-layer plans: which rows format each layer of one model is stored in. Standard library only.

A plan is a small JSON file that `homkv calibrate` writes and every ``--kv-cache-dtype`` accepts. Where a plan has to
travel, in a request or a setting, it does so as its *spelling*, a format name that holds all of it:
``per-layer:model=FINGERPRINT,version=1,layers=k4420v2222*12/k8420v4222/k4420v2222*17``.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from homkv.errors import FormatError
from homkv.spec import FORMAT_VERSION, RowsSpec

SCHEMA = 1  # of the JSON file
BASE = "per-layer"
MAX_LAYERS = 4096
MAX_FILE_BYTES = 1 << 20
FIELDS = {"homkv_plan", "format_version", "name", "model", "num_layers", "layers", "provenance"}


@dataclass(frozen=True)
class LayerPlan:
    """A format for every layer of one model.

    ``model``: fingerprint (32 hex digits) of the model it was made for; ``layers``: canonical ``kABCDvEFGH`` of layer
    0, 1, …; ``name``: for people; ``provenance``: how it was found, as JSON values. Raises FormatError.
    """

    model: str
    layers: tuple[str, ...]
    name: str = "plan"
    format_version: int = FORMAT_VERSION
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise FormatError(
                f"expected a plan for page format {FORMAT_VERSION}, found {self.format_version}; "
                "run `homkv calibrate` again with this version"
            )
        if not re.fullmatch("[0-9a-f]{32}", self.model):
            raise FormatError(f"expected a model's fingerprint of 32 hex digits, found {self.model!r}")
        if not 0 < len(self.layers) <= MAX_LAYERS:
            raise FormatError(f"expected 1 to {MAX_LAYERS} layers, found {len(self.layers)}")
        specs = [RowsSpec.parse(name) for name in self.layers]
        object.__setattr__(self, "layers", tuple(spec.name for spec in specs))
        windows = sorted({spec.min_window for spec in specs})
        if len(windows) > 1:
            raise FormatError(
                f"expected one window in all layers of a plan, found {windows}; their pages must be equal"
            )

    @property
    def title(self) -> str:
        """Short name that tells plans apart, ``per-layer-`` and 12 hex digits of what decides the bytes."""
        return f"{BASE}-{hashlib.sha256(self.spelling.encode()).hexdigest()[:12]}"

    @property
    def spelling(self) -> str:
        """The plan as a format name, without name and provenance: what :func:`parse_options` of homkv.formats reads."""
        runs = [(layer, len(list(group))) for layer, group in groupby(self.layers)]
        layers = "/".join(layer if count == 1 else f"{layer}*{count}" for layer, count in runs)
        return f"{BASE}:model={self.model},version={self.format_version},layers={layers}"

    @classmethod
    def from_options(cls, options: Mapping[str, str]) -> "LayerPlan":
        """Read the ``key=value`` pairs of a spelling. Raises FormatError."""
        if set(options) != {"model", "version", "layers"} or not options["version"].isascii():
            raise FormatError(f"expected {BASE}:model=…,version=…,layers=…, found the keys {sorted(options)}")
        layers: list[str] = []
        for run in options["layers"].split("/"):
            match = re.fullmatch(r"(k[0-9]{4}v[0-9]{4}(?:w[0-9]+)?)(?:\*([0-9]{1,4}))?", run)
            if match is None:
                raise FormatError(f"expected runs like k4420v2222*12, found {run!r} in a per-layer format")
            layers += [match[1]] * int(match[2] or 1)
            if len(layers) > MAX_LAYERS:
                raise FormatError(f"expected at most {MAX_LAYERS} layers, found more in a per-layer format")
        version = int(options["version"]) if options["version"].isdigit() else -1
        return cls(options["model"], tuple(layers), format_version=version)

    def dumps(self) -> str:
        """The JSON text of a plan file."""
        plan = {
            "homkv_plan": SCHEMA,
            "format_version": self.format_version,
            "name": self.name,
            "model": self.model,
            "num_layers": len(self.layers),
            "layers": {str(i): layer for i, layer in enumerate(self.layers)},
            "provenance": dict(self.provenance),
        }
        return json.dumps(plan, indent=2) + "\n"

    @classmethod
    def loads(cls, text: str, where: str = "the plan") -> "LayerPlan":
        """Read :meth:`dumps`. Raises FormatError that names what is wrong with it."""
        try:
            plan = json.loads(text)
        except (ValueError, RecursionError) as error:  # brackets without end
            raise FormatError(f"expected JSON in {where}, found: {error}") from error
        if not isinstance(plan, dict) or set(plan) != FIELDS:
            found = sorted(plan) if isinstance(plan, dict) else type(plan).__name__
            raise FormatError(f"expected the fields {sorted(FIELDS)} in {where}, found {found}; see docs/plans.md")
        if plan["homkv_plan"] != SCHEMA:
            raise FormatError(f"expected plan schema {SCHEMA} in {where}, found {plan['homkv_plan']!r}")
        kinds = {
            "format_version": int,
            "name": str,
            "model": str,
            "num_layers": int,
            "layers": dict,
            "provenance": dict,
        }
        for key, kind in kinds.items():
            if type(plan[key]) is not kind:
                raise FormatError(f"expected {key} of type {kind.__name__} in {where}, found {plan[key]!r:.80}")
        return cls(
            plan["model"],
            _in_order(plan["layers"], plan["num_layers"], where),
            plan["name"],
            plan["format_version"],
            plan["provenance"],
        )

    @classmethod
    def load(cls, path: str | Path) -> "LayerPlan":
        """Read a plan file. Raises FormatError."""
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
            if len(data) > MAX_FILE_BYTES:
                raise FormatError(f"expected a plan of at most {MAX_FILE_BYTES} bytes, found more in {path}")
            return cls.loads(data.decode("utf-8"), str(path))
        except OSError as error:
            raise FormatError(
                f"expected a plan at {path}, found {error.strerror}; `homkv calibrate` makes one"
            ) from error
        except UnicodeDecodeError as error:
            raise FormatError(f"expected UTF-8 in {path}, found other bytes; `homkv calibrate` makes plans") from error

    def save(self, path: str | Path) -> None:
        """Write the plan file. Raises FormatError if that is not possible."""
        try:
            Path(path).write_text(self.dumps(), encoding="utf-8")
        except OSError as error:
            raise FormatError(f"expected to write {path}, found {error.strerror}; choose another place") from error

    def check_model(self, fingerprint: str, num_layers: int) -> None:
        """Raise FormatError unless the plan was made for this model."""
        if fingerprint != self.model:
            raise FormatError(
                f"expected a plan for the model {fingerprint}, found one for {self.model}; a plan belongs to one model "
                "in one dtype: run `homkv calibrate` for this one"
            )
        self.check_layers(num_layers)

    def check_layers(self, num_layers: int) -> None:
        """Raise FormatError unless the plan has this many layers."""
        if num_layers != len(self.layers):
            raise FormatError(f"expected a plan for {num_layers} layers, found one for {len(self.layers)}")


def _in_order(layers: Mapping[str, Any], num_layers: int, where: str) -> tuple[str, ...]:
    """The formats of layers 0 to num_layers - 1. Raises FormatError for a missing, unknown or malformed one."""
    if not 0 < num_layers <= MAX_LAYERS:
        raise FormatError(f"expected num_layers from 1 to {MAX_LAYERS} in {where}, found {num_layers}")
    wanted = [str(i) for i in range(num_layers)]
    unknown, missing = sorted(set(layers) - set(wanted)), [i for i in wanted if i not in layers]
    if unknown or missing:
        raise FormatError(
            f"expected the layers 0 to {num_layers - 1} in {where}, found unknown {unknown[:5]} and missing "
            f"{missing[:5]}; every layer needs a format"
        )
    wrong = [value for value in layers.values() if not isinstance(value, str)]
    if wrong:
        raise FormatError(f"expected format names such as k4420v2222 in {where}, found {wrong[0]!r}")
    return tuple(layers[i] for i in wanted)


def spelled(kv_cache_dtype: str) -> str:
    """A format's name as given by a user: the path of a plan file (``*.json``) becomes the plan's spelling.

    Only for what a user typed on this machine: names in requests must never be read as paths. Raises FormatError.
    """
    return LayerPlan.load(kv_cache_dtype).spelling if kv_cache_dtype.endswith(".json") else kv_cache_dtype
