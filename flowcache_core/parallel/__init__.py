"""One video over several GPUs, on torch.distributed; many videos over several machines, on Ray. Nothing of it is
imported unless it is asked for."""
