"""Nodes for the tests alone: captions of T5 v1.1 XXL's width without its 9 GB of weights, a patch that sees every step,
a count of the guider's calls, a clock that jumps, a step that fails, a count of live objects, and wrong objects."""

import gc
import os
import sys
import time
from collections import Counter
from functools import partial, wraps

import comfy.ldm.wan.vae2_2
import comfy.samplers
import comfy.sd
import comfy.supported_models_base
import comfy.text_encoders.genmo
import folder_paths
import torch

from .patches import Patched
from .wrong_objects import WrongObject

WIDTH = 4096
SIZES = {"d_ff": 64, "d_kv": 64, "d_model": WIDTH, "num_heads": 2, "num_layers": 1}


class Caption:
    """A random embedding with the mask of so many tokens."""

    INPUT_TYPES = classmethod(
        lambda cls: {"required": {"seed": ("INT", {}), "tokens": ("INT", {}), "width": ("INT", {"default": WIDTH})}}
    )
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, seed: int, tokens: int, width: int = WIDTH):
        embedding = torch.randn(1, 256, width, generator=torch.Generator().manual_seed(seed))
        return ([[embedding, {"attention_mask": (torch.arange(256) < tokens).long()[None]}]],)


class Untold:
    """A model that does not say which file it is of, as GGUF loaders leave it."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",)}})
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, model):
        model = model.clone()
        model.cached_patcher_init = None
        return (model,)


class GGUFLoader:
    """As ComfyUI-GGUF's loader leaves a model: its prompt names a .gguf file, the model does not, and the frame-rate
    layers are gone. The weights come from a safetensors file; `packages` is a folder with the gguf package."""

    INPUT_TYPES = classmethod(
        lambda cls: {"required": {"unet_name": ("STRING", {}), "weights": ("STRING", {}), "packages": ("STRING", {})}}
    )
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, unet_name: str, weights: str, packages: str):
        sys.path.append(packages)
        model = comfy.sd.load_diffusion_model(folder_paths.get_full_path_or_raise("diffusion_models", weights))
        model.cached_patcher_init = None
        return (model,)


class SmallT5:
    """ComfyUI's own T5 of type 'mochi', with one block of random weights."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES = ("CLIP",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self):
        genmo = comfy.text_encoders.genmo
        target = comfy.supported_models_base.ClipTarget(genmo.MochiT5Tokenizer, genmo.mochi_te())
        clip = comfy.sd.CLIP(target, model_options={"t5xxl_model_config": SIZES | config()})
        torch.manual_seed(0)
        for parameter in clip.cond_stage_model.parameters():
            row = torch.randn(parameter.shape[-1]) if parameter.ndim else torch.ones(())
            parameter.data.copy_(
                row
                if parameter.ndim < 2
                else 0.1 * torch.randn(64, parameter.shape[1]).repeat(-(-len(parameter) // 64), 1)[: len(parameter)]
            )
        return (clip,)


class BrittleT5(SmallT5):
    """The same, which fails at a text with the word "boom"."""

    def make(self):
        (clip,) = super().make()
        tokenize = clip.tokenize

        def fails(text: str, *given, **more):
            if "boom" in text:
                raise RuntimeError("out of luck")
            return tokenize(text, *given, **more)

        clip.tokenize = fails
        return (clip,)


def config() -> dict:
    return {}


class SeeEveryStep:
    """Patches a model with a function that is shown each of the guider's results and leaves it as it is; it may hold
    something that cannot be looked into."""

    INPUT_TYPES = classmethod(
        lambda cls: {"required": {"model": ("MODEL",)}, "optional": {"opaque": ("BOOLEAN", {"default": False})}}
    )
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "test"

    def patch(self, model, opaque: bool = False):
        model, held = model.clone(), iter(()) if opaque else None
        model.set_model_sampler_post_cfg_function(lambda args: (held, args["denoised"])[1])
        return (model,)


class GuiderCalls:
    """Tells how often guiders have been asked for a step since the server began."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    IS_CHANGED = classmethod(lambda cls: float("nan"))
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "tell"
    CATEGORY = "test"
    count = 0

    def tell(self):
        return {"ui": {"text": [str(GuiderCalls.count)]}}


class FrameNoise:
    """Noise of which each frame has its own, whatever the length of the video."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"seed": ("INT", {})}})
    RETURN_TYPES = ("NOISE",)
    FUNCTION = "make"
    CATEGORY = "test"

    def __init__(self, seed: int = 0):
        self.seed = seed

    def make(self, seed: int):
        return (FrameNoise(seed),)

    def generate_noise(self, latent):
        batch, channels, frames, *size = latent["samples"].shape
        draws = [torch.Generator().manual_seed(1000 * self.seed + frame) for frame in range(frames)]
        return torch.cat([torch.randn(batch, channels, 1, *size, generator=draw) for draw in draws], dim=2)


class LatentAs:
    """A latent of another type, or that lies otherwise in memory."""

    INPUT_TYPES = classmethod(
        lambda cls: {"required": {"samples": ("LATENT",), "dtype": ("STRING", {}), "channels_last": ("BOOLEAN", {})}}
    )
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self, samples, dtype: str, channels_last: bool):
        layout = torch.channels_last_3d if channels_last else torch.contiguous_format
        made = samples["samples"].to(getattr(torch, dtype)).contiguous(memory_format=layout)
        return ({"samples": made},)


class HardTimes:
    """Sets the server's clock forwards or back by so many seconds, lets a step fail after so many from now on (0:
    none), and refuses to put a new video in the place of another with an error of that number (0: does it)."""

    INPUT_TYPES = classmethod(
        lambda cls: {"optional": {name: ("INT", {"default": 0}) for name in ("clock", "fails_after", "refused")}}
    )
    IS_CHANGED = classmethod(lambda cls, **inputs: float("nan"))
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "set"
    CATEGORY = "test"
    clocks = time.time, time.time_ns
    replace = os.replace
    fails_at = 0  # by the count of the guider's calls

    def set(self, clock: int = 0, fails_after: int = 0, refused: int = 0):
        seconds, nanoseconds = HardTimes.clocks
        time.time = lambda: seconds() + clock
        time.time_ns = lambda: nanoseconds() + clock * 10**9

        def replace(source, target):
            if refused and str(target).endswith(".mp4"):
                raise OSError(refused, os.strerror(refused))
            HardTimes.replace(source, target)

        os.replace = replace
        HardTimes.fails_at = GuiderCalls.count + fails_after if fails_after else 0
        return {}


class Seen:
    """What an image encoder gives, as the host's say it."""

    def __init__(self, picture: torch.Tensor):
        spread = torch.randn(1, 257, 1280, generator=torch.Generator().manual_seed(1))
        self.penultimate_hidden_states = spread * (1 + 4 * picture.mean())


class ImageEncoder:
    """An image encoder that sees how bright a picture is, and no more."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES = ("CLIP_VISION",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self):
        return (ImageEncoder(),)

    def encode_image(self, image: torch.Tensor, crop: bool = True) -> Seen:
        return Seen(image.cpu())


class DeepVAE:
    """The host's Wan 2.2 VAE of 48 channels, small and random."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES = ("VAE",)
    FUNCTION = "make"
    CATEGORY = "test"

    def make(self):
        module = comfy.ldm.wan.vae2_2
        whole = module.WanVAE
        small = partial(whole, dim=8, dec_dim=8, z_dim=48, temperal_downsample=[False, True, True])
        random = torch.Generator().manual_seed(0)
        weights = {
            name: torch.randn(weight.shape, generator=random) * weight[0].numel() ** -0.5
            for name, weight in small().state_dict().items()
        }
        module.WanVAE = lambda **sizes: small()  # the host builds the whole one, whatever the file holds
        try:
            return (comfy.sd.VAE(sd=weights),)
        finally:
            module.WanVAE = whole


class LiveObjects:
    """Counts what is alive in the server, by type, and the bytes of its tensors."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    IS_CHANGED = classmethod(lambda cls: float("nan"))
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "tell"
    CATEGORY = "test"

    def tell(self):
        gc.collect()
        alive = gc.get_objects()
        found = Counter(f"{type(each).__module__}.{type(each).__qualname__}" for each in alive)
        tensors = [each for each in alive if type(each) in (torch.Tensor, torch.nn.Parameter)]
        found["tensor bytes"] = sum(each.untyped_storage().nbytes() for each in tensors)
        return {"ui": {"objects": [dict(found)]}}


def counted(sampling_function):
    @wraps(sampling_function)
    def count(*args, **kwargs):
        GuiderCalls.count += 1
        if GuiderCalls.count == HardTimes.fails_at:
            raise RuntimeError("a step fails")
        return sampling_function(*args, **kwargs)

    return count


comfy.samplers.sampling_function = counted(comfy.samplers.sampling_function)

NODE_CLASS_MAPPINGS = {
    "TestCaption": Caption,
    "TestUntold": Untold,
    "TestGGUFLoader": GGUFLoader,
    "TestSmallT5": SmallT5,
    "TestBrittleT5": BrittleT5,
    "TestSeeEveryStep": SeeEveryStep,
    "TestLatentAs": LatentAs,
    "TestPatched": Patched,
    "TestFrameNoise": FrameNoise,
    "TestGuiderCalls": GuiderCalls,
    "TestHardTimes": HardTimes,
    "TestImageEncoder": ImageEncoder,
    "TestDeepVAE": DeepVAE,
    "TestLiveObjects": LiveObjects,
    "TestWrongObject": WrongObject,
}
