"""Generate with a 2-bit KV cache inside transformers. Run: python examples/attach.py"""

import homkv
from homkv.models import load_model
from homkv.texts import essay

loaded = load_model("smollm2")
prompt = loaded.tokenizer(essay("apple")[:12000], return_tensors="pt")
num_tokens = prompt["input_ids"].shape[1]

exact = loaded.model.generate(**prompt, max_new_tokens=24, do_sample=False)
with homkv.attach(loaded.model, "balanced") as kv:
    ours = loaded.model.generate(**prompt, max_new_tokens=24, do_sample=False)

print("exact:   ", repr(loaded.tokenizer.decode(exact[0, num_tokens:])))
print("balanced:", repr(loaded.tokenizer.decode(ours[0, num_tokens:])))
fp16 = 4 * loaded.num_layers * loaded.num_kv_heads * loaded.head_dim * (num_tokens + 23)
print(f"KV: {fp16 / kv.last_cache.kv_bytes():.2f} times smaller than fp16 after {num_tokens + 23} tokens")
