"""How a GPU multiplies float32: one rule for Triton's kernels and, by ``fastseq::one_tf32_product``, for C++'s."""

import torch


def one_tf32_product() -> bool:
    """Whether torch may use TF32 there: then one product of it. Else all of float32's digits are kept, by three of them
    or, in the Triton attention, by none."""
    # Set by torch.set_float32_matmul_precision too, which cannot be asked once either has been set by its newer name.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
