"""What is refused is named for what it is. Names of tensors as diffusers 0.42.1 has them, and the models' own code."""

import pytest
import torch
from safetensors.torch import save_file

from flowcache_core.checkpoints import inspect
from flowcache_core.errors import UserError
from flowcache_core.models.wan import WanConfig, WanNetwork

WIDE = WanConfig(dim=128, ffn_dim=96, num_heads=1, num_layers=2, in_dim=4, out_dim=4, text_dim=16, freq_dim=32)


def refused(path, tensors: dict[str, torch.Tensor]) -> str:
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(UserError) as caught:
        inspect(path / "model.safetensors")
    return str(caught.value)


def wan(config: WanConfig = WIDE) -> dict[str, torch.Tensor]:
    return dict(WanNetwork(config).state_dict())


@pytest.mark.parametrize(
    "names, kind",
    [
        (["patch_embedding.weight", "patch_short.weight", "norm_out.scale_shift_table", "proj_out.weight"], "Helios"),
        (["patch_embedding.weight", "far_patch_embedding.weight", "proj_out.weight"], "AnyFlow-FAR"),
        (["patch_embedding.weight", "condition_embedder.delta_embedder.linear_1.weight"], "AnyFlow"),
        (["x_embedder.proj.weight", "clean_x_embedder.proj.weight", "single_transformer_blocks.0.proj"], "FramePack"),
        (["patch_embedding.weight", "caption_norm.weight", "transformer_blocks.0.scale_shift_table"], "SANA-Video"),
        (
            ["proj_in.weight", "caption_projection.linear_1.weight", "transformer_blocks.0.attn1.to_q.weight"],
            "LTX-Video",
        ),
        (["model.diffusion_model.patchify_proj.weight", "vae.decoder.conv_in.conv.weight"], "LTX-Video"),
        (["patch_embedding.weight", "condition_embedder.image_embedder.norm1.bias"], "Wan image-to-video"),
    ],
)
def test_other_models(names, kind, tmp_path):
    assert f"is {kind}" in refused(tmp_path, {name: torch.zeros(2) for name in names})


@pytest.mark.parametrize(
    "name, kind",
    [
        ("img_emb.proj.0.bias", "Wan image-to-video"),
        ("blocks.0.cross_attn.k_img.weight", "Wan image-to-video"),
        ("vace_patch_embedding.weight", "Wan VACE"),
        ("face_adapter.fuser_blocks.0.k_norm.weight", "Wan Animate"),
        ("casual_audio_encoder.encoder.final_linear.weight", "a Wan that follows speech"),
        ("control_adapter.conv.weight", "Wan Fun"),
    ],
)
def test_other_kinds_of_wan(name, kind, tmp_path):
    assert f"is {kind}" in refused(tmp_path, wan() | {name: torch.zeros(2)})


def test_wan_2_2_image_to_video_has_no_tensor_more(tmp_path):
    tensors = wan() | {"patch_embedding.weight": torch.zeros(128, 36, 1, 2, 2)}
    assert "takes 36 channels and gives 4, as Wan image-to-video" in refused(tmp_path, tensors)


def test_fused_and_cut_layers(tmp_path):
    fused = wan()
    fused["blocks.0.ffn.gate_up.weight"] = fused.pop("blocks.0.ffn.0.bias")
    assert "lacks blocks.0.ffn.0.bias and has blocks.0.ffn.gate_up.weight there; its layers are fused" in refused(
        tmp_path, fused
    )
    cut = {name: tensor for name, tensor in wan(WanConfig(**(WIDE.__dict__ | {"num_layers": 3}))).items()}
    cut = {name: tensor for name, tensor in cut.items() if not name.startswith("blocks.1.")}
    words = refused(tmp_path, cut)
    assert "lacks blocks.1." in words and "cut" in words and "image-to-video" not in words
