"""FlowCache: patches a model."""

from dataclasses import replace

from comfy_api.latest import io

from ..flowcache_core.checkpoints import wan_families
from ..flowcache_core.models.families import family_preset, fitted
from ..flowcache_core.models.presets import DEFAULT_PRESET, PAPER_PRESETS, PRESETS, quality_notes, quality_settings
from ..flowcache_core.settings import (
    HISTORY_RULES,
    HISTORY_TYPES,
    Between,
    Compression,
    Drift,
    Every,
    Settings,
    bounded_history,
)
from .comfyui import patch as host
from .comfyui.progress import say
from .comfyui.widgets import advanced, schema

CUSTOM, QUALITY = "custom", "quality"  # presets
FORECASTS = ["hold", "linear", "quadratic"]  # by order


class FlowCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FlowCache",
            inputs=[
                io.Model.Input("model"),
                io.Combo.Input("preset", options=[*PRESETS, CUSTOM, QUALITY], default=DEFAULT_PRESET),
                io.Int.Input("history_budget", default=0, min=0, max=1000),
                advanced(io.Combo.Input("policy", options=["even", "flowcache", "teacache"], default="even")),
                advanced(io.Int.Input("every", default=8, min=1, max=64)),
                advanced(io.Float.Input("threshold", default=0.1, min=0.0, max=10.0, step=0.001, round=0.0001)),
                advanced(io.Int.Input("warmup", default=1, min=1, max=64)),
                advanced(io.Combo.Input("forecast", options=FORECASTS, default="linear")),
                advanced(io.Combo.Input("granularity", options=["token", "frame", "chunk"], default="frame")),
                advanced(io.Float.Input("importance_weight", default=0.15, min=0.0, max=1.0, step=0.01)),
                advanced(io.Boolean.Input("keep_first_chunk", default=True)),
                advanced(io.Combo.Input("positions", options=["absolute", "relative"], default="absolute")),
                advanced(io.Combo.Input("history_rule", options=list(HISTORY_RULES), default="flowcache")),
                advanced(io.Boolean.Input("correct", default=True)),
                advanced(io.Float.Input("quality", default=0.5, min=0.0, max=1.0, step=0.05)),
                advanced(io.Combo.Input("history_memory", options=["auto", "system"], default="auto")),
                advanced(io.Boolean.Input("overlap", default=True)),
                advanced(io.Combo.Input("family", options=["auto", *wan_families()], default="auto")),
                advanced(io.Int.Input("queries", default=Compression.queries, min=0, max=1_000_000)),
                advanced(io.Combo.Input("asked_from", options=["spread", "last"], default="spread")),
                advanced(io.Combo.Input("history_type", options=["auto", *HISTORY_TYPES], default="auto")),
                advanced(io.Int.Input("window_frames", default=0, min=0, max=1000)),
                advanced(io.Int.Input("sink_frames", default=0, min=0, max=1000)),
                advanced(io.Float.Input("sink_share", default=1.0, min=0.001, max=1.0, step=0.001, round=0.0001)),
            ],
            outputs=[io.Model.Output()],
            found_by=("cache", "speed up", "teacache", "easycache", "kv cache", "faster video"),
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def execute(
        cls, model, preset, history_budget, policy, every, threshold, warmup, forecast, granularity, importance_weight,
        keep_first_chunk, positions, history_rule, correct, quality, history_memory, overlap, family,
        queries, asked_from, history_type, window_frames, sink_frames, sink_share,
    ) -> io.NodeOutput:  # fmt: skip
        compression = Compression(
            weight=importance_weight, granularity=granularity, protect_first=keep_first_chunk, queries=queries,
            asked_from=asked_from,
        )  # fmt: skip
        history = bounded_history(
            history_budget or None, window_frames or None, sink_frames, compression, sink_share=sink_share,
            rule=history_rule, relative=positions == "relative", memory=history_memory,
            type=HISTORY_TYPES[0] if history_type == "auto" else history_type,
        )  # fmt: skip
        model, notes = host.with_family(model, family, cls.hidden)
        say(notes)
        family, width = host.family_of(model), getattr(model.model.diffusion_model, "dim", 0)
        if preset == CUSTOM:
            if policy == "even":
                reuse = Every(every, warmup=warmup)
            else:
                reuse = fitted(Drift(threshold, warmup, whole_window=policy == "teacache"), family, width)
            settings = Settings(reuse, Between(FORECASTS.index(forecast), correct), history)
        elif preset == QUALITY:
            calibration = host.calibration_of(model)
            settings = replace(quality_settings(quality, calibration), history=history)
            told = quality_notes(quality, calibration)
            say(told)
            notes += told
        else:
            settings = family_preset(preset, family, width, history)
        budget = history.size_words
        if history_budget and preset in PAPER_PRESETS:
            budget += ", cut as published"
        settings = replace(settings, overlap=overlap)
        return io.NodeOutput(host.patched(model, settings, f"FlowCache {preset}, {budget}", notes))
