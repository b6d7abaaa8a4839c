"""Fused operators, one folder each; importing this package registers them as ``torch.ops.hasten.*``."""

from hasten.passes.ops import attention, geglu, group_norm_act, upsample_conv2d, winograd_conv2d

__all__ = ["attention", "geglu", "group_norm_act", "upsample_conv2d", "winograd_conv2d"]
