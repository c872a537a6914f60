"""What other nodes might hand over by mistake: objects of the wrong kind or shape, each under a name."""

import comfy.model_base
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import torch

WIDTH = 64  # of the demo's captions


def latent(*shape: int, value: float | None = None) -> dict:
    return {"samples": torch.randn(*shape) if value is None else torch.full(shape, value)}


def condition(*shape: int, **more) -> list:
    return [[torch.randn(*shape), more]]


def foreign_model():
    """A Flux of toy size: another kind of network in the host's own model object."""
    config = comfy.supported_models.Flux(
        {
            "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 8, "context_in_dim": 8,
            "hidden_size": 16, "mlp_ratio": 2.0, "num_heads": 1, "depth": 1, "depth_single_blocks": 1,
            "axes_dim": [4, 6, 6], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": False,
            "txt_ids_dims": [],
        }
    )  # fmt: skip
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    return comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


class Bare:
    """Has nothing that anybody would ask for."""


OBJECTS = {
    "LATENT": {
        "four channels": lambda: latent(1, 4, 3, 8, 8),
        "an image's": lambda: latent(1, 16, 8, 8),
        "NaN": lambda: latent(1, 16, 3, 8, 8, value=float("nan")),
        "infinite": lambda: latent(1, 16, 3, 8, 8, value=float("inf")),
        "no frames": lambda: latent(1, 16, 0, 8, 8),
        "no batch": lambda: latent(0, 16, 3, 8, 8),
        "odd size": lambda: latent(1, 16, 3, 7, 8),
        "one pixel": lambda: latent(1, 16, 3, 1, 1),
        "no size": lambda: latent(1, 16, 3, 0, 8),
        "no samples": lambda: {"noise_mask": torch.ones(1)},
        "samples of text": lambda: {"samples": "latent"},
        "a tensor": lambda: torch.zeros(1, 16, 3, 8, 8),
        "integers": lambda: {"samples": torch.ones(1, 16, 3, 8, 8, dtype=torch.int64)},
    },
    "IMAGE": {
        "one pixel": lambda: torch.rand(1, 1, 1, 3),
        "no frames": lambda: torch.rand(0, 64, 64, 3),
        "one channel": lambda: torch.rand(5, 64, 64, 1),
        "three dimensions": lambda: torch.rand(64, 64, 3),
        "no size": lambda: torch.rand(5, 0, 64, 3),
        "NaN": lambda: torch.full((5, 64, 64, 3), float("nan")),
        "a list": lambda: [torch.rand(64, 64, 3)],
    },
    "MODEL": {
        "Flux": foreign_model,
        "bare": Bare,
        "a network": lambda: torch.nn.Linear(2, 2),
        "Raylight's actors": lambda: {"workers": [Bare()]},
    },
    "VAE": {
        "bare": Bare,
        "a network": lambda: torch.nn.Linear(2, 2),
        "empty": lambda: comfy.sd.VAE(sd={}),
    },
    "CLIP": {"bare": Bare},
    "CONDITIONING": {
        "empty": lambda: [],
        "too wide": lambda: condition(1, 8, 768),
        "flat": lambda: condition(8, WIDTH),
        "no tokens": lambda: condition(1, 0, WIDTH),
        "batch of three": lambda: condition(3, 8, WIDTH),
        "NaN": lambda: [[torch.full((1, 8, WIDTH), float("nan")), {}]],
        "a tensor": lambda: torch.zeros(1, 8, WIDTH),
        "pairs of text": lambda: [["caption", {}]],
        "an area": lambda: condition(1, 8, WIDTH, area=(4, 4, 0, 0), strength=1.0),
        "a mask": lambda: condition(1, 8, WIDTH, mask=torch.ones(1, 64, 64), mask_strength=1.0),
        "a concat": lambda: condition(1, 8, WIDTH, concat_latent_image=torch.zeros(1, 16, 6, 8, 8),
                                      concat_mask=torch.ones(1, 1, 6, 8, 8)),
    },
    "INT": {"text": lambda: "5", "a fraction": lambda: 0.5},
    "FLOAT": {"text": lambda: "0.5", "NaN": lambda: float("nan")},
    "BOOLEAN": {"text": lambda: "yes"},
    "COMBO": {"a number": lambda: 5, "of no list": lambda: "text\nof two lines"},
    "STRING": {"a number": lambda: 5},
    "FLOWCACHE_STATE": {"bare": Bare, "a latent": lambda: latent(1, 16, 3, 8, 8)},
    "FLOWCACHE_REPORT": {"bare": Bare, "text": lambda: "report"},
    "FLOWCACHE_STREAM": {"bare": Bare, "text": lambda: "stream"},
    "FLOWCACHE_RESUME": {"bare": Bare, "a number": lambda: 5},
}  # fmt: skip


class WrongObject:
    """Gives one of them, as an output of any type."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"name": (NAMES,)}})
    RETURN_TYPES = ("*",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, name: str):
        torch.manual_seed(0)
        kind, what = name.split(": ")
        return (OBJECTS[kind][what](),)


NAMES = [f"{kind}: {what}" for kind, objects in OBJECTS.items() for what in objects]
