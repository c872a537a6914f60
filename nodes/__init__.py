"""The pack's nodes, as ComfyUI asks for them."""

from comfy_api.latest import ComfyExtension, io

from .ar_sampler import ARSamplerNode
from .calibrate import Calibrate
from .comfyui.input_checks import checked
from .comfyui.live_route import listen
from .comfyui.outputs import run_streams
from .comfyui.states import register_folder
from .compare_videos import CompareVideos
from .demo_prompt import DemoPrompt
from .extend import AutoregressiveExtend
from .extend_windows import ExtendInWindows
from .flowcache import FlowCache
from .live_prompt import LivePromptNode
from .load_demo_vae import LoadDemoVAE
from .load_magi_vae import LoadMagiVAE
from .load_model import LoadARVideoModel
from .load_state import LoadState
from .longvie_control import LongVieControl
from .magi_prompt import MagiPrompt
from .over_gpus import FlowCacheOverGPUs
from .prompts_over_time import PromptsOverTime
from .read_video import ReadVideo
from .report import FlowCacheReport
from .resume import Resume
from .save_embedding import SaveEmbedding
from .save_state import SaveState
from .save_video import SaveVideo
from .stream_video import StreamVideo
from .two_experts import TwoExperts


class FlowCacheExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        nodes = [
            LoadARVideoModel,
            LoadDemoVAE,
            LoadMagiVAE,
            DemoPrompt,
            MagiPrompt,
            PromptsOverTime,
            LivePromptNode,
            LongVieControl,
            TwoExperts,
            FlowCache,
            FlowCacheOverGPUs,
            Calibrate,
            AutoregressiveExtend,
            ExtendInWindows,
            StreamVideo,
            Resume,
            SaveState,
            LoadState,
            SaveEmbedding,
            ARSamplerNode,
            FlowCacheReport,
            SaveVideo,
            CompareVideos,
            ReadVideo,
        ]
        return [checked(node) for node in nodes]


async def comfy_entrypoint() -> FlowCacheExtension:
    run_streams()
    listen()
    register_folder()
    return FlowCacheExtension()
