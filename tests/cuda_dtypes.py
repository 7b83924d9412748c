"""
For which dtypes CUDA lacks each operation, as far as torch says: the `dtypesIfCUDA` that torch's own tests declare.

The table is written to `fixtures/cuda_dtypes.json`, since it takes ten seconds and the package
`expecttest` to read torch's:

    python tests/cuda_dtypes.py
"""

import json
from pathlib import Path

import torch


TABLE = Path(__file__).parent / "fixtures" / "cuda_dtypes.json"
DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")
# What allocates, copies or views, of any dtype, and what needs no kernel of its own.
ANY_DTYPE = {
    "_local_scalar_dense", "_reshape_alias", "_to_copy", "_unsafe_view", "alias", "clone", "copy_", "detach", "empty",
    "empty_like", "empty_strided", "expand", "fill_", "full_like", "is_same_size", "lift_fresh", "new_empty",
    "new_full", "new_ones", "new_zeros", "ones_like", "permute", "select_backward", "set_", "slice", "slice_backward",
    "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view", "zero_", "zeros_like",
}  # fmt: skip
# What is called otherwise than in torch's table, or is the CPU's own form of an operation.
OTHER_NAMES = {
    "__rshift__": "bitwise_right_shift",
    "_index_put_impl_": "index_put",
    "_linear_cross_entropy_batch_chunked_no_reduction": "nn.functional.cross_entropy",
    "_log_softmax": "log_softmax",
    "_log_softmax_backward_data": "log_softmax",
    "_scaled_dot_product_flash_attention_for_cpu": "nn.functional.scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention_for_cpu_backward": "nn.functional.scaled_dot_product_attention",
    "_fused_sdp_choice": "nn.functional.scaled_dot_product_attention",
    "_softmax": "softmax",
    "_unique2": "unique",
    "embedding": "nn.functional.embedding",
    "embedding_dense_backward": "nn.functional.embedding",
    "index": "__getitem__",
    "gelu": "nn.functional.gelu",
    "native_layer_norm": "nn.functional.layer_norm",
    "nll_loss_backward": "nn.functional.nll_loss",
    "nll_loss_forward": "nn.functional.nll_loss",
    "silu": "nn.functional.silu",
}


def read_op_db():
    """{name of an operation: {variant: dtypes for which CUDA lacks it, with spaces between}}."""
    from torch.testing._internal.common_methods_invocations import op_db

    table = {}
    for info in op_db:
        lacking = " ".join(name for name in DTYPES if getattr(torch, name) not in info.dtypesIfCUDA)
        for name in {info.name, info.aten_name}:
            table.setdefault(name, {})[info.variant_test_name] = lacking
    return {name: table[name] for name in sorted(table)}


def lacks_cuda(operation, table):
    """
    Whether CUDA has no kernel for an (ATen name, options, dtype); None where the table does not say.

    Of an operation's variants those count that its options name ("amax" of `scatter_reduce`), otherwise all.
    """
    name, options, dtype = operation
    if name in ANY_DTYPE:
        return False
    names = (OTHER_NAMES.get(name), name, name.rstrip("_"), name.removesuffix("_backward"))
    forward = OTHER_NAMES.get(name.removesuffix("_backward"))
    variants = next((table[known] for known in (*names, forward) if known in table), None)
    if variants is None:
        return None
    named = [lacking for variant, lacking in variants.items() if variant in options]
    return all(str(dtype).removeprefix("torch.") in lacking.split() for lacking in named or variants.values())


def read_table():
    return json.loads(TABLE.read_text())["lacking"]


if __name__ == "__main__":
    source = f"torch {torch.__version__.split('+')[0]}, torch/testing/_internal/common_methods_invocations.py"
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(variants)}" for name, variants in read_op_db().items())
    TABLE.write_text(f'{{"source": {json.dumps(source)}, "lacking": {{\n{lines}\n}}}}\n')
