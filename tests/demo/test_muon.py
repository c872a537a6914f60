"""Muon in float32 takes torch's own steps, which are in bfloat16."""

import torch

from flowcache_core.demo.muon import Muon


def test_it_takes_the_steps_of_torchs_own():
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 16), (16, 24), (16, 16), (16, 16)]
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([torch.nn.Parameter(weight.clone()) for weight in start] for _ in range(2))
    optimizers = [
        Muon(ours, lr=0.1, weight_decay=0.01, momentum=0.95),
        torch.optim.Muon(theirs, lr=0.1, weight_decay=0.01, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(3):
        gradients = [torch.randn(shape, generator=generator) for shape in shapes]
        for weights, optimizer in zip((ours, theirs), optimizers, strict=True):
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient.clone()
            optimizer.step()
    for one, other, before in zip(ours, theirs, start, strict=True):
        assert (one - before).norm() > 0.1
        assert (one - other).norm() < 0.03 * (other - before).norm()
