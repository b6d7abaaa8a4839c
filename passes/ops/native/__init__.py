"""The C++ kernels of ``torch.ops.hasten``: built for this processor on first use, and kept."""
