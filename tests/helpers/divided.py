"""Small runs, by one process or divided among several that are started here and meet over gloo."""

import os
import socket
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor

from flowcache_core.generation import Result, generate
from flowcache_core.magi_generation import generate_magi
from flowcache_core.models.families import family
from flowcache_core.models.magi.network import MagiBackbone, MagiNetwork
from flowcache_core.models.wan import WanConfig, WanNetwork
from flowcache_core.parallel.layout import Parallel
from flowcache_core.parallel.sharding import bytes_held
from flowcache_core.parallel.team import Team
from flowcache_core.settings import OFF, Compression, Every, HistorySettings, Settings
from tests.helpers.magi_runs import tokens
from tests.helpers.magi_weights import SMALL, fill, normal
from tests.helpers.tiny import random_network

# Three heads, and 5 x 3 tokens a frame: neither 2 nor 4 divides them.
CONFIG = WanConfig(dim=72, ffn_dim=64, num_heads=3, num_layers=4, in_dim=4, out_dim=4, text_dim=16, freq_dim=32)
SIZE = (10, 6)
BUDGET = Settings(Every(2), history=HistorySettings(budget=2, compression=Compression()))
WINDOW = Settings(history=HistorySettings(window=4, compression=Compression("window", sink=1)))
MAGI = replace(SMALL, layers=4, heads=8, kv_heads=4, width=128, head_dim=16, channels=16, caption_tokens=60)


def network(fps: bool = False) -> WanNetwork:
    """Random, with attention that is far from uniform."""
    return random_network(replace(CONFIG, fps=fps), 0, 1.2)


def history(**more) -> Settings:
    return replace(BUDGET, history=replace(BUDGET.history, **more))


def wan(name: str, settings: Settings = OFF, **more) -> Callable[..., Result]:
    """A run of a family of the Wan layout."""

    def run(parallel: Parallel | None = None, wrap: Callable = lambda backbone: backbone, **also) -> Result:
        usual = family(name)
        backbone = usual.backbone(network(name == "skyreels"), 24, torch.nn.functional.scaled_dot_product_attention)
        if parallel is not None:
            backbone = wrap(parallel.backbone(backbone))
        text = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(1))
        options = (
            {"chunks": 3, "steps": 3, "latent_size": SIZE, "frames_per_chunk": 2, "guidance_scale": 1.0} | more | also
        )
        shown = [text, text.flip(1), text.flip(2)] if name == "longlive" else text  # another one for each chunk
        against = text.flip(1) if options["guidance_scale"] != 1.0 else None
        return generate(
            backbone, shown, family_name=name, settings=settings, negative=against, parallel=parallel, **options
        )

    return run


def magi(settings: Settings = OFF, distilled: bool = False, **more) -> Callable[..., Result]:
    """A run of MAGI-1."""

    def run(parallel: Parallel | None = None, wrap: Callable = lambda backbone: backbone, **also) -> Result:
        config = replace(MAGI, distilled=distilled)
        made = MagiNetwork(config)
        fill(made, velocity=1 / 3)
        backbone = MagiBackbone(made.requires_grad_(False).eval())
        if parallel is not None:
            backbone = wrap(parallel.backbone(backbone))
        text = normal("caption", (1, 9, config.caption_width))
        return generate_magi(
            backbone, text, None, special_tokens=tokens(config.caption_width), settings=settings, parallel=parallel,
            **{"chunks": 2, "steps": 4, "latent_size": (4, 6)} | more | also,
        )  # fmt: skip

    return run


RUNS: dict[str, Callable[..., Result]] = {
    "demo": wan("demo"),
    "causal": wan("causal"),
    "causvid": wan("causvid", steps=3),
    "rolling": wan("rolling", steps=3),
    "skyreels": wan("skyreels", steps=6, lag=2),
    "longlive": wan("longlive", WINDOW),
    "longlive guidance": wan("longlive", WINDOW, guidance_scale=2.0),
    "krea": wan("krea", steps=4),
    "wan": wan("wan", chunks=2),
    "joint": wan("skyreels", steps=4, lag=1, seeing="joint", chunks=3),
    "guidance": wan("demo", guidance_scale=2.0),
    "guidance and budget": wan("skyreels", BUDGET, steps=4, lag=2, guidance_scale=2.0, chunks=5),
    "budget": wan("demo", BUDGET, chunks=5),
    "relative": wan("demo", history(relative=True), chunks=5),
    "int8": wan("demo", history(type="int8"), chunks=4),
    "magi": magi(),
    "magi distilled": magi(distilled=True),
    "magi budget": magi(BUDGET, chunks=4),
}


def free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def divided(work: Callable[[Team, Path], None], size: int, folder: Path) -> None:
    """Runs `work` in so many processes, which write what they found to a folder."""
    processes.spawn(_process, (work, size, free_port(), str(folder)), nprocs=size)


def _process(rank: int, work: Callable[[Team, Path], None], size: int, port: int, folder: str) -> None:
    named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in named.items()})
    torch.set_num_threads(1)
    team = Team.join("cpu")
    torch.set_num_threads(1)
    work(team, Path(folder))
    dist.barrier()
    dist.destroy_process_group()


def branches_of(name: str) -> int:
    """Branches of guidance that a run has."""
    return 2 if "guidance" in name else 1


PIPED = ["demo", "skyreels", "guidance and budget", "relative", "longlive", "magi", "magi budget"]


@dataclass
class Found:
    """What a process says of a run."""

    latents: Tensor
    held: int  # bytes of history
    sent: int
    saved: int  # bytes of the whole history, in the first process
    forwards: int = 0
    weights: int = 0  # bytes of the blocks


def of_run(name: str, parallel: Parallel, **options) -> Found:
    result = RUNS[name](parallel, **options)
    saved = sum(part.nbytes for snapshot in result.state.histories for part in snapshot)
    report = result.report
    return Found(result.latents, report.history_bytes_allocated, parallel.sent, saved, report.forwards_executed)


def every_run(team: Team, folder: Path) -> None:
    found = {}
    for scheme, names in (("ulysses", list(RUNS)), ("pipeline", PIPED)):
        for name in names:
            found[scheme, name] = of_run(name, Parallel(team, scheme, branches_of(name)))
    found["silent", "demo"] = of_run("demo", Parallel(team), wrap=_silent)
    found["late", "demo"] = of_run("demo", Parallel(team), wrap=_short_of_memory if team.rank == 1 else _as_it_is)
    for name in ("demo", "magi"):
        held: list[int] = []
        found["sharded", name] = of_run(name, Parallel(team, sharded=True), wrap=_weighed(held))
        found["sharded", name].weights = held[0]
    torch.save(found, folder / f"{team.rank}.pt")


def _as_it_is(backbone):
    return backbone


def _weighed(held: list[int]) -> Callable:
    def wrap(backbone):
        held.append(bytes_held(backbone.inner))
        return backbone

    return wrap


def _silent(backbone):
    """What others send is lost on the way."""
    exchange = backbone.ranks.exchange

    def lost(parts, shapes):
        received = exchange(parts, shapes)
        return [part if rank == backbone.ranks.rank else torch.zeros_like(part) for rank, part in enumerate(received)]

    backbone.ranks.exchange = lost
    return backbone


def _short_of_memory(backbone):
    """One process runs out of memory between the exchanges of a block, and later behind them."""
    calls = {"attention": 0, "feed": 0}

    def short(work, name, at):
        def tried(*args):
            calls[name] += 1
            if calls[name] in at:
                raise torch.cuda.OutOfMemoryError(f"CUDA out of memory in the {name}")
            return work(*args)

        return tried

    over = backbone.attention_over
    backbone.attention_over = lambda attention: over(short(attention, "attention", (30,)))
    inner = backbone.inner
    inner.parts = (*inner.parts[:-1], short(inner.parts[-1], "feed", (50,)))
    return backbone
