"""The clean history in 8 and 4 bits."""

from dataclasses import replace

import pytest
import torch

from flowcache_core import demo, generate, preset
from flowcache_core.errors import UserError
from flowcache_core.history.quantised import packing_of
from flowcache_core.settings import OFF, HistorySettings
from tests.history.test_compression import draw

TYPES = ("int8", "int4")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [24, 64, 128])
@pytest.mark.parametrize(("kind", "signal"), [("int8", 39), ("int4", 18)])
def test_what_was_widened_is_packed_to_the_same_bytes(kind, signal, width, dtype):
    x = (3 * draw(2, 3, 50, width) * draw(2, 3, 50, 1, seed=1)).to(dtype)
    x[0, 0, 0] = 0
    packing = packing_of(kind, width)
    packed = packing.pack(x)
    wide = packing.unpack(packed, torch.empty_like(x))
    assert packed.shape == (2, 3, 50, packing.bytes)
    assert torch.equal(packing.pack(wide), packed)
    assert 10 * torch.log10(x.float().square().mean() / (x - wide).float().square().mean()) > signal


def test_bytes_of_a_heads_numbers():
    assert packing_of("as computed", 128) is None
    assert packing_of("int8", 128).bytes == 130 and packing_of("int4", 128).bytes == 72  # of 256 in bfloat16


def made(kind: str, chunks: int = 4, budget: int | None = None, relative: bool = False, lag: int = 4, **more):
    history = HistorySettings(budget, relative=relative, type=kind)
    settings = replace(preset(more.pop("name", "fast")), history=history)
    text = demo.embed_caption("a red circle and a blue square")
    return generate(demo.load_network(), text, chunks, settings=settings, steps=16, lag=lag, **more)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("budget", [None, 2])
def test_a_run_goes_on_with_the_same_bits(kind, budget):
    whole = made(kind, 4, budget, lag=16).latents
    first = made(kind, 3, budget, lag=16)
    assert torch.equal(made(kind, 1, budget, lag=16, state=first.state).latents, whole)


@pytest.mark.parametrize("lag", [4, 16])
def test_positions_relative_to_the_window(lag):
    found = [made(kind, 5, 2, relative=True, lag=lag).latents for kind in ("as computed", "int8")]
    assert (found[0] - found[1]).square().mean() < 0.01 * found[0].square().mean()


@pytest.mark.parametrize(("kind", "share"), [("int8", 0.27), ("int4", 0.15)])
def test_stored_bytes(kind, share):
    """Of float32 here: a quarter and an eighth, with scales and the tokens' numbers."""
    plain, packed = (made(each, 2).report for each in ("as computed", kind))
    assert packed.history_bytes_planned == packed.history_bytes_allocated
    scratch = packed.history_bytes_planned - share * plain.history_bytes_planned
    assert 0 < scratch < 0.3 * plain.history_bytes_planned  # one layer of eight, with room for active chunks


def test_chunks_that_recompute_on_ticks_of_their_own_are_refused():
    with pytest.raises(UserError, match="A history in int8 needs chunks that recompute on the same ticks"):
        made("int8", name="paper fast")


def test_quantising_changes_little():
    plain, eight, four = (made(kind, 3).latents for kind in ("as computed", *TYPES))
    assert not torch.equal(plain, eight)
    off = [(each - plain).square().mean() / plain.square().mean() for each in (eight, four)]
    assert off[0] < off[1] < 0.02


def test_one_chunk_at_a_time():
    """Few-step models, where every chunk is cut and stored on its own."""
    settings = replace(OFF, history=HistorySettings(2, type="int8"))
    text = demo.embed_caption("a red circle")
    result = generate(demo.load_network(), text, 5, settings=settings, steps=4, lag=4)
    assert result.latents.isfinite().all()
    assert result.report.history_bytes_planned == result.report.history_bytes_allocated
