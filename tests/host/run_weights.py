"""Runs in the host's Python: `run_weights.py jobs.json` loads checkpoints with ComfyUI's own code and runs one chunk.

A job says the file, the weight type, a LoRA, whether the layers keep packed weights, and where to write the result:
the velocity, and which class the host chose.
"""

import json
import sys

HOST, PACK, JOBS = sys.argv[1:4]
sys.path[:0] = [HOST]
sys.path.append(PACK)
sys.argv = [sys.argv[0], "--cpu"]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.ops  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from flowcache_core.checkpoints import load  # noqa: E402
from flowcache_core.history.positions import rotate  # noqa: E402
from flowcache_core.models.skyreels import SkyReelsBackbone, add_frame_rate  # noqa: E402
from flowcache_core.models.wan import WanBackbone  # noqa: E402


class PackedOps(comfy.ops.manual_cast):
    """Layers whose weights are packed in blocks and unpacked when they run, as ComfyUI-GGUF's are.

    Nobody who reads `.weight` gets a matrix.
    """

    class Linear(comfy.ops.manual_cast.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *args):
            blocks = state_dict[f"{prefix}weight"].float().unflatten(-1, (-1, 8))
            self.scale = blocks.abs().amax(dim=-1, keepdim=True) / 127
            packed = (blocks / self.scale).round().to(torch.int8)
            self.weight = torch.nn.Parameter(packed, requires_grad=False)
            self.bias = torch.nn.Parameter(state_dict[f"{prefix}bias"], requires_grad=False)

        def forward(self, x):
            weight = (self.weight.float() * self.scale).flatten(-2)
            return F.linear(x, weight.to(x.dtype), self.bias.to(x.dtype))


def run(job: dict) -> None:
    options = {"dtype": getattr(torch, job["dtype"])} if job.get("dtype") else {}
    if job.get("packed"):
        options["custom_operations"] = PackedOps
    model = comfy.sd.load_diffusion_model(job["path"], model_options=options)
    if job.get("lora"):
        model, _ = comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(job["lora"]), 1.0, 1.0)
    model.patch_model()
    network = model.model.diffusion_model
    given = load_file(job["inputs"])
    if job.get("fps"):
        add_frame_rate(network, load(job["path"])[1], comfy.ops.manual_cast)
        backbone = SkyReelsBackbone(network, job["fps"])
    else:
        backbone = WanBackbone(network)
    table = backbone.rotary.table(torch.arange(given["x"].shape[2]), *backbone.grid(*given["x"].shape[-2:]))

    def attend(layer, q, k, v):
        return F.scaled_dot_product_attention(rotate(q, table), rotate(k, table), v)

    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    x, text = given["x"].to(dtype), given["text"].to(dtype)
    with torch.inference_mode():
        residual = backbone.trunk(x, given["sigma"], backbone.context(text), attend)
        velocity = backbone.head(x, given["sigma"], residual).float()
    kept = str(network.blocks[0].self_attn.q.weight.dtype).removeprefix("torch.")
    metadata = {"network": type(network).__name__, "weights": kept, "computed": str(dtype)}
    save_file({"velocity": velocity.clone()}, job["out"], metadata)


for job in json.loads(open(JOBS).read()):
    run(job)
