"""Make umt5.npz: transformers' UMT5EncoderModel on seeded weights.

Needs torch and transformers (made with torch 2.13, transformers 5.23):  python tests/golden/make_umt5.py
"""

import numpy as np
import seeded
import torch
from transformers import UMT5Config, UMT5EncoderModel

CONFIG = {"vocab_size": 100, "d_model": 48, "d_kv": 12, "d_ff": 96, "num_layers": 2, "num_heads": 4}
LENGTH = 160  # past max_distance = 128, so that every bucket is used
COUNTS = (LENGTH, 37)  # real tokens of each prompt

model = UMT5EncoderModel(UMT5Config(**CONFIG, feed_forward_proj="gated-gelu", dropout_rate=0.0)).eval()
shapes = {k: tuple(v.shape) for k, v in model.state_dict().items() if k != "encoder.embed_tokens.weight"}
weights = seeded.weights(shapes)
state = {k: torch.from_numpy(v) for k, v in weights.items()}
model.load_state_dict(state | {"encoder.embed_tokens.weight": state["shared.weight"]}, strict=True)

ids = (seeded.uniform("ids", (2, LENGTH)) * 1e6).astype(np.int64) % CONFIG["vocab_size"]
mask = (np.arange(LENGTH) < np.array(COUNTS)[:, None]).astype(np.int64)
with torch.no_grad():
    out = model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).last_hidden_state.numpy()
attention = model.encoder.block[0].layer[0].SelfAttention
seeded.save(
    "umt5",
    shapes,
    ids=ids.astype(np.int32),
    mask=mask.astype(np.int32),
    output=out * mask[..., None].astype(np.float32),
    # of the offsets -300 ... 300
    buckets=attention._relative_position_bucket(torch.arange(-300, 301)).numpy(),
)
