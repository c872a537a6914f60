"""What a worker of FlowCache over GPUs does, in its own process."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import comfy.model_management
import torch
from torch import nn

from ...flowcache_core.engine.build import RunSettings, build_engine, plan_run
from ...flowcache_core.engine.guidance import WeightedGuidance
from ...flowcache_core.engine.loop import Sampling
from ...flowcache_core.history.snapshot import Snapshot
from ...flowcache_core.models.magi.forward import SHARED, magi_forward, magi_plan, magi_settings
from ...flowcache_core.models.magi.network import MagiBackbone, MagiText
from ...flowcache_core.models.magi.text import null_text
from ...flowcache_core.parallel.crew import HERE, MEETING, Orders, join
from ...flowcache_core.parallel.layout import Parallel
from ...flowcache_core.parallel.led import Follower
from ...flowcache_core.parallel.pipeline import look_at_layers
from ...flowcache_core.parallel.ranks import shares
from ...flowcache_core.parallel.team import Team
from . import patch as host
from .gpus import branches_here, made
from .guider import FAMILY, FPS, fitted, host_attention, wan_backbone
from .magi import rows


class Worker:
    """One of the processes that follow the server.

    Args:
        orders: from the server.
    """

    def __init__(self, orders: Orders):
        self.orders = orders
        self.device = comfy.model_management.get_torch_device()
        self.team: Team | None = None
        self.model: Any = None  # the host's patcher, as loaded
        self.patched: Any = None  # the same with the server's patches on weights
        self.options: dict = {}
        self.parallel: Parallel | None = None
        self.follower: Follower | None = None
        self.texts: dict[int, MagiText] = {}

    def follow(self, what: str, *told: Any) -> None:
        """Does what it is told."""
        own: Mapping[str, Callable[..., None]] = {
            "meet": self._meet, "load": self._load, "patch": self._patch, "divide": self._divide, "begin": self._begin,
            "begin magi": self._begin_magi, "text": self._text, "unload": self._unload, "end": self._end,
        }  # fmt: skip
        if what in own:
            own[what](*told)
        else:
            assert self.follower is not None
            self.follower.follow(what, *told)

    def _meet(self, port: int, rank: int, size: int) -> None:
        if self.device.type == "cpu":
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
        store = torch.distributed.TCPStore(HERE, port, size, is_master=False, timeout=MEETING)
        self.team = join(store, rank, size, self.device)
        self.divided: dict[tuple, Parallel] = {}

    def _load(self, load: Callable, arguments: tuple, family: str, fps: int) -> None:
        self.model = self.patched = self.follower = None
        comfy.model_management.unload_all_models()
        model = load(*arguments)
        if host.family_of(model) != family:
            model, _ = host.with_family(model, family)
        self.model = self.patched = model
        self.options = {FAMILY: family, FPS: fps}
        network = model.model.diffusion_model
        self.layers = list(network.videodit_blocks.layers if hasattr(network, "videodit_blocks") else network.blocks)
        self.held = range(len(self.layers))
        self.orders.say("loaded")

    def _patch(self, patches: dict) -> None:
        self.patched = self.model.clone()
        self.patched.patches = patches
        self.patched.patches_uuid = torch.Generator().seed()  # one that no other has
        self.orders.say("patched")

    def _divide(self, scheme: str, branches: int) -> None:
        self.divided[scheme, branches] = made(self.team, scheme, branches)

    @property
    def _network(self) -> Any:
        return self.patched.model.diffusion_model

    def _hold(self, parallel: Parallel) -> None:
        """Leaves the weights of layers that others have where they are: in the file, mapped."""
        held, team = range(len(self.layers)), parallel.team
        if parallel.scheme == "pipeline":
            held = shares(len(self.layers), team.size)[team.rank]
        if held != self.held:
            comfy.model_management.unload_all_models()
            self.held, self.model.size, self.patched.size = held, 0, 0  # the host weighs it anew
        self._put([layer if number in held else nn.Identity() for number, layer in enumerate(self.layers)])

    def _put(self, layers: Sequence[nn.Module]) -> None:
        """Sets the network's layers."""
        network = self._network
        if hasattr(network, "videodit_blocks"):
            network.videodit_blocks.layers = nn.ModuleList(layers)
        else:
            network.blocks = nn.ModuleList(layers)

    def _ready(self, planned: int) -> None:
        """Has the weights on the device, with room for the run."""
        comfy.model_management.load_models_gpu([self.patched], memory_required=planned)

    @torch.inference_mode()
    def _begin(
        self, key: tuple, options: dict, told: dict, levels: Sequence, at_once: bool, branches: int, loaded: str | None
    ) -> None:
        parallel, mine = self.divided[key], self.options | options
        self._put(self.layers)
        attention = host_attention(lambda: mine)
        backbone = parallel.backbone(wan_backbone(self._network, mine, attention), look_at_layers)
        ours = branches_here(parallel, branches)
        guidance = WeightedGuidance({number: torch.empty(0) for number in range(ours)}, {})
        guidance.at_once = at_once
        run = RunSettings(
            backbone, guidance, branches=ours, device=self.device,
            sampling=Sampling(levels[0], lambda chunk: torch.empty(0), first_sigmas=levels[1]),
            attention=parallel.attention(backbone, attention), loaded=_part(loaded, parallel), **told,
        )  # fmt: skip
        self._hold(parallel)
        causal = run.seeing == "causal"
        self._ready(plan_run(run, run.settings.reuse.policy(run.schedule)).device_bytes if causal else 0)
        forward: Any = build_engine(run).forward
        self.follower = Follower(forward, parallel, self.device)
        self.orders.say("ready")

    @torch.inference_mode()
    def _begin_magi(self, key: tuple, options: dict, told: dict, loaded: str | None) -> None:
        parallel, batch = self.divided[key], told["shape"][0]
        self._put(self.layers)
        network = self._network
        attention = host_attention(lambda: options)
        backbone = parallel.backbone(fitted(MagiBackbone(network, attention), options), look_at_layers)
        self.texts = {}
        self._hold(parallel)
        settings = magi_settings(told["settings"], told["sampling"], told["schedule"])
        plan = magi_plan(
            network.config, told["schedule"], settings, told["sampling"], told["shape"], network.dtype.itemsize
        )
        self._ready(replace(plan, network=backbone.sizes).device_bytes)
        whole = _part(loaded, parallel)
        _, forward = magi_forward(
            backbone, text=lambda chunk: self.texts[chunk],
            null=rows(null_text(network.y_embedder.null_caption_embedding), batch, self.device), device=self.device,
            attention=parallel.attention(backbone, attention), loaded=None if whole is None else whole[SHARED], **told,
        )  # fmt: skip
        self.follower = Follower(forward, parallel, self.device)
        self.orders.say("ready")

    def _text(self, chunk: int, told: MagiText) -> None:
        self.texts[chunk] = told._replace(embedding=told.embedding.to(self.device), mask=told.mask.to(self.device))

    def _unload(self) -> None:
        self.follower = None
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()

    def _end(self) -> None:
        self.follower, self.texts = None, {}
        comfy.model_management.soft_empty_cache()


def _part(path: str | None, parallel: Parallel) -> dict[Any, Snapshot] | None:
    """This process's part of histories in a file, copied out of it: the file is gone when the run begins."""
    if path is None:
        return None
    found = torch.load(path, mmap=True, weights_only=True)
    parts = parallel.loaded({name: Snapshot(*parts) for name, parts in found.items()})
    return {name: Snapshot(*(one.clone() for one in part)) for name, part in (parts or {}).items()}
