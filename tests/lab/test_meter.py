"""What the meter counts, on cases that one can work out by hand."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from flowcache_core.lab.meter import READ_NUMBER, Kernel, Meter, Work, in_layers
from flowcache_core.lab.roofline import LAUNCH, OF_MEMORY, RTX_4090, seconds


def meta(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


X = meta(2, 100, 64)


def counted(work) -> Work:
    """Done twice, because what is known of an operation is not worked out again: both must count the same."""
    meter = Meter()
    with torch.inference_mode(), meter:
        work()
        once = meter.take()[""]
        work()
    assert meter.take()[""] == once
    return once


@pytest.mark.parametrize(
    ("work", "launches", "moved"),
    [
        (lambda: X.transpose(0, 1).unflatten(-1, (8, 8))[:, :3].unsqueeze(0), 0, 0),
        (lambda: X.reshape(200, 64), 0, 0),
        (lambda: X.transpose(0, 1).reshape(200, 64), 1, 2 * 25600),
        (lambda: torch.empty_like(X), 0, 0),
        (lambda: X.to(torch.bfloat16), 0, 0),
        (lambda: X.float(), 1, 25600 + 51200),
        (lambda: X + 1, 1, 2 * 25600),
        (lambda: X + X, 1, 2 * 25600),  # read once
        (lambda: X + meta(2, 1, 64), 1, 2 * 25600 + 256),
        (lambda: X + meta(2, 1, 64).expand(2, 100, 64), 1, 2 * 25600 + 256),
        (lambda: meta(2, 100, 64).add_(meta(2, 100, 64)), 1, 3 * 25600),
        (lambda: meta(2, 100, 64).copy_(meta(2, 1, 64)), 1, 25600 + 256),
        (lambda: meta(2, 100, 64)[:, :3].fill_(0.0), 1, 2 * 2 * 3 * 64),
        (lambda: torch.cat([X, meta(2, 10, 64)], dim=1), 1, 2 * (25600 + 2560)),
        (lambda: X.gather(1, meta(2, 10, 64, dtype=torch.int64)), 1, 2 * 2560 + 8 * 1280),
        (lambda: torch.full((4,), 0.5, device="meta"), 1, 16),
        (lambda: F.rms_norm(X, (64,), meta(64), 1e-6), 1, 2 * 25600 + 128),
        (lambda: F.layer_norm(X.transpose(0, 1), (64,)), 2, 4 * 25600 + 2 * 200 * 4),
        (lambda: torch.ones(3) + 1, 0, 0),  # the host's
    ],
)
def test_elementwise_work(work, launches, moved):
    found = counted(work)
    assert (found.launches, found.bytes, found.flops, found.read_backs) == (launches, moved, 0, 0)


@pytest.mark.parametrize(
    ("work", "bits", "flops", "moved"),
    [
        (lambda: X.float() @ meta(64, 32, dtype=torch.float32), 32, 2 * 200 * 64 * 32, 4 * (12800 + 2048 + 6400)),
        (lambda: F.linear(X, meta(32, 64), meta(32)), 16, 2 * 200 * 64 * 32, 2 * (12800 + 2048 + 32 + 6400)),
        (lambda: X @ X.transpose(1, 2), 16, 2 * 2 * 100 * 100 * 64, 2 * (2 * 12800 + 20000)),
        (
            lambda: torch._scaled_mm(
                meta(32, 64, dtype=torch.float8_e4m3fn),
                meta(16, 64, dtype=torch.float8_e4m3fn).t(),
                torch.empty((), device="meta"),
                torch.empty((), device="meta"),
                out_dtype=torch.bfloat16,
            ),
            8,
            2 * 32 * 64 * 16,
            32 * 64 + 16 * 64 + 8 + 2 * 32 * 16,
        ),
    ],
)
def test_products_are_kept_apart_by_width(work, bits, flops, moved):
    products = counted(work).only("product")
    assert (products.launches, products.flops_by_bits, products.bytes) == (1, {bits: flops}, moved)


def test_attention_is_one_launch_and_keeps_its_queries_layout():
    meter = Meter()
    q, k = meta(1, 10, 4, 8).transpose(1, 2), meta(1, 2, 30, 8)
    with meter:
        answer = meter.attention(q, k, k)
    assert (answer.shape, answer.stride()) == (q.shape, q.stride())
    assert meter.work.kernels == {Kernel("attention", "attention", 16, 4 * 4 * 10 * 30 * 8, 2 * (2 * 320 + 2 * 480)): 1}


def test_reads_make_the_host_wait():
    meter = Meter()
    with torch.inference_mode(), meter:
        assert X.sum().item() == READ_NUMBER
        assert X[0, 0, :1].tolist() == [pytest.approx(READ_NUMBER, rel=0.01)]  # in bfloat16
        assert X.cpu().device.type == "cpu"
        assert X.to("meta") is X
    assert meter.work.read_backs == 3


def test_parts_are_counted_apart_and_taken_once():
    meter = Meter()
    with meter:
        X + 1
        with meter.part("cut"):
            X * 2, X * 3
    assert {name: work.launches for name, work in meter.take().items()} == {"": 1, "cut": 2}
    assert {name: work.launches for name, work in meter.take().items()} == {"": 0}


def test_memory_is_a_storages_as_long_as_someone_holds_it():
    meter = Meter()
    with torch.inference_mode(), meter:
        whole = torch.empty(100, device="meta")
        part = whole[:10]
        del whole
        assert meter.alive == 400
        (part + 1).sum()
        assert (meter.alive, meter.peak) == (400, 400 + 40 + 4)
        meter.reset_peak()
        del part
        assert (meter.alive, meter.peak) == (0, 400)


def test_memory_inside_a_compound_operation_counts_each_time():
    for _ in range(2):
        meter = Meter()
        with torch.inference_mode(), meter:
            F.max_pool1d(meta(1, 1, 100), 7, stride=1, padding=3)
        assert meter.peak == 200 + 200 + 800  # input, output and where each maximum was


def test_what_is_done_once_counts_again_under_the_same_key():
    meter, calls = Meter(), []

    def work() -> list[torch.Tensor]:
        calls.append(0)
        return [X + 1 + 2]

    counts = []
    with torch.inference_mode(), meter:
        for key in ("a", "a", "b"):
            meter.reset_peak()
            (made,) = meter.once((calls.append, key), work)
            counts.append((made.shape, made.dtype, meter.take()[""].launches, meter.peak))
            del made
    assert counts == [(X.shape, X.dtype, 2, 2 * X.nbytes)] * 3
    assert len(calls) == 2


def test_layers_are_extrapolated():
    fixed, layer = Kernel("elementwise", "add", 16, 0, 10), Kernel("product", "mm", 16, 100, 20)
    one, two = (Work(Counter({fixed: 3, layer: layers})) for layers in (1, 2))
    assert in_layers(one, two, 30).kernels == {fixed: 3, layer: 30}
    assert (two - two).kernels == {}
    assert (two * 2 - one).flops == 300


def test_a_launch_takes_the_longest_of_what_it_needs():
    small, large = (Work(Counter({Kernel("elementwise", "add", 16, 0, size): 2})) for size in (8, 10**9))
    product = Work(Counter({Kernel("product", "mm", 16, 10**12, 8): 1}))
    assert seconds(small, RTX_4090) == 2 * LAUNCH
    assert seconds(large, RTX_4090) == pytest.approx(2 / (OF_MEMORY * RTX_4090.gigabytes))
    assert seconds(product, RTX_4090) == pytest.approx(1 / (0.7 * 165.2))
