"""What a decode instance checks and reads of what it is sent. No state."""

from collections.abc import Mapping

import torch

from homkv.errors import FormatError, ShapeError
from homkv.models import LoadedModel
from homkv.seal import LayerContent
from homkv.serve.convert import EXACT_DTYPE
from homkv.serve.engine import Engine, serving_codec
from homkv.serve.messages import Reserve
from homkv.transport.assemble import LayerData, SequencePlan


def check_reserve(ask: Reserve, engines: Mapping[str, Engine], loaded: LoadedModel) -> None:
    """Raise ShapeError or FormatError for a request that can never be served."""
    if ask.kv_cache_dtype not in engines:
        raise FormatError(
            f"expected a format of this decode instance ({', '.join(engines)}), found {ask.kv_cache_dtype!r}; "
            "start it with --kv-cache-dtype for this one"
        )
    serving_codec(ask.source, loaded.head_dim)
    total, context = len(ask.prompt_ids) + ask.max_new_tokens, loaded.context_length
    if not ask.prompt_ids or ask.max_new_tokens == 0:
        raise ShapeError(
            f"expected at least one prompt token and one new token, found {len(ask.prompt_ids)} and "
            f"{ask.max_new_tokens}; send a prompt"
        )
    if total > context:
        raise ShapeError(
            f"expected prompt and answer within the context of {context} tokens, found {total}; shorten the prompt "
            "or max_new_tokens"
        )
    if ask.forced_ids is not None and len(ask.forced_ids) != ask.max_new_tokens:
        raise ShapeError(
            f"expected {ask.max_new_tokens} forced ids, one per new token, found {len(ask.forced_ids)}; "
            "make the lengths equal"
        )
    vocabulary = loaded.vocab_size
    if any(token >= vocabulary for token in ask.forced_ids or ()):
        raise ShapeError(
            f"expected forced ids below the vocabulary's {vocabulary}, found {max(ask.forced_ids or [])}; "
            "were they tokenized for another model?"
        )
    engines[ask.kv_cache_dtype].require(total)


def content_of(plan: SequencePlan, data: LayerData) -> LayerContent:
    """Tensors over the received bytes, which are ours."""
    e = plan.expect
    shape = (e.num_kv_heads, plan.num_exact, e.head_dim)

    def tensor(view: memoryview, dtype: torch.dtype) -> torch.Tensor:
        return torch.frombuffer(view, dtype=dtype) if view.nbytes else torch.empty(0, dtype=dtype)

    return LayerContent(
        num_tokens=plan.num_tokens,
        pages=tensor(data.pages, torch.uint8).view(
            plan.num_sent_pages, e.num_kv_heads, e.at_layer(data.layer).page_bytes
        ),
        exact_k=tensor(data.exact_k, EXACT_DTYPE).view(shape),
        exact_v=tensor(data.exact_v, EXACT_DTYPE).view(shape),
    )
