"""How long counted work takes at least on a card, from its published rates: an estimate, not a measurement.

Each launch takes the longest of its arithmetic, its memory traffic and the launch itself; launches follow one another.
Rates are dense, with float32 sums (NVIDIA's Ada and H100 white papers; float32 products without TF32).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from .meter import Work

OF_PRODUCTS, OF_ATTENTION, OF_MEMORY = 0.7, 0.6, 0.8  # shares of the published rates that good kernels reach
BESIDE = 1.0  # GiB that CUDA and a desktop take
LINK = 20e9  # bytes a second from system memory over PCIe 4.0, for weights and history that live there
LAUNCH = 4e-6  # seconds that a launch takes at least, with what Python does for it


@dataclass(frozen=True)
class Card:
    """A graphics card.

    Attributes:
        memory: GiB.
        teraflops: by the width of a product's inputs in bits.
        gigabytes: a second, of its memory.
    """

    name: str
    memory: int
    teraflops: Mapping[int, float]
    gigabytes: float


def _ada(name: str, memory: int, float32: float, gigabytes: float) -> Card:
    """Consumer cards of one kind: 16 bit at twice the rate of float32, 8 bit at four times."""
    return Card(name, memory, {32: float32, 16: 2 * float32, 8: 4 * float32}, gigabytes)


RTX_4060, RTX_4070 = _ada("RTX 4060", 8, 15.1, 272), _ada("RTX 4070", 12, 29.1, 504)
RTX_4080, RTX_4090 = _ada("RTX 4080", 16, 48.7, 717), _ada("RTX 4090", 24, 82.6, 1008)
H100 = Card("H100 SXM", 80, {32: 66.9, 16: 989.0, 8: 1979.0}, 3350)
CONSUMER = (RTX_4060, RTX_4070, RTX_4080, RTX_4090)


def seconds(work: Work, card: Card) -> float:
    """Estimates how long a card takes."""
    total = 0.0
    for kernel, times in work.kernels.items():
        share = OF_ATTENTION if kernel.kind == "attention" else OF_PRODUCTS
        arithmetic = kernel.flops / (share * 1e12 * card.teraflops[kernel.bits]) if kernel.flops else 0.0
        total += times * max(LAUNCH, arithmetic, kernel.bytes / (OF_MEMORY * 1e9 * card.gigabytes))
    return total


def assumptions() -> str:
    """Says what the estimate stands on."""
    cards = "; ".join(
        f"{card.name} ({card.memory} GB): {card.teraflops[16]:.0f} TFLOPS in 16 bit, {card.teraflops[32]:.0f} in "
        f"32 bit, {card.gigabytes:.0f} GB/s"
        for card in (*CONSUMER, H100)
    )
    return (
        f"{cards}. Of these rates {OF_PRODUCTS:.0%} are reached in matrix products, {OF_ATTENTION:.0%} in attention, "
        f"{OF_MEMORY:.0%} of the memory's; a launch takes at least {1e6 * LAUNCH:.0f} µs."
    )
