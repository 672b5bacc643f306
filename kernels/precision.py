"""How a GPU multiplies float32: one rule for Triton's kernels and, by ``fastseq::one_tf32_product``, for C++'s."""

import torch


def one_tf32_product() -> bool:
    """Whether torch may use TF32 there: then one product, else three, which keep float32's digits."""
    # Set by torch.set_float32_matmul_precision too, which cannot be asked once either has been set by its newer name.
    return torch.backends.cuda.matmul.fp32_precision == "tf32"
