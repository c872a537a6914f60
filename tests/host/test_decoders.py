"""Latents decoded chunk by chunk by the host's VAE objects, on both hosts: as if they were decoded in one go."""

import pytest

from tests.helpers.host.comfy_server import HOST
from tests.helpers.host.scripts import result_of
from tests.host.test_old_host import OLD


@pytest.fixture(scope="module", params=[HOST, OLD], ids=["newest", "oldest"])
def found(request, tmp_path_factory) -> dict:
    return result_of("run_decoders.py", request.param, tmp_path_factory.mktemp("pack"))


@pytest.mark.parametrize("chunk", [1, 2, 3])
@pytest.mark.parametrize("vae", ["demo", "wan", "deep"])
def test_carried_on_decoding_is_decoding_the_whole(found, vae, chunk):
    result = found[f"{vae} {chunk}"]
    assert result["shapes"][0] == result["shapes"][1] == [25, 32, 32, 3]
    assert result["spread"] > 0.01 and result["largest"] < 1e-4


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_overlap_gives_every_frame_and_nearly_its_pixels(found, chunk):
    result = found[f"overlap {chunk}"]
    assert result["shapes"][0] == result["shapes"][1]
    assert result["mean"] < 0.1 * result["spread"]


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_small_decoders_are_carried_on_too(found, chunk):
    if "small 1" not in found:
        pytest.skip("ComfyUI 0.3.64 has no small decoder for videos")
    result = found[f"small {chunk}"]
    assert result["shapes"][0] == result["shapes"][1] == [25, 32, 32, 3]
    assert result["spread"] > 0.01 and result["largest"] < 1e-4 * result["spread"]


@pytest.mark.parametrize("vae", ["demo", "wan", "deep", "small"])
def test_beside_a_run_nothing_waits_for_a_decode(found, vae):
    """Neither the host nor the network's stream, until the frames are read; and they are the same to the bit."""
    if f"{vae} beside" not in found:
        pytest.skip("ComfyUI 0.3.64 has no small decoder for videos")
    result = found[f"{vae} beside"]
    assert result["told"] and result["waits"] == 0 and result["early"] == 0
    assert result["equal"]


@pytest.mark.parametrize("name", ["cramped", "deep cramped"])
def test_a_decode_that_runs_out_makes_room_and_goes_on_in_tiles(found, name):
    result = found[name]
    assert result["rooms"] == [True, True, False, False] and result["tiles"] == 4
    assert result["shapes"][0] == result["shapes"][1]
    assert result["before"] < 1e-4  # what was decoded before stays as it is
    assert result["mean"] < 0.15 * result["spread"]  # the middle of a picture is not seen from its rim


def test_each_vae_has_its_decoder(found):
    assert found["classes"] == ["DemoDecoder", "WanDecoder", "DeepDecoder"]
