"""What the lab counts: operations as torch counts them, history cuts as the published formula makes them."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowcache_core.demo import load_network
from flowcache_core.demo.captions import TOKENS
from flowcache_core.demo.train_network import CONFIG
from flowcache_core.lab.compression_cost import Stopwatch, cut_cost
from flowcache_core.lab.flops import noted_flops, run_flops, window_flops
from flowcache_core.lab.runs import Clips, Method, chunk_tokens, run
from flowcache_core.lab.setups import Setup
from flowcache_core.settings import Fixed, HistorySettings, Settings
from flowcache_core.solvers.noise_levels import magi
from flowcache_core.solvers.one_step import Euler
from tests.helpers.magi_runs import RUNS, magi_run
from tests.helpers.runs import video

QUICK = Setup("quick", 4, 2, magi, Euler, window=True)


@pytest.fixture(scope="module")
def clips():
    return Clips.held_out(load_network(), 1, 3)


@pytest.mark.parametrize("settings", [Settings(), Settings(Fixed((0, 2)), clean_pass=False)])
def test_flops_are_torchs(clips, settings):
    # The counter does not know attention's fused kernel for the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        outcome = run(Method("counted", settings=settings), QUICK, clips)
    ours = run_flops(clips.backbone, outcome.report, chunk_tokens(clips.backbone), TOKENS, settings.clean_pass)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)
    noted = noted_flops(outcome.report.as_dict(), CONFIG, TOKENS)  # without embeddings and head
    assert 0.97 < noted / counter.get_total_flops() < 1


def test_flops_of_a_window_are_torchs(clips):
    # The counter does not know attention's fused kernel for the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        outcome = run(Method("counted", window=True), QUICK, clips)
    ours = window_flops(clips.backbone, outcome.report.schedule.ticks, 3, chunk_tokens(clips.backbone), 3, TOKENS)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)


@pytest.mark.parametrize("name", ["base", "distill", "gated"])
def test_flops_of_magi_are_torchs(name):
    """Of what twice the steps are more: texts, whose keys come once a run, weigh much in a small network. So do the
    embedding and the head, which the formula leaves out. Texts are of 9 tokens and a few special ones, empty ones of
    50."""
    config = RUNS[name][0]

    def counts(steps: int) -> list[int]:
        engine = magi_run(name, chunks=2, steps=steps)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            video(engine)
        tokens = engine.report.layer_tokens // config.layers
        head = 2 * tokens * config.width * config.patch**2 * config.fed_channels
        least, most = (noted_flops(engine.report.as_dict(), config, text) + head for text in (9, 60))
        embedding = counter.flop_counts["Global"][torch.ops.aten.convolution]
        return [least, counter.get_total_flops() - embedding, most]

    least, counted, most = (many - few for few, many in zip(counts(8), counts(16), strict=True))
    assert least <= counted <= most < 1.2 * least


def test_a_cut_keeps_what_the_formula_written_out_keeps():
    cost = cut_cost(768, repeats=1)
    assert cost.same > 0.999
    assert cost.bytes < cost.bytes_direct / 2


def test_the_stopwatch_sees_every_cut_and_nothing_else(clips):
    longer = Clips(clips.backbone, clips.captions, 4)
    with Stopwatch() as watch:
        run(Method("whole"), QUICK, longer)
    assert watch.seconds == 0
    with Stopwatch() as watch:
        run(Method("cut", settings=Settings(history=HistorySettings(1))), QUICK, longer)
    assert watch.seconds > 0
