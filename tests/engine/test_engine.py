"""The engine against the definition: one masked forward a tick over the whole sequence; and what a user relies on."""

import gc
import random
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from flowcache_core.engine.loop import Cancelled, Engine, guidance
from flowcache_core.engine.runner import Runner, Step, Text
from flowcache_core.history.compression import Compression
from flowcache_core.history.settings import HistorySettings
from flowcache_core.models.presets import OFF, PRESETS, ReuseSettings, Settings
from flowcache_core.models.rotary import rotate
from flowcache_core.reuse.policies import Forecast
from flowcache_core.schedule import ChunkSchedule
from flowcache_core.solvers.one_step import Euler, Renoise
from flowcache_core.storage.state import State, load_state, make_state, save_state
from tests.helpers.tiny import TINY, ask, one_by_one, watch_positions

SIZE = (6, 4)  # latent height and width


def sigmas_of(steps: int) -> list[float]:
    share = [1 - i / steps for i in range(steps + 1)]
    return [3 * s / (1 + 2 * s) for s in share]


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def start_noise(frames: int, seed: int = 7):
    return lambda chunk: draw(seed * 1000 + chunk, 1, TINY.in_dim, frames, *SIZE)


def text(seed: int = 0) -> torch.Tensor:
    return draw(seed + 50, 1, 5, TINY.text_dim)


def build(backbone, schedule, settings=OFF, frames=2, scale=1.0, state: State | None = None, **kwargs):
    runner = Runner(backbone, schedule, settings, frames)
    if state:
        runner.load(state.by_branch)
    denoise = guidance(runner, kwargs.pop("positive", text(0)), text(1), scale)
    return Engine(runner, denoise, sigmas_of(schedule.steps), start_noise(frames), **kwargs)


def run(*args, **kwargs) -> torch.Tensor:
    return torch.cat([chunk.latent for chunk in build(*args, **kwargs).run()], dim=2)


def reference(backbone, schedule, frames, prefix=None, scale=1.0) -> torch.Tensor:
    """One forward a tick over all chunks so far, each at its own noise level, under a block-causal mask."""
    sigmas = sigmas_of(schedule.steps)
    x = {i: chunk for i, chunk in enumerate(prefix.split(frames, dim=2))} if prefix is not None else {}
    level = dict.fromkeys(x, 0.0)
    for places in schedule:
        for place in places:
            if place.step == 0:
                x[place.chunk] = start_noise(frames)(place.chunk)
            level[place.chunk] = sigmas[place.step]
        order = sorted(x)
        whole = torch.cat([x[i] for i in order], dim=2)
        per_frame = torch.tensor([[level[i] for i in order for _ in range(frames)]])
        rows, columns = backbone.grid(*SIZE)
        table = backbone.rotary.table(torch.arange(len(order) * frames), rows, columns)
        chunk = torch.arange(len(order)).repeat_interleave(frames * rows * columns)
        mask = chunk[:, None] >= chunk[None, :]

        def attend(layer, q, k, v):
            return F.scaled_dot_product_attention(rotate(q, table), rotate(k, table), v, attn_mask=mask)

        def velocity(words):
            residual = backbone.trunk(whole, per_frame, backbone.context(words), attend)
            return backbone.head(whole, per_frame, residual)

        guided = velocity(text(0)) if scale == 1 else scale * velocity(text(0)) + (1 - scale) * velocity(text(1))
        for place in places:
            at = order.index(place.chunk) * frames
            x[place.chunk] = x[place.chunk] + guided[:, :, at : at + frames] * (
                sigmas[place.step + 1] - sigmas[place.step]
            )
            level[place.chunk] = sigmas[place.step + 1]
    return torch.cat([x[i] for i in schedule.indices], dim=2)


def test_equals_one_masked_forward_a_tick_over_many_schedules(backbone):
    rng = random.Random(0)
    for case in range(25):
        steps = rng.randint(1, 6)
        schedule = ChunkSchedule(rng.randint(1, 5), steps, rng.randint(0, steps), rng.randint(0, 2))
        frames, scale = rng.randint(1, 3), rng.choice([1.0, 2.5])
        prefix = draw(case, 1, TINY.in_dim, schedule.prefix * frames, *SIZE) if schedule.prefix else None
        engine = build(backbone, schedule, frames=frames, scale=scale)
        if prefix is not None:
            engine.prefill(prefix)
        ours = torch.cat([chunk.latent for chunk in engine.run()], dim=2)
        error = (ours - reference(backbone, schedule, frames, prefix, scale)).abs().max()
        assert error < 1e-4, (schedule, frames, scale, error)


def forwards(engine: Engine) -> list[int]:
    """Runs an engine; how many frames each forward of its network had."""
    trunk, frames = engine.runner.backbone.trunk, []
    engine.runner.backbone.trunk = lambda x, *rest: frames.append(x.shape[2]) or trunk(x, *rest)
    assert list(engine.run())
    engine.runner.backbone.trunk = trunk
    return frames


def test_chunks_that_are_recomputed_in_a_tick_share_a_forward(backbone):
    """Clean passes join the next tick's, where there is one."""
    schedule = ChunkSchedule(3, 4, 2)
    assert forwards(build(backbone, schedule)) == [2, 2, 4, 4, 6, 4, 4, 2, 2]
    assert forwards(build(backbone, schedule, Settings(ReuseSettings("fixed", steps=(0, 2))))) == [2, 4, 6, 4, 2]
    captions = [text(chunk) for chunk in range(3)]
    assert max(forwards(build(backbone, schedule, positive=lambda chunk: captions[chunk]))) == 2
    one_after_another = ChunkSchedule(2, 4, 4)
    assert forwards(build(backbone, one_after_another)) == [2] * 10


@pytest.mark.parametrize("name", ["off", "high", "balanced", "paper fast"])
@pytest.mark.parametrize("budget", [None, 2])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_sharing_a_forward_changes_nothing(backbone, monkeypatch, name, budget, scale):
    settings = replace(PRESETS[name], history=HistorySettings(budget))
    for schedule in (ChunkSchedule(5, 12, 3), ChunkSchedule(3, 6, 0)):
        shared = build(backbone, schedule, settings, scale=scale)
        most = max(forwards(shared))
        together = run(backbone, schedule, settings, scale=scale)
        with monkeypatch.context() as patch:
            patch.setattr("flowcache_core.engine.runner.FORWARD_TOKENS", 1)
            apart = build(backbone, schedule, settings, scale=scale)
            assert max(forwards(apart)) == 2 < most
            assert (run(backbone, schedule, settings, scale=scale) - together).abs().max() < 1e-3
        assert shared.runner.report.decisions == apart.runner.report.decisions


def test_a_wrong_position_would_be_noticed(backbone):
    schedule = ChunkSchedule(3, 4, 2)
    right = run(backbone, schedule)
    backbone.rotary = replace(backbone.rotary, theta=500.0)
    assert (run(backbone, schedule) - right).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["off", "balanced", "paper fast"])
def test_same_seed_same_bits(backbone, name):
    schedule = ChunkSchedule(4, 12, 4)
    settings = replace(PRESETS[name], history=HistorySettings(2, Compression()))
    assert torch.equal(run(backbone, schedule, settings, scale=2.0), run(backbone, schedule, settings, scale=2.0))


def test_two_engines_in_turns_do_not_know_of_each_other(backbone):
    schedule = ChunkSchedule(3, 6, 3)
    alone = run(backbone, schedule, PRESETS["balanced"])
    engines = [build(backbone, schedule, PRESETS["balanced"]).run() for _ in range(2)]
    pairs = list(zip(*engines, strict=True))
    assert all(torch.equal(a.latent, b.latent) for a, b in pairs)
    assert torch.equal(torch.cat([a.latent for a, _ in pairs], dim=2), alone)


def test_branches_in_one_batch_equal_branches_alone(backbone):
    """A host may batch both sides of guidance or not; the histories never mix."""
    schedule = ChunkSchedule(3, 4, 2)
    runner = Runner(backbone, schedule, OFF, 2)

    def apart(x, sigma, place):
        (positive,) = runner.forward([Step(x, sigma, place)], ["cond"], [Text(text(0), "p")])
        (negative,) = runner.forward([Step(x, sigma, place)], ["uncond"], [Text(text(1), "n")])
        return 2.0 * positive - negative

    split = Engine(runner, one_by_one(apart), sigmas_of(4), start_noise(2))
    split = torch.cat([chunk.latent for chunk in split.run()], dim=2)
    assert (split - run(backbone, schedule, scale=2.0)).abs().max() < 1e-4


def test_extension_from_a_state_recomputes_nothing_and_goes_on_exactly(backbone):
    """With one chunk at a time, two runs joined by a state are one run."""
    settings = replace(OFF, history=HistorySettings(2, Compression()))
    whole_schedule = ChunkSchedule(6, 3, 3)
    whole = run(backbone, whole_schedule, settings)
    first = build(backbone, ChunkSchedule(3, 3, 3), settings)
    begun = torch.cat([chunk.latent for chunk in first.run()], dim=2)
    state = make_state(begun, first.runner.save(), 2)
    second = build(backbone, ChunkSchedule(3, 3, 3, prefix=3), settings, state=state)
    rest = torch.cat([chunk.latent for chunk in second.run()], dim=2)
    assert second.runner.report.forwards_executed == 3 * 4
    assert (torch.cat([begun, rest], dim=2) - whole).abs().max() < 1e-5


def test_a_state_survives_the_disk_bit_for_bit(backbone, tmp_path):
    settings = replace(OFF, history=HistorySettings(2, Compression(), relative=True))
    engine = build(backbone, ChunkSchedule(4, 4, 2), settings, scale=2.0)
    latents = torch.cat([chunk.latent for chunk in engine.run()], dim=2)
    state = make_state(latents, engine.runner.save(), 2, "tiny")
    save_state(state, tmp_path / "a.safetensors")
    again = load_state(tmp_path / "a.safetensors")
    assert again.branches == state.branches and again.model == "tiny" and again.chunk_frames == 2
    assert str(again) == f"State of 8 frames, 2 a chunk, latents {list(latents.shape)}"
    for mine, theirs in zip(state.histories, again.histories, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    more = [
        run(backbone, ChunkSchedule(2, 4, 2, prefix=4), settings, scale=2.0, state=source) for source in (state, again)
    ]
    assert torch.equal(*more)


def test_one_state_serves_two_extensions(backbone):
    first = build(backbone, ChunkSchedule(2, 3, 3))
    state = make_state(torch.cat([c.latent for c in first.run()], dim=2), first.runner.save(), 2)
    before = [tensor.clone() for history in state.histories for tensor in history]
    schedule = ChunkSchedule(2, 3, 3, prefix=2)
    one = run(backbone, schedule, state=state)
    other = run(backbone, schedule, state=state, positive=text(9))
    assert not torch.equal(one, other)
    assert torch.equal(one, run(backbone, schedule, state=state))
    assert all(torch.equal(a, b) for a, b in zip(before, (t for h in state.histories for t in h), strict=True))


def test_relative_positions_equal_absolute_ones_while_all_fits(backbone):
    schedule = ChunkSchedule(4, 4, 2)
    absolute = run(backbone, schedule)
    relative = run(backbone, schedule, replace(OFF, history=HistorySettings(4, relative=True)))
    assert (absolute - relative).abs().max() < 1e-4


def test_relative_positions_never_leave_the_window(backbone):
    settings = replace(OFF, history=HistorySettings(2, Compression("window"), relative=True))
    absolute = run(
        backbone, ChunkSchedule(12, 2, 2), replace(settings, history=HistorySettings(2, Compression("window")))
    )
    seen = watch_positions(backbone)
    relative = run(backbone, ChunkSchedule(12, 2, 2), settings)
    assert min(seen) >= 0 and max(seen) < (2 + 1) * 2 + max(SIZE)
    assert max(seen) < 12 * 2
    # A sliding window sees the same distances either way, so only rounding may differ.
    assert (absolute - relative).abs().max() < 1e-3


def test_history_never_grows_and_stays_in_order(backbone):
    settings = replace(OFF, history=HistorySettings(2, Compression()))
    engine = build(backbone, ChunkSchedule(10, 4, 2), settings)
    sizes = set()
    for _ in engine.run():
        (history,) = engine.runner.histories.values()
        sizes.add(history.bytes)
        filled = history.clean + len(history.active) * history.shape.chunk_tokens
        assert filled <= history.shape.tokens == (2 + 2) * history.shape.chunk_tokens
        tokens = history.tokens[:, :, :, : history.clean]
        assert (tokens.diff(dim=-1) > 0).all(), "clean tokens stay in time order"
    assert len(sizes) == 1
    report = engine.runner.report
    assert report.history_bytes_allocated < report.history_bytes_unbounded


def test_a_chunk_that_waits_keeps_its_velocity(backbone):
    """Holding the velocity (order 0) over k steps is one Euler step of their joint length."""
    schedule = ChunkSchedule(1, 8, 8)
    held = run(backbone, schedule, Settings(ReuseSettings("fixed", steps=(0, 4), order=0, correct=False)))
    sigmas = sigmas_of(8)
    runner = Runner(backbone, ChunkSchedule(1, 2, 2), OFF, 2)
    coarse = Engine(runner, guidance(runner, text(0)), [sigmas[0], sigmas[4], sigmas[8]], start_noise(2))
    assert (held - next(coarse.run()).latent).abs().max() < 1e-4


def test_a_corrected_run_takes_the_line_between_recomputed_velocities(backbone):
    """Its latent at step 4 is where steps 0 to 3 lead along the line between the velocities of steps 0 and 4."""
    sigmas, seen = sigmas_of(8), {}
    runner = Runner(backbone, ChunkSchedule(1, 8, 8), Settings(ReuseSettings("fixed", steps=(0, 4))), 2)
    guided = guidance(runner, text(0))

    def denoise(x, sigma, place):
        velocity = ask(guided, x, sigma, place)
        seen[place.step] = (x, velocity)
        return velocity

    for _ in Engine(runner, one_by_one(denoise), sigmas, start_noise(2)).run():
        pass
    x, (_, first), (_, second) = seen[0][0], seen[0], seen[4]
    for step in range(4):
        x = x + torch.lerp(first, second, step / 4) * (sigmas[step + 1] - sigmas[step])
    assert (seen[4][0] - x).abs().max() > 1e-3  # the forecast had led elsewhere
    corrected = seen[5][0] - second * (sigmas[5] - sigmas[4])
    assert (corrected - x).abs().max() < 1e-5


def test_few_step_renoising(backbone):
    """Each step's velocity gives a clean estimate, which is noised again to the next level."""
    engine = build(
        backbone, ChunkSchedule(2, 4, 4), solver=Renoise, noise=lambda chunk, step: torch.zeros(1, 4, 2, *SIZE)
    )
    estimate = [chunk.latent for chunk in engine.run()]
    assert all(torch.isfinite(latent).all() for latent in estimate)
    again = build(
        backbone,
        ChunkSchedule(2, 4, 4),
        solver=Renoise,
        noise=lambda chunk, step: draw(chunk * 9 + step, 1, 4, 2, *SIZE),
    )
    assert not torch.equal(estimate[0], next(again.run()).latent)


def test_reuse_between_fresh_noises(backbone):
    """A held clean estimate, noised again and again, is one step of the few-step sampler to the last level."""
    sigmas = sigmas_of(8)

    def noise(chunk: int, step: int) -> torch.Tensor:
        return draw(chunk * 9 + step, 1, 4, 2, *SIZE)

    settings = Settings(ReuseSettings("fixed", steps=(0, 3, 5), order=1))
    held = run(backbone, ChunkSchedule(2, 8, 8), settings, solver=Renoise, noise=noise)
    schedule = ChunkSchedule(2, 3, 3)
    runner = Runner(backbone, schedule, OFF, 2)
    levels = [sigmas[0], sigmas[3], sigmas[5], 0.0]
    last = {0: 2, 1: 4}  # step of the short run -> the noise that its next level is made with
    coarse = Engine(
        runner, guidance(runner, text(0)), levels, start_noise(2), lambda chunk, step: noise(chunk, last[step]), Renoise
    )
    assert (held - torch.cat([chunk.latent for chunk in coarse.run()], dim=2)).abs().max() < 1e-4


def test_cancel_at_every_moment(backbone):
    schedule = ChunkSchedule(3, 3, 2)
    for moment in range(12):
        calls = iter(range(100))
        engine = build(backbone, schedule, cancelled=lambda calls=calls, moment=moment: next(calls) == moment)
        with pytest.raises(Cancelled, match="of 3 chunks"):
            list(engine.run())
            raise Cancelled("of 3 chunks: it ended before")  # the schedule has fewer steps than this moment


def test_a_cancelled_run_leaves_no_memory_behind(backbone):
    settings = Settings(ReuseSettings("even", every=2, least=1), HistorySettings(2))
    calls = iter(range(100))

    def later() -> bool:
        return bool(engine.runner.histories) and next(calls) > 9  # noqa: F821, it is deleted later

    engine = build(backbone, ChunkSchedule(4, 4, 2), settings, scale=2.0, cancelled=later)

    generator = engine.run()
    with pytest.raises(Cancelled):
        list(generator)
    layers = [layer for history in engine.runner.histories.values() for layer in history.layers]
    held = [weakref.ref(part.here) for layer in layers for part in layer.parts]
    held += [weakref.ref(result) for forecast in engine.runner._forecasts.values() for result in forecast.results]
    assert len(held) > 4
    del engine, generator, layers
    gc.collect()
    assert not any(reference() is not None for reference in held)


def test_progress_is_told_every_tick(backbone):
    told = []
    schedule = ChunkSchedule(3, 4, 2)
    list(build(backbone, schedule, on_progress=told.append).run())
    assert [progress.tick for progress in told] == list(range(1, schedule.ticks + 1))
    assert told[-1].clean == 3


def test_prompts_by_chunk(backbone):
    """The same words for every chunk equal one prompt; other words change only later chunks."""
    schedule = ChunkSchedule(3, 3, 3)
    one, words = run(backbone, schedule), text(0)
    assert torch.equal(run(backbone, schedule, positive=lambda chunk: words), one)
    switched = run(backbone, schedule, positive=lambda chunk: words if chunk < 2 else text(5))
    assert torch.equal(switched[:, :, :4], one[:, :, :4]) and not torch.equal(switched[:, :, 4:], one[:, :, 4:])


def test_bfloat16_follows_its_input():
    from flowcache_core.models.wan import WanBackbone
    from tests.helpers.tiny import tiny_network

    network = tiny_network().bfloat16()
    network.patch_embedding.float()
    schedule = ChunkSchedule(2, 4, 2)
    exact = run(WanBackbone(tiny_network()), schedule)
    runner = Runner(WanBackbone(network), schedule, OFF, 2)
    engine = Engine(
        runner,
        guidance(runner, text(0).bfloat16()),
        sigmas_of(4),
        lambda chunk: start_noise(2)(chunk).bfloat16(),
        solver=Euler,
    )
    ours = torch.cat([chunk.latent for chunk in engine.run()], dim=2)
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - exact).norm() / exact.norm() < 5e-2


@pytest.mark.parametrize("solver", [Euler, Renoise])
def test_what_stands_in_for_a_sum_is_the_sum_of_what_stands_in(backbone, solver):
    """Guided steps that are reused for sure can be foretold without asking for their branches.

    The nodes' Shortcut rests on that; a stand-in for it is used here. The class itself needs the host: see
    `test_reused_steps_are_the_same_without_the_guider` in tests/host/test_native.py.
    """
    schedule, settings = ChunkSchedule(3, 8, 4), Settings(ReuseSettings("fixed", steps=(0, 1, 4, 7), order=1))
    noise = {"noise": lambda chunk, step: draw(100 * chunk + step, 1, TINY.in_dim, 2, *SIZE), "solver": solver}
    expected = build(backbone, schedule, settings, scale=3.0, **noise)
    plain = torch.cat([chunk.latent for chunk in expected.run()], dim=2)
    engine = build(backbone, schedule, settings, scale=3.0, **noise)
    runner, guided, sums, asked = engine.runner, engine.denoise, {}, []

    def denoise(x, sigma, place):
        held = runner.held == "clean"
        if runner.reuses(place):
            result = sums[place.chunk].at(place.step)
            return (x - result) / sigma if held else result
        asked.append(place)
        velocity = ask(guided, x, sigma, place)
        if place.step >= 0:
            sums.setdefault(place.chunk, Forecast(runner.order)).add(
                place.step, x - sigma * velocity if held else velocity
            )
        return velocity

    engine.denoise = one_by_one(denoise)
    assert torch.allclose(torch.cat([chunk.latent for chunk in engine.run()], dim=2), plain, atol=1e-4)
    assert runner.report.decisions == expected.runner.report.decisions
    assert len(asked) == expected.runner.report.forwards_executed / 2 < 3 * 8  # of two branches
