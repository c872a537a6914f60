"""Who waits for whom while a run is streamed: the host, the network's stream and the one beside it, by given times.

The streams do not slow each other down here. On a card that one of them fills they share it, and a decode's own time is
added to the chunk's whatever the order; what is told here is what waiting costs on top, or saves elsewhere.
"""

from typing import Literal

Way = Literal["in order", "host waits", "beside"]
CHUNKS = 51  # that are gone through; all but the last are decoded


def late(tick: float, ticks: int, decode: float, way: Way) -> float:
    """Seconds that a chunk takes longer because the one before it is decoded; the mean of a long run.

    The host gives a chunk to be decoded when the next tick has been enqueued, and is at most one tick ahead of the
    network.

    Args:
        tick: seconds of one on the device.
        ticks: of a chunk.
        decode: seconds of a chunk's decode on the device.
        way: "in order", on the network's own stream; "host waits", on a stream of its own until whose end the host
            waits; "beside", where the host waits for it when the next chunk is finished.
    """
    host = network = beside = begun = 0.0  # when each is free, and when the last tick began
    finished: float | None = None  # when the chunk was that waits for its decode
    for number in range(1, ticks * CHUNKS + 1):
        host = max(host, begun)
        begun = max(host, network)
        network = begun + tick
        if finished is not None:
            if way == "in order":
                host = network = network + decode
            elif way == "host waits":
                host = beside = max(finished, beside) + decode
            else:
                host = max(host, beside)
                beside = max(finished, beside) + decode
        finished = network if number % ticks == 0 else None
    return max(0.0, (network - ticks * CHUNKS * tick) / (CHUNKS - 1))
