"""What `python -m flowcache_core generate` does: alone, or as one of several processes that torchrun starts."""

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .checkpoints.backbone import Loaded, load_backbone, load_experts
from .demo import decode, embed_caption, load_network
from .demo.clips import FPS
from .demo.model import weights_name
from .demo.train_network import FRAMES_PER_CHUNK
from .demo.vae import Memory, load_vae
from .digest import digest_of
from .engine.anew import latents_needed
from .engine.loop import Chunk
from .errors import UserError, first_line
from .generation import Result, generate
from .magi_generation import generate_magi
from .media.pictures import report_picture
from .media.progress_bar import Bar
from .media.video import FORMATS, enlarged, frames_of, save_video
from .media.video_stream import VideoStream
from .models.families import family
from .models.latent_spaces import statistics_of
from .models.magi.sampling import CHUNK_FRAMES
from .models.magi.vae import LATENT_SCALE
from .models.memory import latent_size
from .models.presets import preset, quality_settings
from .settings import Settings, bounded_history
from .storage.calibrations import calibration_of
from .storage.files import check_writable, write_whole
from .storage.keeping import KeptChunks
from .storage.run_folder import RunFolder
from .storage.state import State, load_state, save_state

LATENT = ".latent"  # what ComfyUI's node LoadLatent reads
DEMO_SIZE = (8, 8)
MAGI = ("magi", "magi distilled")


def run_generate(options: argparse.Namespace) -> None:
    """Checks what it is asked for, and runs it in as many processes as there are."""
    for path in (options.out, options.save_state, options.report, options.stream):
        if path is not None:
            check_writable(path)
    options.family = options.family or ("auto" if options.text else "demo")
    if options.prefix and options.state:
        raise UserError("Both --prefix and --state are given, expected at most one: a state holds its frames already.")
    if options.network_low and options.family != "experts":
        raise UserError("--network-low is of the family experts alone, which runs two networks: give --family experts.")
    if options.chunks < 1:
        raise UserError(f"chunks is {options.chunks}, expected at least 1.")
    demo = options.family == "demo"
    if bool(options.captions) == bool(options.text):
        raise UserError("Give captions for the demo model, or --text with embeddings for another one; one of the two.")
    if demo and options.out.suffix.lower() not in (*FORMATS, LATENT):
        raise UserError(f"The output is called {options.out.name}; give a name that ends in {', '.join(FORMATS)}.")
    if not demo and (options.out.suffix.lower() != LATENT or options.stream):
        raise UserError(
            f"Only the demo model has its VAE here: write --out NAME{LATENT}, without --stream, and decode that in "
            "ComfyUI with Load Latent and VAE Decode."
        )
    with _team(options) if launched() else nullcontext() as team:
        _generate(options, team, demo)


def launched() -> bool:
    """Whether torchrun, or a launcher that speaks like it, has started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


@contextmanager
def _team(options: argparse.Namespace) -> Iterator[Any]:
    from .parallel.team import Team, leave, stop_asked  # which nothing else needs

    team = Team.join(options.device)
    with team.together(leave), stop_asked() as team.stop:
        yield team
    team.leave()


def _generate(options: argparse.Namespace, team: Any, demo: bool) -> None:
    settings = _settings(options)
    state = load_state(options.state) if options.state else None
    loaded = None if demo else _loaded(options, team)
    backbone: Any = loaded.backbone if loaded else load_network(options.network) if options.network else load_network()
    name = f"{options.family} {type(backbone).__name__} {_digest(backbone)}" if loaded else weights_name(backbone)
    usual = loaded.usual if loaded else family("demo")
    device = team.device if team else torch.device(options.device or "cpu")
    dtype = loaded.dtype if loaded else torch.float32
    texts, masks = _texts(options, device, dtype)
    steps = options.steps if options.steps is not None else 64 if demo else usual.steps
    lag = options.lag
    if lag is None and (demo or options.steps is not None):
        lag = max(1, round(steps * usual.lag / usual.steps))
    guidance = options.guidance if options.guidance is not None else 1.0 if demo else usual.guidance
    width, height = latent_size((options.width or usual.size[0], options.height or usual.size[1]), backbone.channels)
    magi = options.family in MAGI
    chunk_frames = CHUNK_FRAMES if magi else FRAMES_PER_CHUNK if demo else usual.chunk_frames
    parallel = None
    if team:
        from .parallel.layout import Parallel

        branches = 2 if guidance != 1.0 and not magi else 1
        parallel = Parallel(team, options.scheme, branches, options.shard)
        backbone = parallel.backbone(backbone)
        if parallel.first:
            print(f"{team.size} processes, {options.scheme}, on {device.type}", flush=True)
    backbone.network.to(device)

    prefix = None if options.prefix is None else read_latent(options.prefix, magi, backbone.channels).to(device, dtype)
    first = 0 if state is None else state.chunks
    first, lead = (first, 0) if prefix is None else divmod(prefix.shape[2], chunk_frames)
    there_before = prefix if state is None else state.latents
    if prefix is not None and (magi or usual.image_inside):  # what fills no chunk, the first new one begins with
        there_before, lead = prefix[:, :, : first * chunk_frames], 0
    writes, folder, keep = team is None or parallel.first, None, None  # type: ignore[union-attr]
    video = None if options.video is None else read_latent(options.video, magi, backbone.channels)
    if options.resume:
        determining: list[Any] = [
            name, repr(replace(settings, overlap=True, history=replace(settings.history, memory="auto"))), texts, masks,
            options.negative, options.chunks, steps, lag, guidance, options.seed, width, height, str(dtype), state,
        ]  # fmt: skip
        determining += [] if video is None else [video, options.strength]
        determining += [sorted(options.shots)] if options.shots else []
        determining += [] if prefix is None else ["prefix", prefix]
        run = digest_of(determining)
        folder = RunFolder(options.resume, run, int(options.resume_gb * 2**30), first, chunk_frames, name, lead)
    recent, begun = latents_needed(usual.anew, settings.history, chunk_frames)
    beginning = None if prefix is None else prefix[:, :, :begun]
    beginning = beginning if state is None else state.begins_with(begun)
    earlier = folder.load(recent, there_before, begun, beginning) if folder else None
    if folder and team:
        there = parallel.everyone.objects(None if earlier is None else earlier.chunks)  # type: ignore[union-attr]
        if len(set(there)) > 1:
            raise UserError(f"The processes find {there} chunks in {options.resume}: give a folder that all see.")
        keep = KeptChunks(folder if writes else None, team.from_first)
    elif folder:
        keep = KeptChunks(folder)
    done = earlier.chunks - first if earlier else 0
    before = [] if there_before is None else [there_before]
    before += [folder.latent(chunk) for chunk in range(first, first + done)] if folder else []
    if done and writes:
        print(f"{done} of {options.chunks} chunks were there from an interrupted run", flush=True)
    stream = VideoStream(options.stream, FPS) if options.stream and writes else None
    shower = _Stream(stream, before, options.enlarge) if stream else None
    shares = [texts[chunk * len(texts) // options.chunks] for chunk in range(options.chunks)]
    told: dict[str, Any] = {
        "settings": settings, "seed": options.seed, "state": earlier or state, "model": name, "keep": keep,
        "prefix": None if earlier else prefix,
        "video": video, "strength": options.strength,
        "parallel": parallel, "cancelled": team.stop if team else lambda: False,
        "latent_size": (height, width) if not demo else DEMO_SIZE, "steps": steps,
        "on_progress": Bar("generating", first + options.chunks) if writes else lambda progress: None,
        "on_chunk": shower.chunk if shower else lambda chunk: None,
    }  # fmt: skip
    left = options.chunks - done
    result: Result | None = None
    if left and magi:
        tokens = loaded.special_tokens if loaded else None
        result = generate_magi(
            backbone, texts[0], masks[0], left, special_tokens=tokens, device=device, **told
        )  # fmt: skip
    elif left:
        negative = _negative(options, device, dtype) if guidance != 1.0 else None
        result = generate(
            backbone, shares[done:], left, family_name=options.family, lag=lag, frames_per_chunk=chunk_frames,
            guidance_scale=guidance, negative=negative, shots=options.shots, **told,
        )  # fmt: skip
    if not writes:
        return
    if stream:
        stream.finish()
    dropped = 0 if state is None else state.dropped
    newest = earlier if result is None else result.state
    assert newest is not None
    given = there_before if earlier is None else earlier.latents
    latents = torch.cat(
        [*(one.cpu() for one in before), *([] if result is None else [_new_part(result, given)])], dim=2
    )
    _write(options, demo, magi, latents, newest._replace(latents=latents, dropped=dropped), result)


def _new_part(result: Result, given: Tensor | None) -> Tensor:
    """Latents of a result behind those that it was given."""
    return result.latents[:, :, 0 if given is None else given.shape[2] :]


def _write(options, demo: bool, magi: bool, latents: Tensor, state: State, result: Result | None) -> None:
    if options.out.suffix.lower() == LATENT:
        write_latent(options.out, latents, magi)
        said = f"{latents.shape[2]} latent frames"
    else:
        frames = frames_of(decode(latents, FRAMES_PER_CHUNK))
        save_video(enlarged(frames, options.enlarge), options.out, FPS)
        said = f"{len(frames)} frames"
    if options.save_state:
        save_state(state, options.save_state)
    if result is not None and options.report and options.report.suffix == ".json":
        words = json.dumps(result.report.as_dict(), indent=1) + "\n"
        write_whole(options.report, lambda partial: partial.write_text(words))
    elif result is not None and options.report:
        write_whole(options.report, report_picture(result.report).save)
    if result is not None:
        print(result.report.text())
    print(f"{options.out}: {said}")


def write_latent(path: Path, latents: Tensor, magi: bool) -> None:
    """Writes latents [B, C, T, H, W] of a network as ComfyUI's Load Latent reads them, in the VAE's own scale."""
    mean, deviation = statistics_of(latents.shape[1])
    raw = latents.float() / LATENT_SCALE if magi else latents.float() * deviation + mean
    tensors = {"latent_tensor": raw.contiguous(), "latent_format_version_0": torch.tensor([])}
    write_whole(path, lambda partial: save_file(tensors, partial))


def read_latent(path: Path, magi: bool, channels: int) -> Tensor:
    """Reads latents [B, C, T, H, W] as a network takes them, that ComfyUI's Save Latent or `write_latent` wrote.

    Raises:
        UserError: no such file, or not one of theirs.
    """
    try:
        raw = load_file(path).get("latent_tensor")
    except (OSError, SafetensorError) as error:
        raise UserError(f"Cannot read {path} ({first_line(error)}); give what Save Latent or --out wrote.") from error
    if raw is None or raw.ndim != 5 or raw.shape[1] != channels:
        raise UserError(
            f"{path.name} has no tensor 'latent_tensor' [B, {channels}, T, H, W]; write it with Save Latent."
        )
    mean, deviation = statistics_of(channels)
    return raw.float() * LATENT_SCALE if magi else (raw.float() - mean) / deviation


class _Stream:
    """Writes finished chunks of the demo model to a video that plays while it grows."""

    def __init__(self, stream: VideoStream, before: Sequence[Tensor], enlarge: int):
        self.stream, self.enlarge = stream, enlarge
        self.vae, self.memory = load_vae(), Memory()
        for latent in before:
            for part in latent.split(FRAMES_PER_CHUNK, dim=2):
                self.chunk(Chunk(0, part))

    @torch.inference_mode()
    def chunk(self, chunk: Chunk) -> None:
        """Appends a chunk."""
        pixels = self.vae.decode_normalised(chunk.latent.cpu().float(), self.memory)[0].clamp(-1, 1)
        self.stream.write(enlarged(frames_of(pixels), self.enlarge))


def _settings(options: argparse.Namespace) -> Settings:
    settings = preset(options.preset)
    cut = bounded_history(
        options.budget,
        options.window,
        options.sink,
        settings.history.compression,
        rule=options.history_rule,
        relative=options.relative,
        type=options.history_type,
    )
    if options.quality is not None:
        measured = calibration_of(options.network) if options.network else None
        settings = quality_settings(options.quality, measured)
    return replace(settings, history=cut)


def _loaded(options: argparse.Namespace, team: Any) -> Loaded:
    if options.network is None:
        raise UserError(f"The family '{options.family}' has no network here; give its file with --network.")
    dtype = None if options.dtype == "as it is" else getattr(torch, options.dtype)
    # On the processor, where it stays mapped from disk, until each process has taken its part.
    if options.family == "experts":
        if team is not None:
            raise UserError("The family experts runs two networks, which go in one process; run it without torchrun.")
        found = load_experts(options.network, options.network_low, dtype=dtype)
    else:
        found = load_backbone(options.network, options.family, dtype=dtype)
    options.family = found.family
    for warning in found.info.warnings:
        if team is None or team.rank == 0:
            print(f"warning: {warning}")
    return found


def _texts(options, device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor | None]]:
    """Embeddings in the order of the chunks that they are for, and which of their tokens count."""
    if options.captions:
        return [embed_caption(caption).to(device) for caption in options.captions], [None] * len(options.captions)
    pairs = [read_embedding(path) for path in options.text]
    return [text.to(device, dtype) for text, _ in pairs], [mask for _, mask in pairs]


def _negative(options, device: torch.device, dtype: torch.dtype) -> Tensor:
    if options.captions:
        return embed_caption(options.negative).to(device)
    if options.negative_text is None:
        raise UserError("Guidance needs the embedding of a negative prompt: give --negative-text, or --guidance 1.")
    return read_embedding(options.negative_text)[0].to(device, dtype)


def read_embedding(path: Path) -> tuple[Tensor, Tensor | None]:
    """Reads a text's embedding [1, tokens, width], and the mask of its tokens if there is one.

    Raises:
        UserError: no such file, or not one that Save Text Embedding wrote.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"Cannot read {path} ({first_line(error)}); give what Save Text Embedding wrote.") from error
    if "embedding" not in tensors or tensors["embedding"].ndim != 3:
        raise UserError(f"{path.name} has no tensor 'embedding' [1, tokens, width]; use the node Save Text Embedding.")
    return tensors["embedding"], tensors.get("mask")


def _digest(backbone: Any) -> str:
    """A few numbers of each weight, as one word."""
    some = [
        (name, w.flatten()[:: max(1, w.numel() // 8)][:8].float()) for name, w in backbone.network.named_parameters()
    ]
    return digest_of([*some, backbone.boundary] if hasattr(backbone, "boundary") else some)[:8]
