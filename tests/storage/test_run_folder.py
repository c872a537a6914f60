"""Runs that are kept on disk: going on from them gives the same bits, and they keep to their folder and its limit."""

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flowcache_core import generate
from flowcache_core.engine.guidance import classifier_free
from flowcache_core.engine.loop import Chunk, Engine
from flowcache_core.errors import UserError
from flowcache_core.history.snapshot import Snapshot, SnapshotDelta
from flowcache_core.models.presets import preset
from flowcache_core.schedule import ChunkSchedule
from flowcache_core.settings import OFF, Every, Settings
from flowcache_core.solvers.noise_levels import magi
from flowcache_core.solvers.one_step import chunk_noise
from flowcache_core.storage.files import checksum
from flowcache_core.storage.run_folder import RunFolder
from tests.helpers.runs import build, video
from tests.helpers.tiny import TINY

NAME = "0123456789abcdef" * 2
ROOM = 2**30
NAN = float("nan")


def folder(path, name=NAME, limit=ROOM, first=0) -> RunFolder:
    return RunFolder(path, name, limit, first, chunk_frames=2)


def text() -> torch.Tensor:
    return torch.randn(1, 5, TINY.text_dim, generator=torch.Generator().manual_seed(3))


def run(backbone, chunks, **kwargs):
    given = {"steps": 6, "lag": 6, "settings": preset("high", budget=2), "seed": 4, "frames_per_chunk": 2}
    return generate(backbone, text(), chunks, latent_size=(6, 4), **given | kwargs)


def one(size: int = 4, index: int = 0) -> tuple[Chunk, SnapshotDelta]:
    keys = torch.zeros(1, 1, 1, 4, size)
    tokens = torch.arange(4 * index, 4 * index + 4, dtype=torch.int32).expand(1, 1, 1, -1)
    clean = Snapshot(keys, keys.clone(), tokens, keys.new_empty(0))
    return Chunk(index, torch.zeros(1, 4, 2, 6, 4)), SnapshotDelta({"0.0": clean}, full=index == 0)


def engine_of(backbone, schedule: ChunkSchedule, settings=OFF, **more) -> Engine:
    start = lambda chunk: chunk_noise(4, chunk, (1, 4, 2, 6, 4))  # noqa: E731
    return build(backbone, schedule, classifier_free(text()), magi(schedule.steps), start, settings, **more)


def kept_run(backbone, path, chunks: int, settings) -> tuple[list[int], Engine]:
    """Bytes that each chunk of a run wrote to its folder."""
    engine = engine_of(backbone, ChunkSchedule(chunks, 6, 6), settings)
    kept, written, seen = folder(path), [], set()
    for chunk in engine.run():
        kept.add(chunk, engine.begin_delta(full=not kept.begun)())
        files = {(file, file.stat().st_mtime_ns): file.stat().st_size for file in kept.path.iterdir()}
        written.append(sum(size for file, size in files.items() if file not in seen))
        seen |= set(files)
    return written, engine


@pytest.mark.parametrize("budget", [None, 2])
def test_interrupted_run_goes_on_to_the_same_bits(backbone, tmp_path, budget):
    settings = preset("high", budget=budget)
    expected = run(backbone, 5, settings=settings)
    kept_run(backbone, tmp_path, 4, settings)
    again = folder(tmp_path)
    state = again.load()
    assert state.chunks == 4 and state.latents.shape[2] == 2
    rest = run(backbone, 1, settings=settings, state=state)
    whole = torch.cat([*(again.latent(chunk) for chunk in range(4)), rest.latents[:, :, 2:]], dim=2)
    assert torch.equal(whole, expected.latents)


@pytest.mark.parametrize("budget", [None, 2])
def test_a_chunk_writes_no_more_than_the_budget_however_long_the_run(backbone, tmp_path, budget):
    written, engine = kept_run(backbone, tmp_path, 8, preset("high", budget=budget))
    (history,) = engine.forward.histories.values()
    a_chunk = history.plan.stored_bytes * history.plan.chunk_tokens // history.plan.layer_tokens
    latents, files = 2 * 4 * 4 * 2 * 6 * 4, 4096  # of a chunk, twice; of the files' heads
    asked = history.plan.query_bytes
    assert max(written) <= (1 if budget is None else budget + 1) * a_chunk + latents + asked + files
    assert max(written[4:]) - min(written[4:]) < 256
    (state,) = folder(tmp_path).load().histories
    saved = history.save()
    assert all(torch.equal(ours, its) for ours, its in zip(state, saved, strict=True))


def test_a_run_that_goes_on_adds_to_what_is_there(backbone, tmp_path):
    """The limit has room for the history once, not for a second copy of it."""
    kept_run(backbone, tmp_path, 6, OFF)
    limit = 3 * sum(file.stat().st_size for file in (tmp_path / NAME).iterdir()) // 2
    again = folder(tmp_path, limit=limit)
    engine = engine_of(backbone, ChunkSchedule(1, 6, 6, prefix=6), loaded=again.load().by_branch)
    (chunk,) = engine.run()
    again.add(chunk, engine.begin_delta(full=not again.begun)())
    assert not again.full and again.load().chunks == 7
    (ours,), (saved,) = again.load().histories, engine.save().values()
    assert all(torch.equal(part, its) for part, its in zip(ours, saved, strict=True))
    other = folder(tmp_path, "f" * 32)  # of another run, which begins with that state
    other.add(chunk, engine.begin_delta(full=not other.begun)())
    assert {file.name[:5] for file in other.path.iterdir()} == {"chunk", "histo"}


def test_additions_after_one_that_could_not_be_read_are_dropped(tmp_path):
    kept = folder(tmp_path)
    for index in range(4):
        kept.add(*one(index=index))
    (kept.path / "added-00002.safetensors").write_bytes(b"")
    again = folder(tmp_path)
    assert again.load().chunks == 2
    again.add(*one(index=2))
    assert again.load().chunks == 3


def test_what_a_whole_history_replaces_is_removed(tmp_path):
    kept = folder(tmp_path)
    for index in range(3):
        kept.add(*one(index=index))
    assert kept.load().histories[0].keys.shape[3] == 3 * 4
    chunk, grown = one(index=3)
    kept.add(chunk, grown._replace(full=True))
    names = {file.name for file in kept.path.iterdir() if not file.name.startswith("chunk")}
    assert names == {"history-00003.safetensors"} and kept.load().chunks == 4


def test_a_damaged_addition_ends_the_run_before_it(tmp_path):
    kept = folder(tmp_path)
    for index in range(4):
        kept.add(*one(index=index))
    added = kept.path / "added-00002.safetensors"
    whole = added.read_bytes()
    other = (kept.path / "added-00001.safetensors").read_bytes()
    for content in (whole[: len(whole) // 2], other, b""):
        added.write_bytes(content)
        assert folder(tmp_path).load().chunks == 2
    added.write_bytes(whole)
    assert folder(tmp_path).load().chunks == 4


def test_state_in_the_middle_is_that_of_a_shorter_run(backbone):
    """Where several chunks are active, a resumed run is one that goes on from a state: the seam of two extensions."""
    engine = engine_of(backbone, ChunkSchedule(5, 6, 2))
    chunks = engine.run()
    assert [next(chunks).number for _ in range(3)] == [0, 1, 2]
    (middle,) = engine.save().values()
    (shorter,) = run(backbone, 3, lag=2, settings=OFF).state.histories
    assert middle.keys.shape[3] == 3 * 2 * 6
    assert torch.equal(middle.tokens, shorter.tokens)
    for ours, other in zip(middle[:2], shorter[:2], strict=True):
        assert torch.allclose(ours, other, atol=1e-4)  # chunks that follow go through the network with them


@pytest.mark.parametrize("lag", [1, 2, 6])
def test_keeping_a_run_changes_none_of_its_bits(backbone, tmp_path, lag):
    """A finished chunk's keys are copied from the pass that the run makes anyway, some ticks later if need be."""
    settings = Settings(Every(3))
    schedule = ChunkSchedule(5, 6, lag)
    expected = video(engine_of(backbone, schedule, settings))
    engine = engine_of(backbone, schedule, settings)
    kept, finished, latents = folder(tmp_path), [], []
    engine.on_progress = lambda told: keep(engine, kept, finished)
    for chunk in engine.run():
        latents.append(chunk.latent)
        finished.append(chunk)
        keep(engine, kept, finished)
    (saved,) = engine.save().values()
    keep(engine, kept, finished)
    assert torch.equal(torch.cat(latents, dim=2), expected)
    again = folder(tmp_path)
    state = again.load()
    assert state.chunks == 5 and all(torch.equal(again.latent(index), latents[index]) for index in range(5))
    assert all(torch.equal(part, its) for part, its in zip(*state.histories, saved, strict=True))
    assert lag > 1 or len(list(kept.path.glob("added-*"))) < 4  # several chunks came with one forward


def keep(engine: Engine, kept: RunFolder, finished: list[Chunk]) -> None:
    if finished and engine.settled:
        *before, newest = finished
        kept.add(newest, engine.begin_delta(full=not kept.begun)(), before)
        finished.clear()


def test_chunks_that_were_tampered_with_are_refused(tmp_path):
    kept = folder(tmp_path)
    chunk, grown = one()
    kept.add(chunk, grown)
    kept.load()
    for latent in (torch.zeros(1, 4, 3, 6, 4), torch.full((1, 4, 2, 6, 4), float("nan"))):
        save_file({"latent": latent}, tmp_path / NAME / "chunk-00000.safetensors")
        with pytest.raises(UserError, match="Chunk 0"):
            kept.latent(0)


def flip(file) -> None:
    """The last bit of the file's last number."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_swapped_flipped_and_linked_chunks_are_found(tmp_path):
    kept, other = folder(tmp_path), folder(tmp_path, "f" * 32)
    for index in range(3):
        kept.add(*one(index=index))
        other.add(*one(index=index))
    kept.load()
    first, second, elsewhere = (each / f"chunk-{index:05}.safetensors" for each, index in (
        (kept.path, 0), (kept.path, 1), (other.path, 1)
    ))  # fmt: skip
    whole = second.read_bytes()
    for put in (first.read_bytes(), elsewhere.read_bytes()):
        second.write_bytes(put)
        with pytest.raises(UserError, match="Chunk 1 .* damaged or another chunk"):
            kept.latent(1)
    second.write_bytes(whole)
    flip(second)
    with pytest.raises(UserError, match="Chunk 1 .* damaged or another chunk"):
        kept.latent(1)
    second.unlink()
    second.symlink_to(elsewhere)
    with pytest.raises(UserError, match="no regular file"):
        kept.latent(1)


@pytest.mark.parametrize("kind, left", [("history-00000", None), ("added-00002", 2)])
def test_a_flipped_or_strange_history_is_not_gone_on_from(tmp_path, kind, left):
    kept, other = folder(tmp_path), folder(tmp_path, "f" * 32)
    for index in range(4):
        kept.add(*one(index=index))
        other.add(*one(index=index))
    file = kept.path / f"{kind}.safetensors"
    whole = file.read_bytes()

    def chunks() -> int | None:
        state = folder(tmp_path).load()
        return state and state.chunks

    flip(file)
    assert chunks() == left
    file.write_bytes((other.path / file.name).read_bytes())
    assert chunks() == left
    file.write_bytes(whole)
    assert chunks() == 4
    with safe_open(file, "pt") as opened:
        told, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}
    tensors["history.0.keys"][..., -1] = NAN
    save_file(tensors, file, metadata=told | {"checksum": checksum(tensors)})  # as a run of an earlier version kept it
    assert chunks() == left


def test_a_history_that_is_not_finite_is_not_kept(tmp_path):
    kept = folder(tmp_path)
    kept.add(*one())
    chunk, grown = one(index=1)
    broken = grown.histories["0.0"]._replace(values=torch.full((1, 1, 1, 4, 4), NAN))
    with pytest.raises(UserError, match="values that are not finite.*weights are damaged"):
        kept.add(chunk, SnapshotDelta({"0.0": broken}, full=False))
    assert folder(tmp_path).load().chunks == 1


def test_a_linked_folder_is_not_followed(tmp_path):
    kept = folder(tmp_path / "elsewhere")
    kept.add(*one())
    (tmp_path / NAME).symlink_to(kept.path, target_is_directory=True)
    before = set(kept.path.iterdir())
    linked = folder(tmp_path)
    for use in (linked.load, lambda: linked.add(*one(index=1))):
        with pytest.raises(UserError, match="is a link, which is not followed"):
            use()
    assert set(kept.path.iterdir()) == before


def test_nothing_there_or_damaged_starts_anew(tmp_path):
    kept = folder(tmp_path)
    assert kept.load() is None
    chunk, grown = one()
    kept.add(chunk, grown)
    assert kept.load().chunks == 1
    state = tmp_path / NAME / "history-00000.safetensors"
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    assert kept.load() is None
    state.write_bytes(whole)
    (tmp_path / NAME / "chunk-00000.safetensors").unlink()
    assert kept.load() is None
    with pytest.raises(UserError, match="Chunk 0"):
        kept.latent(0)


def test_oldest_runs_go_first_and_nothing_else_is_touched(tmp_path):
    names = [digit * 32 for digit in "abc"]
    (tmp_path / "holiday").mkdir(parents=True)
    (tmp_path / "holiday" / "photo.png").write_bytes(bytes(9999))
    (tmp_path / ("d" * 32)).write_bytes(b"a file by a run's name")
    chunk, grown = one(1000)
    size = None
    for age, name in enumerate(names):
        kept = folder(tmp_path, name)
        kept.add(chunk, grown)
        size = sum(file.stat().st_size for file in kept.path.iterdir())
        for file in kept.path.iterdir():
            os.utime(file, (1000 + age, 1000 + age))
    folder(tmp_path, names[0]).load()  # the oldest by name, but used just now
    folder(tmp_path, NAME, limit=7 * size // 2).add(chunk, grown)
    assert {path.name for path in tmp_path.iterdir()} >= {"holiday", names[0], NAME}
    assert not (tmp_path / names[1]).exists()
    assert (tmp_path / "holiday" / "photo.png").exists() and (tmp_path / ("d" * 32)).exists()


def test_run_larger_than_the_limit_keeps_what_it_has(tmp_path):
    chunk, grown = one(1000)
    kept = folder(tmp_path, limit=100_000)
    kept.add(chunk, grown)
    assert not kept.full and kept.load().chunks == 1
    kept.add(*one(100_000, index=1))
    assert kept.full and folder(tmp_path).load().chunks == 1


def test_names_cannot_leave_the_folder(tmp_path):
    for name in ("../" + NAME[3:], "/etc", NAME + "/..", ""):
        with pytest.raises(ValueError):
            folder(tmp_path, name)


def test_prompts_that_were_changed_are_kept_and_without_them_nothing_is_gone_on_from(tmp_path):
    kept = folder(tmp_path)
    kept.keep_prompts("0: a circle\n1-: ein Würfel 方")  # before anything else is there
    kept.add(*one())
    assert folder(tmp_path).load() is not None and folder(tmp_path).prompts() == "0: a circle\n1-: ein Würfel 方"
    file = kept.path / "prompts.json"
    told = file.read_text()
    damages = [told.replace("circle", "square"), told.replace(NAME, "f" * 32), "[]", '{"prompts": 3}', told[:-9], ""]
    for damaged in damages:
        file.write_text(damaged)
        assert folder(tmp_path).prompts() is None and folder(tmp_path).load() is None
    file.unlink()
    (tmp_path / "elsewhere").write_text(told)
    file.symlink_to(tmp_path / "elsewhere")
    assert folder(tmp_path).load() is None
    kept.keep_prompts("")
    assert folder(tmp_path).prompts() == "" and folder(tmp_path).load() is not None
