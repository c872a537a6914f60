"""The workflows that ship: graphs for the page under titles that its template browser sorts and searches, and the same
graphs in the API's form under the names that programs know."""

from pathlib import Path

from tests.helpers.host.comfy_server import PACK

WORKFLOWS = PACK / "workflows"
API = WORKFLOWS / "api"
DEMO, MODEL = "FlowCache demo ", "FlowCache on "  # titles begin so; demos run with what ships

# By API name: the rest of the title. Of what a search finds a title of fewer words stands first: all but the
# first demo's have more than six.
GRAPHS: dict[str, Path] = {
    name: WORKFLOWS / f"FlowCache {title}.json"
    for name, title in {
        "demo_text_to_video": "demo 1 text to video",
        "demo_long_video": "demo 2 long video with changing prompts",
        "demo_extend": "demo 3 extend a video in two ways",
        "demo_live_prompt": "demo 4 live prompt while it runs",
        "demo_native_sampler": "demo 5 native sampler of ComfyUI",
        "causal_forcing_framewise": "on Causal-Forcing 1.3B frame by frame",
        "causal_forcing_native": "on Causal-Forcing 1.3B with the native sampler",
        "causvid_text_to_video": "on CausVid 1.3B text to video",
        "krea_realtime": "on Krea Realtime 14B text to video",
        "longlive_prompts": "on LongLive 1.3B with changing prompts",
        "longlive_2_shots": "on LongLive 2.0 5B with several shots",
        "longvie_controlled": "on LongVie 2 14B led by depth and tracks",
        "magi_24b_text_to_video": "on MAGI-1 24B text to video",
        "magi_continue_three_prompts": "on MAGI-1 4.5B continue three prompts",
        "magi_image_to_video": "on MAGI-1 4.5B image to video",
        "magi_text_to_video": "on MAGI-1 4.5B text to video",
        "reward_forcing": "on Reward Forcing 1.3B long video",
        "rolling_forcing": "on Rolling Forcing 1.3B long video",
        "self_forcing_text_to_video": "on Self-Forcing 1.3B text to video",
        "experts_image_to_video": "on Self-Forcing Wan 2.2 A14B with two experts",
        "skyreels_14b_text_to_video": "on SkyReels-V2 14B text to video",
        "skyreels_extend": "on SkyReels-V2 1.3B extend a video",
        "skyreels_image_to_video": "on SkyReels-V2 1.3B image to video",
        "skyreels_long_video": "on SkyReels-V2 1.3B long video from text",
        "skyreels_paper": "on SkyReels-V2 1.3B with the published rule",
        "skyreels_text_to_video": "on SkyReels-V2 1.3B text to video",
        "skyreels_windows": "on SkyReels-V2 1.3B video in windows",
    }.items()
}
TITLES = sorted((path.stem for path in GRAPHS.values()), key=str.lower)
