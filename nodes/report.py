"""FlowCache Report."""

import json

import numpy as np
import torch
from comfy_api.latest import io

from ..flowcache_core.errors import UserError
from ..flowcache_core.media.pictures import report_picture
from .comfyui import patch as host
from .comfyui.types import ReportType
from .comfyui.widgets import schema


class FlowCacheReport(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            "FlowCacheReport",
            inputs=[
                ReportType.Input("report", optional=True),
                io.Model.Input("model", optional=True),
                io.Latent.Input("latent", optional=True),
            ],
            outputs=[io.String.Output(display_name="text"), io.Image.Output(display_name="image")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, report, model, latent) -> io.NodeOutput:
        if report is None:
            report = _find(model, latent)
        picture = np.asarray(report_picture(report).convert("RGB"), dtype=np.float32) / 255.0
        text = report.text()
        numbers = json.dumps(report.as_dict())  # for who asks over the API
        return io.NodeOutput(text, torch.from_numpy(picture)[None], ui={"text": (text,), "report": (numbers,)})


def _find(model, latent):
    if model is None or latent is None:
        raise UserError(
            "Nothing to report on: connect the report of Autoregressive Extend, or both the model patched by a "
            "FlowCache node and the latent that was sampled with it."
        )
    patch = host.patch_of(model.model_options)
    if patch is None:
        raise UserError(
            "The model was not patched by a FlowCache node (or the node is bypassed); connect the patched model."
        )
    report = patch.reports.get(host.fingerprint(latent["samples"]))
    if report is None:
        raise UserError(
            "This latent was not sampled with this patched model, or too long ago; connect the latent that comes out "
            "of the sampler, and queue again."
        )
    return report
