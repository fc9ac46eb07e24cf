"""Operations that an image needs, and what a GPU can do in a second: both halves of model FLOPs utilisation."""

from typing import Final


def transformer_flops(num_tokens: int, dim: int, depth: int, mlp_ratio: float = 4.0, num_out: int | None = None) -> float:
    """Operations, two for a product and its sum, of a forward pass through ``depth`` blocks: matrix products alone.

    With ``num_out`` the last block computes only so many tokens, which attend to all.
    """

    def block(num_out: int) -> float:
        return 2.0 * ((3 * num_tokens + (1 + 2 * mlp_ratio) * num_out) * dim**2 + 2 * num_tokens * num_out * dim)

    return (depth - 1) * block(num_tokens) + block(num_tokens if num_out is None else num_out)


def pretrain_flops(
    *,
    num_visible: int,
    num_patches: int,
    patch_size: int,
    embed_dim: int,
    depth: int,
    decoder_depth: int,
    pixel_dim: int,
    feature_dim: int | None,
    identity_dim: int | None = None,
) -> float:
    """Operations that an image needs in a step of pre-training: student and decoders three times (forward, and backward as
    two), the teacher once. What activation checkpointing computes again is not counted. ``feature_dim`` is None without
    feature decoder, ``identity_dim`` without identity head; without both there is no teacher."""
    pixels = 3 * patch_size**2
    encode = 2.0 * num_visible * pixels * embed_dim
    student = transformer_flops(1 + num_visible, embed_dim, depth)
    decode = _decoder_flops(1 + num_visible, num_patches, embed_dim, pixel_dim, decoder_depth, pixels)
    teacher = 0.0
    if feature_dim is not None:
        decode += _decoder_flops(1 + num_visible, num_patches, embed_dim, feature_dim, decoder_depth, embed_dim)
    if identity_dim is not None:  # two embeddings, and a covariance of each
        decode += 2 * 2.0 * (embed_dim * identity_dim + 2 * identity_dim**2)
    if feature_dim is not None or identity_dim is not None:
        teacher = 2.0 * num_patches * pixels * embed_dim + transformer_flops(1 + num_patches, embed_dim, depth)
    return 3 * (student + decode) + 2 * encode + teacher  # nothing asks for the gradient of the patches


def _decoder_flops(num_tokens: int, num_patches: int, encoder_dim: int, dim: int, depth: int, out_dim: int) -> float:
    linear = 2.0 * num_tokens * encoder_dim * dim + 2.0 * num_patches * dim * out_dim
    return linear + transformer_flops(num_tokens + num_patches, dim, depth, num_out=num_patches)


# Dense bf16 operations a second, from the makers' data sheets; by the name that the driver gives, the longest match first.
_PEAK_FLOPS: Final = {
    "NVIDIA A100": 312e12,
    "NVIDIA A30": 165e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """What a GPU can do at most, in operations a second; None where that is not known."""
    if precision != "bf16":
        return None
    known = [name for name in _PEAK_FLOPS if device_name == name or device_name.startswith((f"{name} ", f"{name}-"))]
    return _PEAK_FLOPS[max(known, key=len)] if known else None
