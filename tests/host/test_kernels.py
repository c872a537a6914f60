"""The host's kernels get what they were made for: rotary product, attentions, fp8 products; on both hosts."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.helpers.host.comfy_server import HOST, PACK, host_python
from tests.host.test_old_host import OLD


@pytest.fixture(scope="module", params=[HOST, OLD], ids=["newest", "oldest"])
def found(request, tmp_path_factory) -> dict:
    host: Path = request.param
    if not (host / "main.py").exists():
        pytest.skip(f"no ComfyUI at {host}")
    link = tmp_path_factory.mktemp("pack") / "flowcache_pack"  # a name that an import takes
    link.symlink_to(PACK, target_is_directory=True)
    script = Path(__file__).with_name("run_kernels.py")
    command = [str(host_python(host)), str(script), str(host), str(link)]
    ended = subprocess.run(command, cwd=link.parent, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    (line,) = (line for line in ended.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(line.removeprefix("RESULT "))


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 1e-6), ("bfloat16", 2**-8)])
def test_the_rotary_product_is_ours(found, dtype, rounding):
    result = found[dtype]
    assert result["apart"] <= rounding and result["same type"]
    assert result["handed"] == [[True, True]]  # nothing is copied for it, and no table is longer than the tokens


def test_attentions_that_take_shared_key_heads_get_them_so(found):
    heads = {name: got for name, (got, _) in found["heads"].items()}
    assert heads.pop("attention_sub_quad") == [4]  # repeated
    expected = [2] if found["shares"] else [4]  # ComfyUI 0.3.64's attention takes no fewer
    assert heads and all(got == expected for got in heads.values())
    assert all(apart < 1e-6 for _, apart in found["heads"].values())


def test_the_same_layers_can_multiply_in_fp8_as_in_the_hosts_forward(found):
    stock, ours = (set(found["layers"][side]) for side in ("stock", "ours"))
    assert stock - ours == set()
    assert {"blocks.0.ffn.0", "blocks.0.ffn.2", "head.head", "blocks.0.self_attn.q"} <= ours
