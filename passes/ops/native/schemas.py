"""Declarations of the operators that the C++ library implements, for Python and for processes without it."""

CHUNK_BYTES = 3 << 20
"""Transformed tiles of a Winograd convolution that are worked on together: they stay in the caches."""

SCHEMAS = {
    "WINOGRAD_WEIGHT": "winograd_weight(Tensor weight, int tile, bool phases=False) -> Tensor",
    "WINOGRAD_CONV2D": (
        "winograd_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? norm, Tensor? other, int outputs, int tile, "
        "bool phases=False, int[] padding=[1, 1, 1, 1], str padding_mode='zeros', str act_in='none', "
        f"str act_out='none', int workspace={CHUNK_BYTES}) -> Tensor"
    ),
    "GROUP_NORM_AFFINE": (
        "group_norm_affine(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, int groups, "
        "float eps) -> Tensor"
    ),
    "APPLY_AFFINE": "apply_affine(Tensor x, Tensor affine, str act='none') -> Tensor",
    "FLASH_ATTENTION": "flash_attention(Tensor q, Tensor k, Tensor v, float scale) -> Tensor",
}
