"""torch's switches for reduced precision, as an operator's argument.

They are asked for past torch.backends, whose modules take 0.5 to 1.5 us to answer.
"""

import torch


@torch.compiler.assume_constant_result  # in a graph; dynamo compiles anew when the switch is moved
def matmul_allows_tf32() -> bool:
    """Whether float32 products may be computed in TF32: torch.backends.cuda.matmul.fp32_precision, or allow_tf32."""
    return torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32"


@torch.compiler.assume_constant_result
def matmul_allows_bf16() -> bool:
    """Whether a CPU's float32 products may be computed in bfloat16: torch.set_float32_matmul_precision("medium")."""
    return torch._C._get_fp32_precision_getter("mkldnn", "matmul") == "bf16"


@torch.compiler.assume_constant_result
def convolutions_allow_tf32() -> bool:
    """Whether float32 convolutions may be computed in TF32: torch.backends.cudnn.conv.fp32_precision, or allow_tf32."""
    return torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32"


@torch.compiler.assume_constant_result
def rnn_allows_tf32() -> bool:
    """Whether a recurrent layer may multiply in TF32: torch.backends.cudnn.rnn.fp32_precision, or allow_tf32."""
    return torch._C._get_fp32_precision_getter("cuda", "rnn") == "tf32"
