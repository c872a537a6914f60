"""A run over several GPUs of this machine: the server has the first of them, a worker each of the others.

The server goes on making the run, with the host's guider, progress, previews and stream; workers read the same file and
follow each call of the network. They stay for the next run, and end with the server, with the model, or when a run
wants none of them.
"""

import os
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.model_management
import comfy.model_patcher
import torch
from comfy.patcher_extension import CallbacksMP
from server import PromptServer

from ...flowcache_core.engine.build import RunSettings, build_engine
from ...flowcache_core.engine.loop import Engine
from ...flowcache_core.errors import UserError
from ...flowcache_core.history.cache import Attention
from ...flowcache_core.history.plan import NetworkSizes
from ...flowcache_core.history.snapshot import Snapshot
from .checks import COMPILE
from .progress import say

if TYPE_CHECKING:  # a run on one GPU imports nothing of it
    from ...flowcache_core.parallel.crew import Crew
    from ...flowcache_core.parallel.layout import Parallel

GPUS = "flowcache_gpus"  # key of a `Division` in transformer_options, and of our callback on a model
SCHEMES = ("auto", "ulysses", "pipeline", "branches")
HEEDED = (COMPILE, "rope_options")  # in transformer_options, by what runs the network
PACKAGE = __package__.removesuffix(".nodes.comfyui")
WORKER = Path(__file__).with_name("gpu_worker.py")
ON_CPU = (
    "To try it without, start ComfyUI with --cpu and set gpus to 2: a worker on the processor then stands for a GPU."
)


@dataclass(frozen=True)
class Division:
    """What the node FlowCache over GPUs hangs on a model.

    Attributes:
        processes: the server and its workers.
        scheme: one of `SCHEMES`.
    """

    processes: int
    scheme: str


def over_gpus(model: comfy.model_patcher.ModelPatcher, gpus: int, scheme: str) -> comfy.model_patcher.ModelPatcher:
    """A clone of a model that runs over several GPUs.

    Args:
        gpus: how many; 0 for all.
        scheme: one of `SCHEMES`.

    Raises:
        UserError: there are fewer, or the model's loader did not say how another process loads it.
    """
    _loader(model)
    processes = _processes(gpus)
    if scheme == "branches" and processes % 2:
        raise UserError(f"The scheme 'branches' halves the GPUs, and they are {processes}; take 'auto'.")
    clone = model.clone()
    options = clone.model_options.setdefault("transformer_options", {})
    options[GPUS] = Division(processes, scheme)
    clone.remove_callbacks_with_key(CallbacksMP.ON_DETACH, GPUS)
    clone.add_callback_with_key(CallbacksMP.ON_DETACH, GPUS, _detached)
    return clone


def division_of(model_options: Mapping) -> Division | None:
    """Finds what the node hung on a model, if it did."""
    return model_options.get("transformer_options", {}).get(GPUS)


def _processes(gpus: int) -> int:
    device = comfy.model_management.get_torch_device()
    if device.type == "cpu":
        if gpus < 2:
            raise UserError(f"ComfyUI runs on the processor, so there are no GPUs to divide a video among. {ON_CPU}")
        return gpus
    there = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type == "cuda" and not torch.distributed.is_nccl_available():
        raise UserError(
            "This torch has no NCCL (as on Windows), by which GPUs exchange; bypass FlowCache over GPUs, or use Linux."
        )
    if there < max(2, gpus):
        if there == 1:
            raise UserError(f"ComfyUI finds one GPU, which nothing divides; bypass FlowCache over GPUs. {ON_CPU}")
        raise UserError(f"ComfyUI finds {there} GPUs, and gpus is {gpus}; set {there} at most, or 0 for all.")
    return gpus or there


def _environments(processes: int, device: torch.device) -> list[dict[str, str]]:
    """Of each worker: the GPU that it sees."""
    if device.type == "cpu":
        return [{} for _ in range(processes - 1)]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if os.environ.get("CUDA_VISIBLE_DEVICES") else None
    numbers = [number for number in range(torch.cuda.device_count()) if number != (device.index or 0)]
    names = [str(number) if visible is None else visible[number] for number in numbers[: processes - 1]]
    return [{"CUDA_VISIBLE_DEVICES": name, "HIP_VISIBLE_DEVICES": name} for name in names]


def _loader(model: comfy.model_patcher.ModelPatcher) -> tuple[Callable, tuple]:
    """How another process loads the model."""
    loader = getattr(model, "cached_patcher_init", None)
    while loader is None and getattr(model, "parent", None) is not None:  # ComfyUI 0.3.64's clones forget it
        model = model.parent
        loader = getattr(model, "cached_patcher_init", None)
    module = getattr(loader[0], "__module__", "") if loader else ""
    if not loader or len(loader) > 2 or not module.startswith(("comfy.", PACKAGE)):
        raise UserError(
            "The model's loader does not say how workers can load it (GGUF loaders and checkpoints do not); load it "
            "with Load AR Video Model (FlowCache) or Load Diffusion Model."
        )
    return loader


def planned_share(sizes: NetworkSizes, branches: int, model_options: Mapping) -> tuple[NetworkSizes, int, bool]:
    """What of a network and of its branches a run has memory for here, and whether its chunks may go through together.

    Args:
        sizes, branches: of the whole.
        model_options: of the run.
    """
    division = division_of(model_options)
    if division is None:
        return sizes, branches, True
    from ...flowcache_core.parallel.layout import planned_part

    scheme, divisible = divided_as(division.scheme, branches)
    here, own = planned_part(sizes, scheme, division.processes, divisible)
    return here, branches if divisible != branches else own, scheme != "pipeline"


class Pool:
    """The workers of this server, one set at most, and what they have loaded."""

    def __init__(self):
        self.crew: Crew | None = None
        self.running = False
        self._model: weakref.ref | None = None
        self._patches: object = None
        self._divided: dict[tuple, Parallel] = {}  # groups of processes, made once

    def take(self, model: comfy.model_patcher.ModelPatcher, processes: int, family: str, frame_rate: int) -> "Crew":
        """Workers that have a model loaded, started where they are not there."""
        crew = self.crew
        if crew is not None and (crew.ended or crew.lost is not None or crew.size != processes):
            self.end()
            crew = None
        if crew is None:
            crew = self.crew = _start(processes)
        if self._model is None or self._model() is not model.model:
            crew.tell(("load", *_loader(model), family, frame_rate))
            crew.wait("loaded")
            self._model, self._patches = weakref.ref(model.model), None
            weakref.finalize(model.model, self._model_gone, self._model)
        if self._patches != model.patches_uuid:
            crew.tell(("patch", dict(model.patches)))
            crew.wait("patched")
            self._patches = model.patches_uuid
        return crew

    def parallel(self, crew: "Crew", key: tuple[str, int]) -> "Parallel":
        """The processes in the groups that a scheme wants, here and there."""
        if key not in self._divided:
            crew.tell(("divide", *key))
            with crew.section():
                self._divided[key] = made(crew.team, *key)
        return self._divided[key]

    def unload(self) -> None:
        """Has workers take the model off their GPUs, as the server's own was; they stay."""
        if self.crew is not None and not self.running and not self.crew.ended:
            self.crew.tell(("unload",))

    def end(self) -> None:
        """Ends the workers, if there are any."""
        if self.crew is not None:
            self.crew.end()
        self.crew, self._model, self._patches = None, None, None
        self._divided.clear()

    def _model_gone(self, model: weakref.ref) -> None:
        """Where the host has let go of the model between two prompts, as it does to free memory, workers end; in the
        midst of one it makes room for another model, which they load next."""
        if model is self._model:
            self._model = None
            if not PromptServer.instance.prompt_queue.currently_running:
                self.end()


POOL = Pool()


def _detached(model, unpatched) -> None:
    POOL.unload()


def divided_as(scheme: str, branches: int) -> tuple[str, int]:
    """What `parallel.layout.Parallel` is told of a node's scheme: its own name for it, and the branches that it may
    divide."""
    if scheme == "branches" and branches != 2:
        raise UserError(
            f"This run has {'one branch' if branches == 1 else f'{branches} branches'} of guidance, and the scheme "
            "'branches' divides two; take 'auto'."
        )
    return ("pipeline", 1) if scheme == "pipeline" else ("ulysses", 1 if scheme == "ulysses" else branches)


def made(team, scheme, branches: int) -> "Parallel":
    """Puts all processes in groups; each of them does it at the same time."""
    from ...flowcache_core.parallel.layout import Parallel

    return Parallel(team, scheme, branches)


def _start(processes: int) -> "Crew":
    from ...flowcache_core.parallel.crew import Crew

    device = comfy.model_management.get_torch_device()
    host, pack = Path(comfy.model_management.__file__).parents[1], Path(__file__).parents[2]
    say([f"starting {processes - 1} worker{'s' if processes > 2 else ''} on other devices"])
    crew = Crew(
        lambda number: [sys.executable, str(WORKER), str(host), str(pack), PACKAGE, *sys.argv[1:]],
        _environments(processes, device),
        waiting=lambda: comfy.model_management.throw_exception_if_processing_interrupted(),
        held=uninterrupted,
    )
    crew.meet(device)
    return crew


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Puts off the user's interrupt, which the host looks for at every layer: others wait for the rest of this call.
    The host finds it as soon as that is done."""
    management = comfy.model_management
    throw = management.throw_exception_if_processing_interrupted
    management.throw_exception_if_processing_interrupted = lambda: None
    try:
        yield
    finally:
        management.throw_exception_if_processing_interrupted = throw


class Led:
    """A run that workers follow.

    Args:
        crew: the workers.
        key: how they are divided, `divided_as`.
        parallel: what this process has.
        branches: of guidance.
        options: of the transformer.
    """

    def __init__(self, crew: "Crew", key: tuple, parallel: "Parallel", branches: int, options: Mapping):
        self.crew, self.key, self.parallel, self.branches = crew, key, parallel, branches
        self.options = {name: options[name] for name in HEEDED if name in options}

    def backbone(self, whole: Any) -> Any:
        """What runs this process's part of a network, which itself stays whole."""
        from ...flowcache_core.parallel.pipeline import look_at_layers

        return self.parallel.backbone(whole, look_at_layers)

    def engine(self, run: RunSettings) -> Engine:
        """Makes a run of the Wan layout ready to go, here and in the workers."""
        from ...flowcache_core.parallel.led import LedForward, LedGuidance

        self.parallel.check(run.settings, run.schedule.max_active, run.seeing)
        sampling = run.sampling
        told = {
            "schedule": run.schedule, "settings": run.settings, "seeing": run.seeing, "shape": tuple(run.shape),
            "dtype": run.dtype, "texts": run.texts, "text_tokens": run.text_tokens, "lead": run.lead, "end": run.end,
            "last_frames": run.last_frames, "anew": run.anew,
        }  # fmt: skip
        levels, at_once = (sampling.sigmas, sampling.first_sigmas), run.guidance.at_once
        with self._told(run.loaded) as loaded:
            self._begin("begin", told, levels, at_once, self.branches, loaded)
        guidance = LedGuidance(run.guidance, self.crew, self.parallel)
        mine = replace(
            run,
            guidance=guidance,
            branches=branches_here(self.parallel, self.branches),
            attention=self.parallel.attention(run.backbone, run.attention),
            loaded=self.parallel.loaded(run.loaded),
        )
        return self._noted(build_engine(mine, partial(LedForward, self.crew, self.parallel)))

    def magi(self, backbone: Any, attention: Attention, loaded: Snapshot | None, **told: Any) -> dict[str, Any]:
        """Has the workers ready for a run of MAGI-1; gives what the engine here is made with.

        Args:
            told: what they make theirs with.
        """
        from ...flowcache_core.models.magi.forward import SHARED
        from ...flowcache_core.parallel.led import LedMagiForward

        self.parallel.check(told["settings"], told["schedule"].max_active)
        whole = None if loaded is None else {SHARED: loaded}
        with self._told(whole) as path:
            self._begin("begin magi", told, path)
        mine = self.parallel.loaded(whole)
        return {
            "backbone": backbone,
            "attention": self.parallel.attention(backbone, attention),
            "loaded": None if mine is None else mine[SHARED],
            "make": partial(LedMagiForward, self.crew, self.parallel),
        }

    def _begin(self, what: str, *told: Any) -> None:
        self.crew.tell((what, self.key, self.options, *told))
        self.crew.wait("ready")

    def _noted(self, engine: Engine) -> Engine:
        engine.report.notes += self.notes
        return engine

    @property
    def notes(self) -> list[str]:
        """For the report."""
        how = "branches of guidance" if self.parallel.peers is not None else self.parallel.scheme
        return [f"over {self.crew.size} devices: {how}", *self.parallel.notes]

    @contextmanager
    def _told(self, loaded: Mapping[Any, Snapshot] | None) -> Iterator[str | None]:
        """Histories to start from, in a file that workers map and take their part of."""
        if loaded is None:
            yield None
            return
        handle, path = tempfile.mkstemp(suffix=".flowcache")
        os.close(handle)
        try:
            torch.save({str(name): tuple(snapshot) for name, snapshot in loaded.items()}, path)
            yield path
        finally:
            os.unlink(path)


def branches_here(parallel: "Parallel", branches: int) -> int:
    """Counts the branches of guidance that this process has a history of."""
    return branches if parallel.peers is None else len(range(parallel.peers.rank, branches, parallel.peers.size))


@contextmanager
def led(
    guider, model_options: Mapping, family: str, branches: int, settle: Callable[[], None], frame_rate: int = 24
) -> Iterator[Led | None]:
    """Has workers ready for a run that wants them, and lets go of what they held of it; None for any other run, of
    which none are left.

    Args:
        guider: the host's.
        model_options: of the run.
        family: of the model.
        branches: of guidance; those of MAGI-1 share a history, so they count as one.
        settle: does what was begun with the workers, before they forget the run.
        frame_rate: that SkyReels-V2 is told.
    """
    division = division_of(model_options)
    if division is None:
        POOL.end()
        yield None
        return
    options = model_options["transformer_options"]
    _check(guider, options)
    key = divided_as(division.scheme, branches)
    crew = POOL.take(guider.model_patcher, division.processes, family, frame_rate)
    POOL.running = True
    try:
        yield Led(crew, key, POOL.parallel(crew, key), branches, options)
    finally:
        try:
            if crew.failure is None:
                settle()
        finally:
            POOL.running = False
            if not crew.ended:
                crew.tell(("end",))


def _check(guider, options: Mapping) -> None:
    """Raises UserError for what of a model does not reach workers."""
    model = guider.model_patcher
    conditions = [one for side in (guider.conds or {}).values() for one in side or []]
    found = [name for name in model.object_patches if name.startswith("diffusion_model.")]
    found += ["weight wrappers"] if getattr(model, "weight_wrapper_patches", None) else []
    found += ["injections"] if any(getattr(model, "injections", {}).values()) else []
    found += ["hooks of a prompt"] if any(one.get("hooks") is not None for one in conditions) else []
    found += ["MultiGPU CFG Split"] if "multigpu" in getattr(model, "additional_models", {}) else []
    if found:
        refuse(found)


def refuse(found: Sequence[str]) -> None:
    """Raises UserError for patches that workers know nothing of."""
    raise UserError(
        f"FlowCache over GPUs divides the network as it was loaded, with LoRA, and the model is also patched with: "
        f"{', '.join(found)}; remove that, or bypass FlowCache over GPUs."
    )
