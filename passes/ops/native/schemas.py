"""Declarations of the operators that the C++ library implements, for Python and for processes without it."""

SCHEMAS = {
    "WINOGRAD_WEIGHT": "winograd_weight(Tensor weight, int tile, bool phases=False) -> Tensor",
    "WINOGRAD_CONV2D": (
        "winograd_conv2d(Tensor x, Tensor weight, Tensor? bias, Tensor? norm, Tensor? other, int outputs, int tile, "
        "bool phases=False, int[] padding=[1, 1, 1, 1], str padding_mode='zeros', str act_in='none', "
        "str act_out='none', int workspace=3145728) -> Tensor"
    ),
    "GROUP_NORM_AFFINE": (
        "group_norm_affine(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, int groups, "
        "float eps) -> Tensor"
    ),
    "APPLY_AFFINE": "apply_affine(Tensor x, Tensor affine, str act='none') -> Tensor",
}
