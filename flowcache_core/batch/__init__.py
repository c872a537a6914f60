"""Many videos on many machines: jobs of one workflow, run by workers that keep a ComfyUI each."""
