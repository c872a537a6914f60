"""Measuring: FlowCache and its peers on the same clips. Nothing of it is needed to generate a video."""
