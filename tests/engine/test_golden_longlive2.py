"""LongLive 2.0: its scheduler, windows, shots and start images (tests/golden/README.md)."""

import pickle
from dataclasses import replace

import pytest
import torch

from flowcache_core.engine.shots import ShotRule
from flowcache_core.errors import UserError
from flowcache_core.generation import Result, generate
from flowcache_core.history.cache import History
from flowcache_core.models.families import FAMILIES
from flowcache_core.models.wan import WanBackbone, WholeStepsBackbone
from flowcache_core.schedule import InShot, Shot
from flowcache_core.settings import OFF, Compression, HistorySettings, Settings
from flowcache_core.solvers.multistep import SkyReelsUniPC, UniPC
from flowcache_core.storage.keeping import KeptChunks
from flowcache_core.storage.run_folder import RunFolder
from flowcache_core.storage.state import load_state, save_state
from tests.helpers import golden_weights
from tests.helpers.golden_runs import relative_error
from tests.helpers.magi_weights import normal
from tests.helpers.place import golden

GOLDEN = golden("longlive2")
FAMILY = FAMILIES["longlive 2"]
CONFIG = replace(golden_weights.SMALL, in_dim=48, out_dim=48)
SHOTS = ["cond"] * 2 + ["other"] * 2 + ["cond"] * 3 + ["other"] * 4
RUNS = {  # frames of a chunk, window, sink, what chunks show, chunks that begin a shot
    "longlive2": (2, 8, 2, ["cond"] * 7, ()),
    "shots": (2, 8, 2, SHOTS, (2, 4, 7)),
    "image": (4, 12, 4, ["cond"] * 4, ()),
    "published": (8, 32, 8, SHOTS[:2] + ["other"] * 4, (2,)),
}


def frames_of(name: str, frames: int) -> torch.Tensor:
    return normal(name, (frames, 48, 4, 6)).transpose(0, 1)[None]


def run(
    name: str, settings: Settings | None = None, backbone=WholeStepsBackbone, first: int = 0, last: int | None = None,
    relative: bool = False, **more,
) -> Result:  # fmt: skip
    """A run as upstream's; or only some of its chunks."""
    frames, window, sink, shown, shots = RUNS[name]
    texts = [golden_weights.text(each) for each in shown[first:last]]
    noise = frames_of("noise", frames * len(shown)).split(frames, dim=2)
    history = HistorySettings(window=window, compression=Compression("window", sink=sink))
    told = {
        "family_name": "longlive 2", "frames_per_chunk": frames, "latent_size": (4, 6), "shots": shots,
        "noise": lambda chunk, step: noise[chunk], "settings": settings or Settings(history=history),
        "prefix": frames_of("image", 1) if name == "image" else None,
    }  # fmt: skip
    return generate(backbone(golden_weights.network(CONFIG)), texts, len(texts), **told | more)


def expected(name: str) -> torch.Tensor:
    return GOLDEN[f"{name}.final"]


def error(found: torch.Tensor, name: str) -> float:
    upstream = expected(name)
    return relative_error(found[:, :, -upstream.shape[2] :], upstream)


@pytest.mark.parametrize("name", RUNS)
def test_whole_run(name):
    assert error(run(name).latents, name) < 1e-5


def test_the_levels_and_what_the_network_is_told():
    told = [int(1000 * level) for level in FAMILY.levels(4)[:-1]]
    assert told == GOLDEN["timesteps"].tolist() and FAMILY.levels(4)[-1] == 0.0
    assert error(run("longlive2", backbone=WanBackbone).latents, "longlive2") > 1e-4
    for wrong in ({"solver": SkyReelsUniPC}, {"sigmas": [1.0, 0.9375, 0.8333, 0.625, 0.0]}):
        assert error(run("longlive2", **wrong).latents, "longlive2") > 1e-4
    assert FAMILY.solver(4) == "unipc" and error(run("longlive2", solver=UniPC).latents, "longlive2") < 1e-5


@pytest.mark.parametrize("gap", [0, 7])
def test_positions_jump_by_8_frames_where_a_shot_begins(gap, monkeypatch):
    monkeypatch.setitem(FAMILIES, "longlive 2", replace(FAMILY, shots=ShotRule(gap)))
    assert error(run("shots").latents, "shots") > 1e-3


def test_a_shot_keeps_the_frames_that_it_began_with(monkeypatch):
    monkeypatch.setattr("flowcache_core.history.cache.History._stays", lambda self, tokens: None)
    assert error(run("shots").latents, "shots") > 1e-3


def test_what_is_seen_of_older_shots(monkeypatch):
    """The sink, the frames that the shot began with, and the newest ones."""
    seen = []

    def cut(self: History, layer, parts, fresh):
        kept(self, layer, parts, fresh)
        if layer == 0:
            tokens = self.tokens[0, 0, 0, : self.plan.clean_tokens] // self.plan.frame_tokens
            seen.append(tokens.unique().tolist())

    kept = History._write_kept
    monkeypatch.setattr(History, "_write_kept", cut)
    run("shots")
    # Chunks of 2 frames, whose numbers jump by 8 where chunks 2, 4 and 7 begin.
    assert seen == [
        [0, 1, 12, 13, 14, 15],
        [0, 1, 14, 15, 24, 25],
        [0, 1, 24, 25, 26, 27],
        [0, 1, 24, 25, 28, 29],
        [0, 1, 28, 29, 38, 39],
        [0, 1, 38, 39, 40, 41],
        [0, 1, 38, 39, 42, 43],
    ]


def test_the_report_says_where_shots_begin():
    assert "a new shot begins with chunk 2, 4, 7" in run("shots").report.notes


def test_the_given_frame_comes_out_unchanged_and_is_shown_without_noise():
    found = run("image").latents
    assert torch.equal(found[:, :, :1], frames_of("image", 1)) and found.shape[2] == 16
    assert relative_error(run("image", prefix=None).latents[:, :, 4:], found[:, :, 4:]) > 1e-2


def test_a_prefix_whose_last_frames_fill_no_chunk_begins_the_next_one():
    whole = frames_of("prefix", 9)
    result = run("image", prefix=whole, noise=None)
    assert torch.equal(result.latents[:, :, :9], whole) and result.latents.shape[2] == 8 + 16


def test_where_chunks_overlap_no_shot_begins():
    result = run("shots", lag=2)
    assert any(note.startswith("no shot begins") for note in result.report.notes)
    assert torch.equal(result.latents, run("shots", lag=2, shots=()).latents)


def test_other_families_make_no_shots():
    with pytest.raises(UserError, match="'causal' make no shots"):
        run("shots", family_name="causal", settings=OFF)


def test_positions_from_the_windows_start_do_not_jump():
    settings = Settings(history=HistorySettings(window=8, compression=Compression("window", sink=2), relative=True))
    kept = run("shots", settings)
    assert relative_error(kept.latents[:, :, :12], run("shots", settings, shots=()).latents[:, :, :12]) == 0
    assert kept.state.shot.moved == 0 and kept.state.shot.begins == 14


@pytest.mark.parametrize("cut", [1, 2, 3, 5, 7, 8, 10])
def test_goes_on_from_a_state_as_if_it_had_not_stopped(cut, tmp_path):
    state = run("shots", last=cut).state
    save_state(state, tmp_path / "state.safetensors")
    loaded = load_state(tmp_path / "state.safetensors")
    assert loaded.shot == state.shot
    assert torch.equal(run("shots", first=cut, state=loaded).latents, run("shots").latents)


@pytest.mark.parametrize("cut", [2, 3, 8])
@pytest.mark.parametrize("window", [8, None])
def test_an_interrupted_run_goes_on_with_the_same_bits(cut, window, tmp_path):
    settings = None if window else Settings()

    def folder() -> RunFolder:
        return RunFolder(tmp_path, "0" * 32, 2**30, 0, 2)

    run("shots", settings, last=cut, keep=KeptChunks(folder()))
    earlier = folder().load()
    assert earlier is not None and earlier.chunks == cut
    after = run("shots", settings, first=cut, state=earlier)
    assert torch.equal(after.latents[:, :, -2:], run("shots", settings).latents[:, :, -2:])


@pytest.mark.parametrize("shot", [Shot(0, 2**40), Shot(0, -2), Shot("1", 0), Shot(-2, 0)])
def test_a_state_with_a_broken_shot_is_refused(shot, tmp_path):
    state = run("longlive2", last=2).state._replace(shot=shot)
    with pytest.raises(UserError, match="a shot of"):
        save_state(state, tmp_path / "state.safetensors")


def test_a_chunk_of_a_shot_is_the_chunk_of_its_number():
    chunk = pickle.loads(pickle.dumps(InShot(3, 14, 8)))
    assert chunk == 3 and hash(chunk) == hash(3) and (chunk.begins, chunk.moved) == (14, 8)
