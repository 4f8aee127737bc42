"""One schema of settings for all roles: a file, HOMKV_… variables and flags; the later ones win."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from homkv.cores import num_cores
from homkv.errors import UnsupportedError
from homkv.plan import spelled
from homkv.spec import DEFAULT_FORMAT

CONFIG_FILE = "homkv.toml"
HELP = (
    "Serve a model: all in one, or the role that was named: gateway, prefill or decode. See docs/serving.md. Settings "
    "may come from --config FILE, a TOML file. With stock vLLM instead: homkv serve --engine vllm --help."
)
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Positive = Annotated[int, Field(ge=1)]
Role = Literal["all", "gateway", "prefill", "decode"]


class Remote(BaseModel):
    """An instance on another host: where it listens, and the file with its public key (none if insecure)."""

    endpoint: str
    key_file: Path | None = None

    @classmethod
    def parse(cls, text: str) -> "Remote":
        """Read ``tcp://HOST:PORT=FILE.pub``."""
        endpoint, _, file = text.partition("=")
        return cls(endpoint=endpoint, key_file=Path(file) if file else None)


class ServeSettings(BaseSettings):
    """Everything that `homkv serve` can be told."""

    model_config = SettingsConfigDict(env_prefix="HOMKV_", extra="forbid", cli_kebab_case=True, cli_implicit_flags=True)

    model: str = Field("smollm2", description="smollm2, qwen2.5-coder-0.5b, a folder, a .gguf file or a hub name")
    served_model_name: str | None = Field(None, description="name of the model in the API; default: --model")
    kv_cache_dtype: list[str] = Field(
        [DEFAULT_FORMAT], description="formats that decode instances hold, or plan files; first: used"
    )
    source: str = Field("fp16", description="format in which prefill instances keep prefixes, converted for the wire")
    num_threads: Positive | None = Field(None, description="compute threads of an instance; default: cores shared out")
    log_json: bool = Field(False, description="logs as JSON lines")
    drain_s: Seconds = Field(30.0, description="after SIGTERM or Ctrl-C, requests have so long to finish")

    prefill: int = Field(1, ge=0, description="prefill instances on this machine (role all)")
    decode: int = Field(1, ge=0, description="decode instances on this machine (role all)")
    prefill_at: list[str] = Field([], description="instances elsewhere: tcp://HOST:PORT=FILE.pub, may be repeated")
    decode_at: list[str] = Field([], description="instances elsewhere: tcp://HOST:PORT=FILE.pub, may be repeated")

    host: str = Field("127.0.0.1", description="where the gateway listens")
    port: int = Field(8000, ge=0, le=65535, description="0 takes a free one")
    api_key: SecretStr | None = Field(None, description="clients must send it; better set HOMKV_API_KEY or the file")
    api_key_file: Path | None = Field(None, description="file with the API key")
    policy: Literal["fail", "recompute"] = Field("fail", description="what happens when an instance fails a request")
    max_requests: Positive = Field(512, description="accepted at a time; more are answered 429")
    max_records: Positive = Field(2000, description="newest requests that can be looked up")
    max_new_tokens: Positive = Field(4096, description="of one request")
    max_body_bytes: Positive = Field(4 << 20, description="of an HTTP request; more is answered 413")
    request_timeout_s: Seconds = Field(600.0, description="a request that has not ended by then fails")
    send_timeout_s: Seconds = Field(30.0, description="a client that takes no byte for so long is cut off")

    endpoint: str = Field("tcp://127.0.0.1:0", description="where a prefill or decode instance listens")
    keys: Path | None = Field(None, description="key pair of this process (homkv keys new)")
    trust: Path | None = Field(None, description="public keys that may connect, one per line")
    insecure: bool = Field(False, description="no encryption, no authentication between instances")
    until_eof: bool = Field(False, description="stop when standard input closes")

    max_tokens: Positive = Field(32_768, description="tokens of KV that a decode instance holds, per format")
    max_sequences: Positive = Field(64, description="sequences that a decode instance runs, per format")
    share_prefixes: bool = Field(True, description="requests of a decode instance share the pages of equal prefixes")
    lease_s: Seconds = Field(30.0, description="room for which no sign of life comes for so long is freed")
    max_lease_s: Seconds = Field(600.0, description="room whose KV is not complete by then is freed")
    chunk_tokens: Positive = Field(512, description="tokens of a prompt that are computed in one turn")
    overlap: bool = Field(True, description="layers travel while the next ones are computed")
    prefix_bytes: int = Field(256 << 20, ge=0, description="memory of a prefill instance for prefixes")
    link_gbps: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        None, description="send as slowly as a link of so many Gb/s"
    )

    @field_validator("prefill_at", "decode_at")
    @classmethod
    def _are_endpoints(cls, value: list[str]) -> list[str]:
        for text in value:
            if not text.startswith("tcp://"):
                raise ValueError(f"expected tcp://HOST:PORT=FILE.pub, found {text!r}")
        return value

    @field_validator("kv_cache_dtype")
    @classmethod
    def _spell_plans(cls, value: list[str]) -> list[str]:
        return [spelled(name) for name in value]  # FormatError is a ValueError

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if not self.kv_cache_dtype:
            raise ValueError("expected at least one --kv-cache-dtype")
        if self.api_key is not None and self.api_key_file is not None:
            raise ValueError("expected --api-key or --api-key-file, found both")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags and arguments, then the environment, then the file."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @property
    def served_name(self) -> str:
        """Name of the model in the API."""
        return self.served_model_name or self.model

    @property
    def threads(self) -> int:
        """Compute threads of one instance of this machine."""
        return self.num_threads or max(1, num_cores() // max(self.prefill + self.decode, 1))

    def read_api_key(self) -> str | None:
        """The API key, from wherever it was given. Raises UnsupportedError if its file is empty or not readable."""
        if self.api_key_file is None:
            return None if self.api_key is None else self.api_key.get_secret_value()
        try:
            key = self.api_key_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UnsupportedError(f"expected an API key in {self.api_key_file}, found {error}") from error
        if not key:
            raise UnsupportedError(f"expected an API key in {self.api_key_file}, found an empty file; write one")
        return key


def load_settings(args: list[str] | None = None, config: Path | None = None, **values: Any) -> ServeSettings:
    """Read settings: ``config`` (default: homkv.toml here, if there is one), environment, then flags ``args``.

    Raises UnsupportedError that names every setting that cannot be used.
    """
    if config is not None and not config.is_file():
        raise UnsupportedError(f"expected a TOML file at {config}, found none; leave --config out for the defaults")

    class FromFile(ServeSettings):
        __doc__ = HELP
        model_config = SettingsConfigDict(toml_file=config or CONFIG_FILE)

    FromFile.__name__ = "ServeSettings"
    try:
        flags: dict[str, Any] = {"_cli_parse_args": args, "_cli_prog_name": "homkv serve"}
        return FromFile(**flags, **values)
    except ValidationError as error:
        raise UnsupportedError(f"expected settings as docs/serving.md describes, found {_explain(error)}") from error
    except ValueError as error:  # tomllib's and pydantic-settings' own: their texts name the place
        raise UnsupportedError(f"expected readable settings, found: {error}") from error


def _explain(error: ValidationError) -> str:
    parts = []
    for problem in error.errors(include_url=False):
        names = [str(part) for part in problem["loc"] if isinstance(part, str)]
        flag = "--" + names[0].replace("_", "-") if names else "settings"
        parts.append(f"{flag} {problem['input']!r}: {problem['msg']}" if names else str(problem["msg"]))
    return "; ".join(parts)
