"""The engine against the definition: one masked forward a tick over the whole sequence; and what a user relies on."""

import gc
import random
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from flowcache_core.engine.guidance import WeightedGuidance, classifier_free
from flowcache_core.engine.loop import Cancelled, Engine
from flowcache_core.history.positions import rotate
from flowcache_core.models.presets import PRESETS
from flowcache_core.models.wan import WanBackbone
from flowcache_core.reuse.forecast import Forecast
from flowcache_core.schedule import ChunkSchedule
from flowcache_core.settings import HELD, OFF, Between, Compression, Every, Fixed, HistorySettings, Settings
from flowcache_core.solvers.one_step import Euler, Renoise
from flowcache_core.storage.state import State, load_state, make_state, save_state
from tests.helpers import runs
from tests.helpers.runs import give, video
from tests.helpers.tiny import TINY, tiny_network, watch_positions

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


def build(
    backbone, schedule, settings=OFF, frames=2, scale=1.0, state: State | None = None, positive=None, **more
) -> Engine:
    guidance = more.pop("guidance", None) or classifier_free(text(0) if positive is None else positive, text(1), scale)
    loaded = None if state is None else state.by_branch
    sigmas = more.pop("sigmas", None) or sigmas_of(schedule.steps)
    return runs.build(backbone, schedule, guidance, sigmas, start_noise(frames), settings, loaded=loaded, **more)


def run(*args, **kwargs) -> torch.Tensor:
    return video(build(*args, **kwargs))


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
            give(engine, prefix, frames)
        ours = video(engine)
        error = (ours - reference(backbone, schedule, frames, prefix, scale)).abs().max()
        assert error < 1e-4, (schedule, frames, scale, error)


def forwards(engine: Engine) -> list[int]:
    """Runs an engine; how many frames went through the network's first block together, each time."""
    backbone, frames = engine.forward.backbone, []
    block = backbone.block

    def watched(layer, x, *rest):
        if layer == 0:
            frames.append(x.shape[1])
        return block(layer, x, *rest)

    backbone.block = watched
    assert list(engine.run())
    engine.save()
    backbone.block = block
    return frames


def test_chunks_that_are_recomputed_in_a_tick_share_a_forward(backbone):
    """Clean passes join the next tick's, where there is one; the last is made when the history is asked for."""
    schedule = ChunkSchedule(3, 4, 2)
    assert forwards(build(backbone, schedule)) == [2, 2, 4, 4, 6, 4, 4, 2, 2]
    assert forwards(build(backbone, schedule, Settings(Fixed((0, 2))))) == [2, 4, 6, 4, 2]
    one_after_another = ChunkSchedule(2, 4, 4)
    assert forwards(build(backbone, one_after_another)) == [2] * 10


def test_chunks_with_prompts_of_their_own_share_a_forward_too(backbone, monkeypatch):
    schedule, captions = ChunkSchedule(3, 4, 2), [text(chunk) for chunk in range(3)]

    def made() -> Engine:
        return build(backbone, schedule, positive=captions.__getitem__, scale=2.0)

    assert forwards(made()) == [2, 2, 4, 4, 6, 4, 4, 2, 2]
    together = video(made())
    monkeypatch.setattr("flowcache_core.history.plan.FORWARD_TOKENS", 1)
    assert set(forwards(made())) == {2}
    assert (video(made()) - together).abs().max() < 1e-4


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
            patch.setattr("flowcache_core.history.plan.FORWARD_TOKENS", 1)
            apart = build(backbone, schedule, settings, scale=scale)
            assert max(forwards(apart)) == 2 < most
            assert (run(backbone, schedule, settings, scale=scale) - together).abs().max() < 1e-3
        assert shared.report.decisions == apart.report.decisions


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


class OneByOne(WeightedGuidance):
    """Asks for the branches of guidance one after another, as a host may; of one chunk at a time where told so."""

    def velocities(self, steps, network):
        if not self.at_once:
            answers = [self._apart([step], network) for step in steps]
            return [value for (value,) in answers], tuple(self.texts)
        return self._apart(steps, network), tuple(self.texts)

    def _apart(self, steps, network):
        parts = [network(steps, [name], lambda chunk, name=name: [self.texts[name]]) for name in self.texts]
        return [self.sum(step.sigma, values) for step, *values in zip(steps, *parts, strict=True)]


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("budget", [None, 1])
def test_branches_in_one_batch_equal_branches_alone(backbone, at_once, budget):
    """A host may batch both sides of guidance or not; the histories never mix."""
    settings = replace(OFF, history=HistorySettings(budget, Compression("window")))
    guidance = OneByOne({"cond": text(0), "uncond": text(1)}, {"cond": 2.0, "uncond": -1.0})
    guidance.at_once = at_once
    schedule = ChunkSchedule(4, 4, 2 if budget is None else 4)
    split = run(backbone, schedule, settings, guidance=guidance)
    assert (split - run(backbone, schedule, settings, scale=2.0)).abs().max() < 1e-4


def test_extension_from_a_state_recomputes_nothing_and_goes_on_exactly(backbone):
    """With one chunk at a time, two runs joined by a state are one run."""
    settings = replace(OFF, history=HistorySettings(2, Compression()))
    whole = run(backbone, ChunkSchedule(6, 3, 3), settings)
    first = build(backbone, ChunkSchedule(3, 3, 3), settings)
    begun = video(first)
    state = make_state(begun, first.save(), 2)
    second = build(backbone, ChunkSchedule(3, 3, 3, prefix=3), settings, state=state)
    rest = video(second)
    assert second.report.forwards_executed == 3 * 4
    assert (torch.cat([begun, rest], dim=2) - whole).abs().max() < 1e-5


def test_a_state_survives_the_disk_bit_for_bit(backbone, tmp_path):
    settings = replace(OFF, history=HistorySettings(2, Compression(), relative=True))
    engine = build(backbone, ChunkSchedule(4, 4, 2), settings, scale=2.0)
    latents = video(engine)
    state = make_state(latents, engine.save(), 2, "tiny")
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
    state = make_state(video(first), first.save(), 2)
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


@pytest.mark.parametrize("name", ["off", "paper fast"])
def test_history_never_grows_and_stays_in_order(backbone, name):
    settings = replace(PRESETS[name], history=HistorySettings(2, Compression()))
    engine = build(backbone, ChunkSchedule(12, 4, 2), settings)
    sizes = set()
    for _ in engine.run():
        (history,) = engine.forward.histories.values()
        sizes.add(engine.forward.history_bytes[1])
        plan = history.plan
        active = len(history.slots) if plan.kind == "stored" else 0
        room = 2 + (0 if plan.kind == "shared" else 2)
        assert history.clean + active * plan.chunk_tokens <= plan.layer_tokens == room * plan.chunk_tokens
        tokens = history.tokens[:, :, :, : history.clean]
        assert (tokens.diff(dim=-1) > 0).all(), "clean tokens stay in time order"
    assert sizes == {engine.report.history_bytes_planned}
    assert engine.report.history_bytes_allocated < engine.report.history_bytes_unbounded


def test_a_chunk_that_waits_keeps_its_velocity(backbone):
    """Holding the velocity over k steps is one Euler step of their joint length."""
    held = run(backbone, ChunkSchedule(1, 8, 8), Settings(Fixed((0, 4)), HELD))
    sigmas = sigmas_of(8)
    coarse = run(backbone, ChunkSchedule(1, 2, 2), sigmas=[sigmas[0], sigmas[4], sigmas[8]])
    assert (held - coarse).abs().max() < 1e-4


def test_a_corrected_run_takes_the_line_between_recomputed_velocities(backbone):
    """Its latent at step 4 is where steps 0 to 3 lead along the line between the velocities of steps 0 and 4."""
    sigmas, seen, after = sigmas_of(8), {}, {}
    engine = build(
        backbone,
        ChunkSchedule(1, 8, 8),
        Settings(Fixed((0, 4))),
        on_progress=lambda told: after.update({told.tick: [chunk.latent for chunk in engine.active]}),
    )
    ask = engine.forward.velocities

    def watched(steps):
        answers = ask(steps)
        seen.update({step.place.step: (step.x, answer.value) for step, answer in zip(steps, answers, strict=True)})
        return answers

    engine.forward.velocities = watched
    list(engine.run())
    assert list(seen) == [0, 4]
    x, (_, first), (_, second) = seen[0][0], seen[0], seen[4]
    for step in range(4):
        x = x + torch.lerp(first, second, step / 4) * (sigmas[step + 1] - sigmas[step])
    assert (seen[4][0] - x).abs().max() > 1e-3  # the forecast had led elsewhere
    corrected = after[5][0] - second * (sigmas[5] - sigmas[4])
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

    settings = Settings(Fixed((0, 3, 5)), Between(order=1))
    held = run(backbone, ChunkSchedule(2, 8, 8), settings, solver=Renoise, noise=noise)
    last = {0: 2, 1: 4}  # step of the short run -> the noise that its next level is made with
    coarse = run(
        backbone,
        ChunkSchedule(2, 3, 3),
        sigmas=[sigmas[0], sigmas[3], sigmas[5], 0.0],
        solver=Renoise,
        noise=lambda chunk, step: noise(chunk, last[step]),
    )
    assert (held - coarse).abs().max() < 1e-4


@pytest.mark.parametrize("budget", [None, 1])
def test_cancel_at_every_moment(backbone, budget):
    """It is asked at every tick, and before every layer."""
    schedule, settings = ChunkSchedule(3, 3, 2), replace(OFF, history=HistorySettings(budget))
    asked: list[int] = []

    def made(moment: int) -> Engine:
        asked.clear()
        return build(backbone, schedule, settings, cancelled=lambda: asked.append(0) or len(asked) == moment)

    whole = video(made(0))
    moments = len(asked)
    assert moments >= schedule.ticks * (1 + TINY.num_layers)
    for moment in range(1, moments + 1):
        with pytest.raises(Cancelled, match="of 3 chunks"):
            list(made(moment).run())
        assert len(asked) == moment
    assert torch.equal(video(made(moments + 1)), whole)


@pytest.mark.parametrize("budget", [None, 2])
def test_a_cancelled_run_leaves_no_memory_behind(backbone, budget):
    settings = Settings(Every(2), history=HistorySettings(budget))
    calls = iter(range(100))
    engine = build(backbone, ChunkSchedule(4, 4, 2), settings, scale=2.0, cancelled=lambda: next(calls) > 9)
    generator = engine.run()
    with pytest.raises(Cancelled):
        list(generator)
    histories = list(engine.forward.histories.values())
    layers = [layer for history in histories for layer in (*history.layers, *([history.scratch] * (budget or 0)))]
    held = [weakref.ref(part.here) for layer in layers for part in layer]
    held += [weakref.ref(result) for chunk in engine.active for result in chunk.forecast.results]
    assert len(held) > 4
    del engine, generator, layers, histories
    gc.collect()
    assert not any(reference() is not None for reference in held)


def test_progress_is_told_every_tick(backbone):
    told = []
    schedule = ChunkSchedule(3, 4, 2)
    list(build(backbone, schedule, on_progress=told.append).run())
    assert [progress.tick for progress in told] == list(range(1, schedule.ticks + 1))
    assert told[-1].finished == 3


def test_prompts_by_chunk(backbone):
    """The same words for every chunk equal one prompt; other words change only later chunks."""
    schedule = ChunkSchedule(3, 3, 3)
    one, words = run(backbone, schedule), text(0)
    assert torch.equal(run(backbone, schedule, positive=lambda chunk: words), one)
    switched = run(backbone, schedule, positive=lambda chunk: words if chunk < 2 else text(5))
    assert torch.equal(switched[:, :, :4], one[:, :, :4]) and not torch.equal(switched[:, :, 4:], one[:, :, 4:])


def test_bfloat16_follows_its_input():
    network = tiny_network().bfloat16()
    network.patch_embedding.float()
    schedule = ChunkSchedule(2, 4, 2)
    exact = run(WanBackbone(tiny_network()), schedule)
    ours = video(
        runs.build(
            WanBackbone(network),
            schedule,
            classifier_free(text(0).bfloat16()),
            sigmas_of(4),
            lambda chunk: start_noise(2)(chunk).bfloat16(),
        )
    )
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - exact).norm() / exact.norm() < 5e-2


class ForecastByBranch(WeightedGuidance):
    """Lets a forecast stand in for each branch by itself, at steps that are not listed."""

    at_once = False  # not all chunks of a tick reach the network, so their keys must stay

    def __init__(self, texts, weights, listed, order: int, holds_clean: bool):
        super().__init__(texts, weights)
        self.listed, self.order, self.holds_clean = listed, order, holds_clean
        self.kept: dict = {}
        self.asked = 0

    def velocities(self, steps, network):
        names = tuple(self.texts)
        due = [step for step in steps if step.place.is_clean_pass or step.place.step in self.listed]
        self.asked += len(due)
        asked = [step._replace(x=torch.cat([step.x] * len(names))) for step in due]
        answers = iter(network(asked, names, self.texts_of) if asked else [])
        return [self.sum(step.sigma, self._one(step, answers).chunk(len(names))) for step in steps], names

    def _one(self, step, answers):
        place, both = step.place, torch.cat([step.x] * len(self.texts))
        if place.is_clean_pass:
            return next(answers)
        kept = self.kept.setdefault(place.chunk, Forecast(self.order))
        if place.step in self.listed:
            velocity = next(answers)
            kept.add(place.step, both - step.sigma * velocity if self.holds_clean else velocity)
            return velocity
        return (both - kept.at(place.step)) / step.sigma if self.holds_clean else kept.at(place.step)


@pytest.mark.parametrize("solver", [Euler, Renoise])
def test_what_stands_in_for_a_sum_is_the_sum_of_what_stands_in(backbone, solver):
    """So a reused step asks for no branch, whatever the guidance is."""
    schedule, listed = ChunkSchedule(3, 8, 4), (0, 1, 4, 7)
    noise = {"noise": lambda chunk, step: draw(100 * chunk + step, 1, TINY.in_dim, 2, *SIZE), "solver": solver}
    engine = build(backbone, schedule, Settings(Fixed(listed), Between(1, correct=False)), scale=3.0, **noise)
    ours, count = video(engine), engine.report.forwards_executed
    by_branch = ForecastByBranch(
        {"cond": text(0), "uncond": text(1)}, {"cond": 3.0, "uncond": -2.0}, listed,
        order=0 if solver is Renoise else 1, holds_clean=solver is Renoise,
    )  # fmt: skip
    theirs = video(build(backbone, schedule, guidance=by_branch, **noise))
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert by_branch.asked == count / 2 < 3 * 8  # of two branches


@pytest.mark.parametrize("lag", [8, 4])
def test_another_mix_of_branches_is_recomputed_and_starts_a_new_forecast(backbone, lag):
    """No line leads from one sum of branches to another: what comes after the change does not know what was before."""
    schedule, sigmas = ChunkSchedule(2, 8, lag), sigmas_of(8)

    def weights(sigma: float) -> dict[str, float]:
        return {"cond": 3.0, "uncond": -2.0} if sigma > sigmas[5] else {"cond": 1.0, "uncond": 0.0}

    def made(settings: Settings) -> Engine:
        return build(
            backbone, schedule, settings, guidance=WeightedGuidance({"cond": text(0), "uncond": text(1)}, weights)
        )

    changing = made(Settings(Fixed((0,)), Between(order=1)))
    ours = video(changing)
    expected = [step in (0, 5) for step in range(8)]
    assert all(taken == expected for chunks in changing.report.decisions.values() for taken in chunks.values())
    assert torch.equal(ours, video(made(Settings(Fixed((0, 5)), HELD))))
    later = made(Settings(Fixed((0, 3, 5)), Between(order=1)))
    assert (video(later) - ours).abs().max() > 1e-3
    line = made(Settings(Fixed((0, 3, 5, 6)), Between(order=1)))
    held = made(Settings(Fixed((0, 3, 5, 6)), HELD))
    assert (video(line) - video(held)).abs().max() > 1e-3  # from its second result on the new forecast is a line
