"""What the lab counts: operations as torch counts them, history cuts as the published formula makes them."""

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flowcache_core.demo import load_network
from flowcache_core.demo.captions import TOKENS
from flowcache_core.lab.compression_cost import Stopwatch, cut_cost
from flowcache_core.lab.flops import run_flops, window_flops
from flowcache_core.lab.runs import Clips, Method, chunk_tokens, run
from flowcache_core.lab.setups import Setup
from flowcache_core.settings import Fixed, HistorySettings, Settings
from flowcache_core.solvers.noise_levels import magi
from flowcache_core.solvers.one_step import Euler

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


def test_flops_of_a_window_are_torchs(clips):
    # The counter does not know attention's fused kernel for the CPU.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        outcome = run(Method("counted", window=True), QUICK, clips)
    ours = window_flops(clips.backbone, outcome.report.schedule.ticks, 3, chunk_tokens(clips.backbone), 3, TOKENS)
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.01)


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
