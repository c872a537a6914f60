"""Every family's workflow that ships, end to end on a small random checkpoint: read, generated, decoded, saved.

Only sizes, lengths and step counts are swapped, and the text encoder (6 GB) for captions that need none.
"""

import re

import numpy as np
import pytest

from tests.helpers.host.videos import check_video
from tests.host.test_workflows import difference, prompt_of, saved

pytestmark = pytest.mark.usefixtures("published")

CAPTIONS = ("a red circle", "a blue square", "a white triangle")
FRAMES = {  # latent frames of an image, and of 2 chunks; of 6 where a history is over its budget or window
    "skyreels_text_to_video": 2 * 5,
    "skyreels_image_to_video": 1 + 2 * 5,
    "skyreels_long_video": 6 * 5,
    "skyreels_paper": 2 * 5,
    "skyreels_14b_text_to_video": 2 * 5,
    "self_forcing_text_to_video": 2 * 3,
    "causvid_text_to_video": 2 * 3,
    "causal_forcing_framewise": 1 + 2,
    "reward_forcing": 6 * 3,
    "rolling_forcing": 6 * 3,
    "longlive_prompts": 6 * 3,
    "krea_realtime": 6 * 3,
    "longlive_2_shots": 6 * 8,
    "experts_image_to_video": 1 + 2 * 3,
}
LONGER = (
    "skyreels_long_video",
    "reward_forcing",
    "rolling_forcing",
    "longlive_prompts",
    "krea_realtime",
    "longlive_2_shots",
)


def small(name: str, **inputs) -> dict:
    """A workflow at 64 x 64 with few chunks and steps; `inputs` go to Autoregressive Extend."""
    prompt = prompt_of(name)
    captions = iter(CAPTIONS)
    for key, node in list(prompt.items()):
        if node["class_type"] == "CLIPLoader":
            del prompt[key]
        elif node["class_type"] == "CLIPTextEncode":
            caption = next(captions) if node["inputs"]["text"] else ""
            prompt[key] = {"class_type": "FlowCacheDemoPrompt", "inputs": {"caption": caption}}
        elif node["class_type"] == "FlowCachePromptsOverTime":
            cut = "The scene transitions. " if name == "longlive_2_shots" else ""
            node["inputs"] = {"text": f"0-1: {CAPTIONS[0]}\n2-4: {cut}{CAPTIONS[1]}\n5-: {cut}{CAPTIONS[2]}"}
        elif node["class_type"] == "VAELoader" and "2.2" in node["inputs"]["vae_name"]:
            prompt[key] = {"class_type": "TestDeepVAE", "inputs": {}}
        elif node["class_type"] == "CLIPVisionLoader":
            prompt[key] = {"class_type": "TestImageEncoder", "inputs": {}}
        elif node["class_type"] == "ImageScale":
            node["inputs"] |= {"width": 64, "height": 64}
        elif node["class_type"] == "FlowCacheAutoregressiveExtend":
            sizes = {} if "prefix" in node["inputs"] or "state" in node["inputs"] else {"width": 64, "height": 64}
            few = {"steps": 6} if name.startswith("skyreels") else {}
            few |= {"steps": 6, "frames_per_chunk": 2} if name.startswith("longvie") else {}
            node["inputs"] |= sizes | few | {"chunks": 2} | inputs
        elif node["class_type"] in ("ARVideoI2V", "FlowCacheExtendInWindows"):
            node["inputs"] |= {"width": 64, "height": 64} | inputs
    return prompt


def run(server, prompt: dict):
    outcome = server.run(prompt)
    assert outcome.error is None, outcome.error["exception_message"]
    return outcome


@pytest.mark.parametrize("name", FRAMES)
def test_runs_to_a_video(server, name):
    prompt = small(name, **({"chunks": 6} if name in LONGER else {}))
    outcome = run(server, prompt)
    (key,) = [key for key, node in prompt.items() if node["class_type"] == "SaveVideo"]
    check_video(saved(server, prompt, outcome, prompt[key]["inputs"]["filename_prefix"]), 4 * FRAMES[name] - 3, 64)
    (report,) = [key for key, node in prompt.items() if node["class_type"] == "FlowCacheReport"]
    (text,) = outcome.outputs[report]["text"]
    (extend,) = [key for key, node in prompt.items() if node["class_type"] == "FlowCacheAutoregressiveExtend"]
    told, *_ = [text for key, text in outcome.texts if key == extend]  # before the first step
    size, unit = told.removeprefix("history: ").split(" planned")[0].split()
    assert f"planned {size} {unit}" in text and float(size) > 0
    assert "6 steps, lag 5" in text if name.startswith("skyreels") else "0% of steps reused" in text
    assert ("computed anew for the prompt of chunk 2, 5" in text) == (name == "longlive_prompts")
    assert ("a new shot begins with chunk 2, 5" in text) == (name == "longlive_2_shots")


def test_two_chunks_led_by_videos(server):
    """Each chunk is a video of its own, of 2 latent frames here; other videos lead elsewhere."""
    prompt = small("longvie_controlled")
    video = check_video(saved(server, prompt, run(server, prompt), "flowcache/longvie"), 2 * 5, 64)
    (control,) = [node for node in prompt.values() if node["class_type"] == "FlowCacheLongVieControl"]
    control["inputs"]["sparse"] = control["inputs"]["start"]
    assert "sparse control video has 1 frame" in server.run(prompt).error["exception_message"]
    (image,) = [key for key, node in prompt.items() if node["class_type"] == "LoadImage"]
    prompt["many"] = {"class_type": "RepeatImageBatch", "inputs": {"image": [image, 0], "amount": 10}}
    control["inputs"]["sparse"] = ["many", 0]
    other = check_video(saved(server, prompt, run(server, prompt), "flowcache/longvie"), 2 * 5, 64)
    assert difference(video, other) > 1.0


def test_windows_follow_one_another(server):
    prompt = small("skyreels_windows", frames=57, window=33, overlap=9, steps=3)
    check_video(saved(server, prompt, run(server, prompt), "flowcache/skyreels_windows"), 57, 64)


def test_comfyuis_own_nodes_go_beyond_81_frames(server):
    """What its template is with one FlowCache node, over more frames than the budget holds."""
    length = 4 * 40 - 3
    prompt = small("causal_forcing_native", length=length)
    outcome = run(server, prompt)
    check_video(saved(server, prompt, outcome, "flowcache/causal_forcing_native"), length, 64)
    (report,) = [key for key, node in prompt.items() if node["class_type"] == "FlowCacheReport"]
    (text,) = outcome.outputs[report]["text"]
    assert "history budget 20 chunks" in text and "39 chunks of 4 steps, lag 4" in text
    sizes = dict(re.findall(r"(planned|peak|unbounded) ([\d.]+) MB", text))
    assert float(sizes["peak"]) < 0.95 * float(sizes["unbounded"]), text


def test_two_prompts_make_one_video(server):
    prompt = small("skyreels_extend")
    outcome = run(server, prompt)
    beginning = check_video(saved(server, prompt, outcome, "flowcache/skyreels_extend_beginning"), 37, 64)
    whole = check_video(saved(server, prompt, outcome, "flowcache/skyreels_extend_whole"), 37 + 40, 64)
    # Coded anew, and noise codes badly; the last frames see what comes after them.
    same, other = (difference(beginning[:-12], part) for part in (whole[: 37 - 12], whole[37 : 37 + 25]))
    assert same < other / 3, (same, other)
    (second,) = [key for key, node in prompt.items() if "state" in node["inputs"]]
    prompt[prompt[second]["inputs"]["positive"][0]]["inputs"]["caption"] = "a yellow circle"
    again = run(server, prompt)
    assert second in again.executed and prompt[second]["inputs"]["state"][0] not in again.executed
    changed = check_video(saved(server, prompt, again, "flowcache/skyreels_extend_whole"), 37 + 40, 64)
    assert not np.array_equal(changed[37:], whole[37:])


def test_the_end_image_of_the_workflow_can_be_switched_on(server):
    """What Ctrl+B on its group does: the three nodes join the graph."""
    prompt = small("skyreels_image_to_video")
    (extend,) = [key for key, node in prompt.items() if node["class_type"] == "FlowCacheAutoregressiveExtend"]
    assert "end" not in prompt[extend]["inputs"]
    prompt[extend]["inputs"]["end"] = prompt[extend]["inputs"]["prefix"]
    outcome = run(server, prompt)
    check_video(saved(server, prompt, outcome, "flowcache/skyreels_image_to_video"), 4 * (1 + 10 + 1) - 3, 64)
