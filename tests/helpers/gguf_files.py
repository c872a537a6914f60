"""Small GGUF files, written with the gguf package."""

from pathlib import Path

from torch import Tensor


def write_gguf(path: Path, weights: dict[str, Tensor], kind: str = "F32", prefix: str = "") -> None:
    """Writes tensors as ComfyUI-GGUF's converter does: vectors in float32, matrices of whole blocks as `kind`."""
    import gguf
    from gguf.quants import quantize

    packed = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "wan")
    for name, weight in weights.items():
        values = weight.float().contiguous().numpy()
        if kind != "F32" and values.ndim == 2 and values.shape[1] % 32 == 0:
            writer.add_tensor(prefix + name, quantize(values, packed), raw_dtype=packed)
        else:
            writer.add_tensor(prefix + name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
