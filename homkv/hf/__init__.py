"""homkv inside transformers: a cache whose layers are pages, and the attention function that reads them.

    with homkv.attach(model, "balanced"):
        model.generate(...)

The model computes prompts exactly; every later token attends to the stored pages without restoring them. Layers of a
sliding window keep their few tokens exact. On a GPU pages, sinks and windows lie beside the model; homkv.generate
decodes there without waiting for the host.
"""

from homkv.hf.attach import Attachment, attach, measure
from homkv.hf.attention import switch_attention
from homkv.hf.cache import AttendingCache, KVCache

__all__ = ["Attachment", "AttendingCache", "KVCache", "attach", "measure", "switch_attention"]
