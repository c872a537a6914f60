"""Interrupts at random moments and many prompts at once; soak.py as a script does more of both."""

import time

import pytest
import torch

from tests.helpers.host.mixed_prompts import GOOD, anew, interrupted, latent, plain, prepare, wait_for
from tests.host.soak import Usage, check_interrupts


@pytest.fixture(scope="module", autouse=True)
def network(server):
    prepare(server)


def test_after_an_interrupt_at_any_moment_the_next_prompt_is_right_to_the_bit(server):
    assert check_interrupts(server, 8) > 0


def test_twenty_prompts_queued_at_once(server):
    alone = {seed: latent(server, server.run(plain(seed))) for seed in (300, 319)}
    kinds = [plain] + [GOOD[number % len(GOOD)] for number in range(1, 19)] + [plain]
    queued = [server.post("/prompt", {"prompt": make(300 + number)})["prompt_id"] for number, make in enumerate(kinds)]
    assert wait_for(server, queued) == ["success"] * 20
    for seed, expected in alone.items():
        assert torch.equal(latent(server, server.run(anew(plain(seed), 1))), expected)


def test_interrupted_and_repeated_prompts_leave_no_thread_or_file(server):
    latent(server, server.run(plain(1)))
    before = Usage.of(server)
    for seed in range(400, 404):
        interrupted(server, plain(seed), 12)
    latent(server, server.run(plain(404)))
    deadline = time.monotonic() + 10  # connections close a little later
    while (after := Usage.of(server)).files > before.files and time.monotonic() < deadline:
        time.sleep(0.2)
    assert (after.threads, after.temporary) == (before.threads, before.temporary)
    assert after.files <= before.files
