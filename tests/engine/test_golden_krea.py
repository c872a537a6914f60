"""A history that is computed anew before every chunk, as Krea Realtime does it (tests/golden/README.md)."""

import pytest
import torch

from flowcache_core.engine.anew import Anew
from flowcache_core.engine.loop import Engine
from flowcache_core.generation import Result, generate
from flowcache_core.models.families import FAMILIES, KreaRenoise
from flowcache_core.models.wan import WanBackbone
from flowcache_core.schedule import ChunkSchedule
from flowcache_core.settings import OFF, Compression, HistorySettings, Settings
from flowcache_core.solvers import noise_levels
from flowcache_core.solvers.one_step import Renoise
from flowcache_core.storage.keeping import KeptChunks
from flowcache_core.storage.run_folder import RunFolder
from flowcache_core.storage.state import State, load_state, save_state
from tests.helpers import golden_weights
from tests.helpers.golden_runs import frames_of, relative_error
from tests.helpers.history_windows import golden_run
from tests.helpers.place import golden
from tests.helpers.runs import video

GOLDEN = golden("krea")
FRAMES = 3  # of a chunk
KREA = Anew(3, always=True, first=1)
RUNS = {
    "krea": (["cond"] * 6, 5, OFF),
    "krea_4_steps": (["cond"] * 4, 4, OFF),
    "krea_6_frames": (["cond"] * 6, 5, Settings(history=HistorySettings(budget=2))),
    "krea_switch": (["cond", "cond", "other", "other", "cond"], 5, OFF),
}


def make(
    shown: list[str], steps: int, settings: Settings = OFF, anew: Anew | None = KREA, solver=KreaRenoise
) -> Engine:
    schedule = ChunkSchedule(len(shown), steps, steps)
    return golden_run(schedule, noise_levels.krea(steps), settings, shown, solver=solver, anew=anew)


@pytest.mark.parametrize("name", RUNS)
def test_whole_run(name):
    shown, steps, settings = RUNS[name]
    expected, engine = GOLDEN[f"{name}.final"], make(shown, steps, settings)
    assert relative_error(video(engine), expected) < 1e-5
    assert engine.report.rerun_for == list(range(1, len(shown)))
    for wrong in (Anew(4, always=True, first=1), Anew(3, always=True), None):
        if settings == OFF or wrong is None:
            assert relative_error(video(make(shown, steps, settings, wrong)), expected) > 1e-3


def test_the_last_step_is_told_0_and_takes_the_least_level_of_training():
    for steps in (4, 5):
        told = [1000 * level for level in noise_levels.krea(steps)[:-1]]
        assert told == pytest.approx(GOLDEN[f"timesteps.{steps}"].tolist(), abs=1e-3)
    found = video(make(["cond"] * 6, 5, solver=Renoise))
    assert relative_error(found, GOLDEN["krea.final"]) > 1e-5


def test_in_system_memory():
    found = video(make(["cond"] * 6, 5, Settings(history=HistorySettings(memory="system"))))
    assert torch.equal(found, video(make(["cond"] * 6, 5)))


def test_it_holds_the_first_frame_and_the_newest_and_nothing_else():
    engine, seen = make(["cond"] * 6, 5), []
    forward = engine.forward
    compute = forward._compute_anew

    def looked(*args):
        compute(*args)
        for history in forward.histories.values():
            seen.append((history.tokens[0, 0, 0, : history.clean] // history.plan.frame_tokens).unique().tolist())

    forward._compute_anew = looked
    video(engine)
    (history,) = forward.histories.values()
    assert seen == [[0, 1, 2], [0, 4, 5], [0, 7, 8], [0, 10, 11], [0, 13, 14]]
    assert history.plan.layer_tokens == 6 * history.plan.frame_tokens
    assert engine.report.history_bytes_planned == engine.report.history_bytes_allocated
    assert engine.report.forwards_executed == engine.report.forwards_total == 6 * 5 + 5


def run(shown: list[str], state: State | None = None, settings: Settings = OFF, **more) -> Result:
    texts = [golden_weights.text(name) for name in shown]
    return generate(
        WanBackbone(golden_weights.network()), texts, len(shown), family_name="krea", settings=settings,
        latent_size=(4, 6), state=state, **more,
    )  # fmt: skip


def short(state: State) -> State:
    """A state whose older latents were let go, as a streamed run leaves it."""
    return state._replace(latents=state.latents[:, :, -3:], dropped=state.frames - 3, beginning=state.latents[:, :, :1])


@pytest.mark.parametrize("cut", [1, 2, 4])
@pytest.mark.parametrize("dropped", [False, True])
def test_goes_on_from_a_state_as_if_it_had_not_stopped(cut, dropped, tmp_path):
    state = run(["cond"] * cut).state
    save_state(short(state) if dropped and cut > 1 else state, tmp_path / "state.safetensors")
    after = run(["cond"] * (6 - cut), load_state(tmp_path / "state.safetensors"))
    assert torch.equal(after.latents[:, :, -3:], run(["cond"] * 6).latents[:, :, -3:])
    assert not any("as far as" in note for note in after.report.notes)


def test_a_state_without_the_videos_beginning_goes_on_with_the_newest_frames_and_says_so():
    state = short(run(["cond"] * 4).state)._replace(beginning=None)
    after = run(["cond"] * 2, state)
    assert any(note.endswith("before every chunk, as far as its latents were there") for note in after.report.notes)


@pytest.mark.parametrize("given", [0, 1, 3])
def test_an_interrupted_run_goes_on_with_the_same_bits(given, tmp_path):
    prefix = frames_of("image", given) if given else None
    whole = run(["cond"] * 5, prefix=prefix)

    def folder() -> RunFolder:
        first, lead = divmod(given, FRAMES)
        return RunFolder(tmp_path, "0" * 32, 2**30, first, FRAMES, lead=lead)

    run(["cond"] * 3, prefix=prefix, keep=KeptChunks(folder()))
    earlier = folder().load(KREA.newest(HistorySettings(), FRAMES), prefix, KREA.first, prefix)
    assert earlier.latents.shape[2] < 9 + given
    after = run(["cond"] * 2, earlier)
    assert torch.equal(after.latents[:, :, -6:], whole.latents[:, :, -6:])


def test_chunks_that_overlap_are_told_that_nothing_is_computed_anew():
    result = run(["cond"] * 3, lag=2)
    assert result.report.reruns == 0 and any("not computed anew" in note for note in result.report.notes)


def test_it_is_published_so():
    assert FAMILIES["krea"].anew == KREA and FAMILIES["krea"].levels(5) == noise_levels.krea(5)


def test_a_window_says_how_many_frames_are_seen():
    kept = HistorySettings(window=9, compression=Compression("window"))
    expected = GOLDEN["krea_6_frames.final"]
    assert relative_error(video(make(["cond"] * 6, 5, Settings(history=kept))), expected) < 1e-5
