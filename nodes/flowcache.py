"""FlowCache: patches a model."""

from dataclasses import replace

from comfy_api.latest import io

from ..flowcache_core.models.families import family_preset, fitted
from ..flowcache_core.models.presets import DEFAULT_PRESET, PRESETS, quality_settings
from ..flowcache_core.settings import Between, Compression, Drift, Every, HistorySettings, Settings
from .comfyui import patch as host
from .comfyui.widgets import advanced, found_by

CUSTOM, QUALITY = "custom", "quality"


class FlowCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="FlowCache",
            display_name="FlowCache",
            category="FlowCache",
            description="Makes an autoregressive video model faster without training: each chunk reuses its own last "
            "results where little changes, and the attention history is kept within a budget. Works with "
            "Autoregressive Extend, AR Sampler (FlowCache) and ComfyUI's SamplerARVideo. Bypass it to get the plain "
            "model back.",
            **found_by("cache", "speed up", "teacache", "easycache", "kv cache", "faster video"),
            inputs=[
                io.Model.Input(
                    "model", tooltip="An autoregressive video model: causal Wan, SkyReels-V2, MAGI-1, the demo model."
                ),
                io.Combo.Input(
                    "preset",
                    options=[*PRESETS, CUSTOM, QUALITY],
                    default=DEFAULT_PRESET,
                    tooltip="How much is reused: 'high' stays closest to the plain result, 'fast' is quickest. 'paper "
                    "slow' and 'paper fast' are the published rule. 'custom' takes the advanced inputs below, "
                    "'quality' the knob of that name.",
                ),
                io.Int.Input(
                    "history_budget",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="How many finished chunks the model may look back on; what goes is chosen by "
                    "importance and redundancy. 0 keeps all of them, so memory grows with the length of the video.",
                ),
                advanced(
                    io.Combo.Input(
                        "policy",
                        options=["even", "flowcache", "teacache"],
                        default="even",
                        tooltip="Only with preset 'custom'. even: recompute every n-th step; flowcache: when a "
                        "chunk's own input has drifted past the threshold; teacache: one decision for all active "
                        "chunks.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "every",
                        default=8,
                        min=1,
                        max=64,
                        tooltip="Only with policy 'even': recompute every n-th step. Lowered to a divisor of the lag.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "threshold",
                        default=0.1,
                        min=0.0,
                        max=10.0,
                        step=0.001,
                        round=0.0001,
                        tooltip="Only with policies 'flowcache' and 'teacache': drift (accumulated relative change) at "
                        "which a step is recomputed. Higher is faster and less exact.",
                    )
                ),
                advanced(
                    io.Int.Input(
                        "warmup",
                        default=1,
                        min=1,
                        max=64,
                        tooltip="Only with preset 'custom': first steps of every chunk that are always recomputed.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "forecast",
                        options=["hold", "linear", "quadratic"],
                        default="linear",
                        tooltip="Only with preset 'custom': what stands in for a step that is not recomputed: the last "
                        "result as it is, or a line or parabola through the last two or three.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "granularity",
                        options=["token", "frame", "chunk"],
                        default="frame",
                        tooltip="What the history drops at a time when it is over budget. The paper drops tokens; on "
                        "the demo model whole frames lose less.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "importance_weight",
                        default=0.15,
                        min=0.0,
                        max=1.0,
                        step=0.01,
                        tooltip="Lambda: a history token's score is lambda x importance - (1 - lambda) x redundancy. "
                        "The paper uses 0.07.",
                    )
                ),
                advanced(
                    io.Boolean.Input(
                        "keep_first_chunk",
                        default=True,
                        tooltip="The first chunk always stays in the history (an attention sink), if the budget is "
                        "more than one chunk.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "positions",
                        options=["absolute", "relative"],
                        default="absolute",
                        tooltip="relative: positions count from the start of the history window, so that a run of any "
                        "length only uses positions the model was trained on. Needs a history budget.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "history_rule",
                        options=["flowcache", "window"],
                        default="flowcache",
                        tooltip="What stays in a history over budget. flowcache: the tokens that score best; window: "
                        "the newest chunks, as Self-Forcing's local_attn_size keeps them (with keep_first_chunk as "
                        "its sink).",
                    )
                ),
                advanced(
                    io.Boolean.Input(
                        "correct",
                        default=True,
                        tooltip="Only with preset 'custom': once a step is recomputed, take the reused steps before "
                        "it again with what is known now. It costs no forward; the published rule does without.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "quality",
                        default=0.5,
                        min=0.0,
                        max=1.0,
                        step=0.05,
                        tooltip="Only with preset 'quality': how alike the result is to the plain one. 0.2 draft, 0.5 "
                        "balanced (38 dB), 0.8 high, 1 every step recomputed. Calibrate FlowCache makes it exact for "
                        "your model.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "history_memory",
                        options=["auto", "system"],
                        default="auto",
                        tooltip="Where the history lives. auto: on the graphics card, its oldest chunks in system "
                        "memory from when that runs out; system: all of it in system memory from the start, which is "
                        "slower. The result is the same.",
                    )
                ),
                advanced(
                    io.Boolean.Input(
                        "overlap",
                        default=True,
                        tooltip="On NVIDIA and AMD cards: finished chunks are copied, decoded and written, and history "
                        "in system memory is brought back, while the model runs, on a stream of its own. The result "
                        "is the same; turn it off if a driver misbehaves.",
                    )
                ),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(
        cls,
        model,
        preset: str,
        history_budget: int,
        policy: str = "even",
        every: int = 8,
        threshold: float = 0.1,
        warmup: int = 1,
        forecast: str = "linear",
        granularity: str = "frame",
        importance_weight: float = 0.15,
        keep_first_chunk: bool = True,
        positions: str = "absolute",
        history_rule: str = "flowcache",
        correct: bool = True,
        quality: float = 0.5,
        history_memory: str = "auto",
        overlap: bool = True,
    ) -> io.NodeOutput:
        compression = Compression(
            rule=history_rule, weight=importance_weight, granularity=granularity, protect_first=keep_first_chunk
        )
        history = HistorySettings(
            history_budget or None, compression, relative=positions == "relative", memory=history_memory
        )
        family, width = host.family_of(model), getattr(model.model.diffusion_model, "dim", 0)
        if preset == CUSTOM:
            if policy == "even":
                reuse = Every(every, warmup=warmup)
            else:
                reuse = fitted(Drift(threshold, warmup, whole_window=policy == "teacache"), family, width)
            order = ("hold", "linear", "quadratic").index(forecast)
            settings = Settings(reuse, Between(order, correct), history)
        elif preset == QUALITY:
            settings = replace(quality_settings(quality, host.calibration_of(model)), history=history)
        else:
            settings = family_preset(preset, family, width, history)
        budget = f"history budget {history_budget} chunks" if history_budget else "whole history"
        settings = replace(settings, overlap=overlap)
        return io.NodeOutput(host.patched(model, settings, f"FlowCache {preset}, {budget}"))
