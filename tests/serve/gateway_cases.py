"""A gateway on a free port, in a thread, before instances in threads."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import uvicorn
from serve_cases import ENDPOINT, OPEN, OPTIONS, Running, twin, wait_until
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from homkv.models import LoadedModel
from homkv.serve.decode import DecodeInstance
from homkv.serve.dispatch import Dispatcher
from homkv.serve.gateway.app import Gateway, make_app
from homkv.serve.metrics import Metrics
from homkv.serve.prefill import PrefillInstance
from homkv.serve.query import DispatchOptions
from homkv.serve.settings import ServeSettings, load_settings

TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"


def words(count: int = 200) -> PreTrainedTokenizerFast:
    """A tokenizer of one word per token: ``w7`` is 7."""
    backend = Tokenizer(WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def text_of(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


@dataclass
class Service:
    """A running gateway and everything behind it."""

    url: str
    gateway: Gateway
    prefills: list[PrefillInstance]
    decodes: list[DecodeInstance]
    num_free: list[int]

    @property
    def dispatcher(self) -> Dispatcher:
        return self.gateway.dispatcher

    def free_blocks(self) -> list[int]:
        return [engine.num_free_blocks for decode in self.decodes for engine in decode.engines.values()]

    def assert_free(self) -> None:
        """No request is left anywhere, and nothing is held."""
        instances = [*self.prefills, *self.decodes]
        wait_until(lambda: not any(instance.num_requests for instance in instances))
        wait_until(lambda: self.dispatcher.num_accepted == 0)
        assert self.free_blocks() == self.num_free
        assert all(member.num_tokens == 0 for member in self.dispatcher.members)
        for decode in self.decodes:
            for engine in decode.engines.values():
                engine.check()


@contextmanager
def serving(
    loaded: LoadedModel,
    *,
    num_prefill: int = 1,
    num_decode: int = 1,
    tokenizer: Any = None,
    limits: DispatchOptions | None = None,
    decode_options: dict[str, Any] | None = None,
    **settings: Any,
) -> Iterator[Service]:
    """Run a service; its settings are those of `homkv serve`."""
    loaded = replace(loaded, tokenizer=tokenizer or words(loaded.vocab_size))
    config: ServeSettings = load_settings([], model="m", port=0, **settings)
    with ExitStack() as stack:
        options = {"max_tokens": 4096, "options": OPTIONS} | (decode_options or {})
        decodes = [
            DecodeInstance(twin(loaded), config.kv_cache_dtype, ENDPOINT, OPEN, **options) for _ in range(num_decode)
        ]
        prefills = [
            PrefillInstance(loaded, ENDPOINT, OPEN, source=config.source, link_gbps=config.link_gbps, options=OPTIONS)
            for _ in range(num_prefill)
        ]
        running = [stack.enter_context(Running(instance)) for instance in (*decodes, *prefills)]
        addresses = [each.address for each in running]
        limits = limits or DispatchOptions(max_requests=config.max_requests, policy=config.policy)
        metrics = Metrics()
        dispatcher = Dispatcher(
            addresses[num_decode:], addresses[:num_decode], OPEN, limits=limits, options=OPTIONS, on_end=metrics.ended
        )
        stack.callback(dispatcher.close)
        gateway = Gateway(config, loaded.tokenizer, loaded.context_length, dispatcher, metrics)
        url = stack.enter_context(_http(gateway))
        service = Service(url, gateway, prefills, decodes, [])
        service.num_free = service.free_blocks()
        wait_until(lambda: all(member.status is not None for member in dispatcher.members))
        yield service


@contextmanager
def _http(gateway: Gateway) -> Iterator[str]:
    config = uvicorn.Config(
        make_app(gateway), host="127.0.0.1", port=0, log_config=None, timeout_graceful_shutdown=2, lifespan="on"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()
