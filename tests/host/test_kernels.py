"""The host's kernels get what they were made for: rotary product, attentions, fp8 products; on both hosts."""

import pytest

from tests.helpers.host.comfy_server import HOST
from tests.helpers.host.scripts import result_of
from tests.host.test_old_host import OLD


@pytest.fixture(scope="module", params=[HOST, OLD], ids=["newest", "oldest"])
def found(request, tmp_path_factory) -> dict:
    return result_of("run_kernels.py", request.param, tmp_path_factory.mktemp("pack"))


@pytest.mark.parametrize(("dtype", "rounding"), [("float32", 1e-6), ("bfloat16", 2**-8)])
def test_the_rotary_product_is_ours(found, dtype, rounding):
    result = found[dtype]
    assert result["apart"] <= rounding and result["same type"]
    assert result["handed"] == [[True, True]]  # nothing is copied for it, and no table is longer than the tokens


def test_attentions_that_take_shared_key_heads_get_them_so(found):
    heads = {name: got for name, (got, _) in found["heads"].items()}
    assert heads.pop("attention_sub_quad") == []  # torch's stands in for it on the processor
    assert heads.pop("chosen") == [4]  # repeated
    expected = [2] if found["shares"] else [4]  # ComfyUI 0.3.64's attention takes no fewer
    assert heads and all(got == expected for got in heads.values())
    assert all(apart < 1e-6 for _, apart in found["heads"].values())


def test_the_same_layers_can_multiply_in_fp8_as_in_the_hosts_forward(found):
    stock, ours = (set(found["layers"][side]) for side in ("stock", "ours"))
    assert stock - ours == set()
    assert {"blocks.0.ffn.0", "blocks.0.ffn.2", "head.head", "blocks.0.self_attn.q"} <= ours


def test_a_compiled_network_is_a_few_graphs_without_a_break(found):
    for kind in found["compiled"].values():
        assert kind["breaks"] == [] and kind["apart"] < 1e-6
        assert kind["graphs"][-1] == kind["graphs"][2] <= 8  # four parts of a block: for one length, then for any


def test_nodes_that_compile_are_heeded_but_for_cuda_graphs(found):
    plain, graphs, overhead = found["wanted"]  # backend, mode, notes in the report, wrappers of the host's that stay
    assert plain == ["inductor", None, 1, 0]
    assert graphs == ["inductor", None, 2, 0]
    assert overhead == ["inductor", "default", 2, 0]
