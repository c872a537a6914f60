"""docs/models.md against the workflows: every row has one, and every loader offers its file or says how to get it."""

import json
import re
import urllib.parse

import pytest
from safetensors import safe_open

from tests.helpers.host.workflows import MODEL, TITLES
from tests.helpers.paths import GOLDEN_FOLDER, ROOT

PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
WORKFLOWS = {title: json.loads((ROOT / "workflows" / f"{title}.json").read_text(encoding="utf-8")) for title in TITLES}
SHIPPED = "demo model (ships with FlowCache)"
LOADERS = {  # type: the folder that it lists
    "UNETLoader": "diffusion_models",
    "FlowCacheLoadARVideoModel": "diffusion_models",
    "CLIPLoader": "text_encoders",
    "VAELoader": "vae",
    "FlowCacheLoadMagiVAE": "vae",
    "CLIPVisionLoader": "clip_vision",
}
HOSTS = ("huggingface.co",)  # that the page takes downloads from
ENDINGS = (".safetensors", ".sft", ".ckpt", ".pth", ".pt")
LINKS = dict(re.findall(r"\[`([^`]+)`\]\((https://[^)]+/resolve/[^)]+)\)", PAGE))


def rows() -> list[list[str]]:
    """Cells of the table of networks."""
    table = PAGE[PAGE.index("The networks go to diffusion_models") :].split("\n\n")[1]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def titles(cell: str) -> list[str]:
    """Of the workflows that a row names."""
    return [MODEL + name.strip() for name in re.sub(r"\([^)]*\)", "", cell).split(",")]


def loaders(graph: dict) -> list[dict]:
    return [node for node in graph["nodes"] if node["type"] in LOADERS and node["widgets_values"]]


def test_the_page_links_files_where_it_can():
    assert len(LINKS) == 14
    for name, url in LINKS.items():
        parts = urllib.parse.urlsplit(url)
        assert parts.netloc in HOSTS and parts.path.endswith("/" + name) and name.endswith(ENDINGS)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_loader_offers_its_file_or_the_note_says_how_to_get_it(name):
    notes = "\n".join(node["widgets_values"][0] for node in WORKFLOWS[name]["nodes"] if node["type"] == "MarkdownNote")
    for node in loaders(WORKFLOWS[name]):
        file, folder = node["widgets_values"][0], LOADERS[node["type"]]
        offered = node["properties"].get("models")
        if file in LINKS:
            assert offered == [{"name": file, "url": LINKS[file], "directory": folder}], file
        else:
            assert offered is None and (file == SHIPPED or file in notes or "MAGI" in notes), file
        assert file == SHIPPED or file in PAGE or file == "magi1_vae.safetensors", file


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_every_row_has_workflows_that_load_it_as_its_family(row):
    _, _, _, families, named = row
    for name in titles(named):
        networks = [node for node in loaders(WORKFLOWS[name]) if LOADERS[node["type"]] == "diffusion_models"]
        assert networks, name
        for node in networks:
            assert node["widgets_values"][1] in (*families.split(", "), "auto", "default"), name


def test_every_workflow_of_a_published_model_is_in_a_row():
    assert {title for title in TITLES if title.startswith(MODEL)} == {name for row in rows() for name in titles(row[4])}


GOLDEN = {  # row: file of golden tensors, runs of upstream's in it
    "SkyReels-V2 diffusion forcing 1.3B": ("skyreels_flowcache", ["off_fps.0"]),
    "SkyReels-V2 diffusion forcing 14B": ("skyreels_flowcache", ["off.0"]),
    "Self-Forcing": ("causal", ["self_forcing", "self_forcing_window", "self_forcing_sink"]),
    "Causal-Forcing framewise, 4 steps": ("causal", ["causal_forcing", "causal_forcing_image"]),
    "Causal-Forcing++ framewise, 2 and 1 steps": ("causal", ["causal_forcing_2_steps", "causal_forcing_1_step"]),
    "Causal-Forcing chunkwise": ("causal", ["self_forcing"]),  # the same pipeline, frames and levels
    "Causal-Forcing long video": ("rolling_forcing", ["rolling_forcing"]),  # the same pipeline
    "CausVid": ("causal", ["causvid_3_steps", "causvid_4_steps"]),
    "Reward Forcing": ("longlive", ["reward_forcing", "reward_forcing_half", "reward_forcing_12"]),
    "Rolling Forcing": ("rolling_forcing", ["rolling_forcing"]),
    "LongLive": ("longlive", ["longlive", "longlive_switch"]),
    "LongLive 2.0 5B": ("longlive2", ["longlive2", "shots", "image", "published"]),
    "Self-Forcing of Wan 2.2 A14B": ("experts", ["experts"]),
    "Krea Realtime 14B": ("krea", ["krea", "krea_switch"]),
    "MAGI-1 4.5B": ("magi_runs", ["base", "distill", "image", "video"]),
    "MAGI-1 24B": ("magi_runs", ["gated"]),
    "LongVie 2": ("longvie", ["final"]),
}


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_every_row_has_a_golden_run(row):
    file, runs = GOLDEN[row[0]]
    with safe_open(GOLDEN_FOLDER / f"{file}.safetensors", "pt") as stored:
        names = set(stored.keys())
    for run in runs:
        assert {f"{run}.final", f"{run}.latents", f"{run}.0"} & names, run
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_golden_*.py"))
    tests += (ROOT / "tests" / "models" / "magi" / "test_engine.py").read_text()
    assert f'golden("{file}")' in tests
