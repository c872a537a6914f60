"""A chunk's noise depends on the seed and its place alone."""

import pytest
import torch

from flowcache_core import demo, generate, preset
from flowcache_core.solvers.one_step import START, chunk_noise

SHAPE = (1, 16, 3, 8, 8)


@pytest.fixture(params=[torch.float64, torch.bfloat16])
def usual_dtype(request):
    """Another package has changed torch's usual type."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


EXPECTED = {place: chunk_noise(7, *place) for place in ((0, SHAPE), (3, SHAPE), (0, SHAPE, 2))}


def test_the_same_whatever_is_usual(usual_dtype):
    for place, expected in EXPECTED.items():
        drawn = chunk_noise(7, *place)
        assert drawn.dtype == torch.float32 and drawn.is_contiguous() and torch.equal(drawn, expected)


def test_seeds_keep_their_numbers():
    """A step's are those of ComfyUI's own sampler; a start's have stood since the first release."""
    torch.manual_seed(7 + 3 * 1000 + 2)
    assert torch.equal(chunk_noise(7, 3, SHAPE, 2), torch.randn(SHAPE))
    torch.manual_seed(7 * 1_000_003 + 3 * 1009)
    assert torch.equal(chunk_noise(7, 3, SHAPE, START), torch.randn(SHAPE))
    first = chunk_noise(0, 0, (4,)).tolist()
    assert first == pytest.approx([1.5409961, -0.2934289, -2.1787894, 0.5684313], abs=1e-6)


def test_large_seeds():
    """Torch's generator on the CPU takes the low 32 bits alone."""
    assert torch.equal(chunk_noise(2**64 - 1, 5, SHAPE), chunk_noise(2**64 - 1, 5, SHAPE))
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in (5, 5 + 2**32)]
    assert torch.equal(*(torch.randn(9, generator=one) for one in generators))


def test_a_bfloat16_run_starts_from_the_same_noise():
    """Up to its rounding: the noise is not drawn in the run's own type."""
    starts = []

    def noise(chunk, step):
        starts.append(chunk_noise(3, chunk, (1, 16, 3, 8, 8)))
        return starts[-1]

    backbone, text = demo.load_network(), demo.embed_caption("a red circle")
    own = generate(backbone, text, 1, steps=2, settings=preset("off"), seed=3).latents
    given = generate(backbone, text, 1, steps=2, settings=preset("off"), noise=noise).latents
    assert torch.equal(own, given) and starts[0].dtype == torch.float32
