"""
A GPU for machines without one: a CPU computes, and tensors of two devices must not meet, as on a GPU.

    with SimulatedGpu() as gpu:
        model.to("cuda")(ids.to("cuda"))       # RuntimeError, had the model made a tensor of its own on the CPU

A tensor on it says that its device is `cuda:0` and holds a CPU tensor, with which every operation is done. Values are
the CPU's, and so are kernels and their numbers: what only a GPU shows (compiled attention, autocast, speed) stays
hidden.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only


GPU = torch.device("cuda", 0)
# CUDA takes tensors of both devices here: copies, and indices on the CPU.
TAKES_BOTH_DEVICES = ("_to_copy", "copy", "index", "index_put", "_index_put_impl")


class GpuTensor(torch.Tensor):
    """
    A tensor on the simulated GPU.

    Attributes:
        on_cpu: the values.
        operations: all (name of an ATen operation, options given as strings, dtype) since a [`SimulatedGpu`] began.
    """

    device = property(lambda self: GPU)
    is_cuda = True
    is_cpu = False
    operations: set[tuple[str, tuple[str, ...], torch.dtype]] = set()

    @staticmethod
    def __new__(cls, on_cpu):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, on_cpu.size(), on_cpu.stride(), on_cpu.storage_offset(), dtype=on_cpu.dtype, device=on_cpu.device
        )
        tensor.on_cpu = on_cpu
        return tensor

    def __repr__(self, **kwargs):
        return f"GpuTensor({self.on_cpu})"

    def __deepcopy__(self, memo):
        copied = GpuTensor(self.on_cpu.clone()).requires_grad_(self.requires_grad)
        # How a parameter that is no `nn.Parameter` itself says that it is one.
        if getattr(self, "_is_param", False):
            copied._is_param = True
        return memo.setdefault(id(self), copied)

    def tolist(self):
        return self.on_cpu.tolist()

    def numpy(self, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        # A single number on the CPU goes with any device.
        strangers = [tensor for tensor in tensors if not isinstance(tensor, cls) and tensor.dim() > 0]
        if strangers and name.rstrip("_") not in TAKES_BOTH_DEVICES:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {func} got some on cpu, of shapes "
                f"{[list(tensor.shape) for tensor in strangers]}."
            )
        check_generator((args, kwargs))
        options = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, str))
        cls.operations.add((name, options, main_dtype(name, tensors)))
        if name in ("copy_", "_to_copy") and not isinstance(args[0], cls):
            return func(args[0], args[1].on_cpu, *args[2:], **kwargs)
        out = func(*cls.unwrapped(args), **cls.unwrapped(kwargs))
        return return_and_correct_aliasing(func, args, kwargs, tree_map_only(torch.Tensor, cls, out))

    @classmethod
    def unwrapped(cls, values):
        return tree_map_only(cls, lambda tensor: tensor.on_cpu, values)


def check_generator(arguments):
    """A generator draws on its own device only, and of the simulated GPU there is none."""
    if any(isinstance(leaf, torch.Generator) for leaf in tree_leaves(arguments)):
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'.")


def main_dtype(name, tensors):
    """The dtype that decides whether there is a kernel: that of the first tensor, of `where` that of its values."""
    return tensors[name == "where" and len(tensors) > 1].dtype


class _ToGpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return GpuTensor(tensor.detach().clone())

    @staticmethod
    def backward(ctx, gradient):
        return gradient.on_cpu


class _ToCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return tensor.on_cpu.clone()

    @staticmethod
    def backward(ctx, gradient):
        return GpuTensor(gradient)


def is_gpu(device):
    return isinstance(device, (str, torch.device)) and torch.device(device).type == GPU.type


def moved(tensor, device):
    """The tensor on this device, the tensor itself where it is there."""
    if isinstance(tensor, GpuTensor) == is_gpu(device):
        return tensor
    return (_ToGpu if is_gpu(device) else _ToCpu).apply(tensor)


class SimulatedGpu(TorchFunctionMode):
    """Within it `device="cuda"` is the simulated GPU; see the head of this file."""

    def __enter__(self):
        GpuTensor.operations.clear()
        # Moving a module puts new parameters in place of its own.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self.run_backward = torch.autograd._engine_run_backward

        def run_backward(*args, **kwargs):
            # Torch leaves a function mode while it runs what the mode was asked for, a whole backward pass, say.
            with TorchFunctionModeOf(self):
                return self.run_backward(*args, **kwargs)

        torch.autograd._engine_run_backward = run_backward
        return super().__enter__()

    def __exit__(self, *exception):
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        torch.autograd._engine_run_backward = self.run_backward
        return super().__exit__(*exception)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return on_simulated_gpu(func, args, dict(kwargs or {}))


class TorchFunctionModeOf(TorchFunctionMode):
    """The same as another mode, without what that one does when it begins."""

    def __init__(self, mode):
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.mode.__torch_function__(func, types, args, kwargs)


def on_simulated_gpu(func, args, kwargs):
    """Calls a function of torch with `device="cuda"` meaning the simulated GPU."""
    if func in (torch.Tensor.cuda, torch.Tensor.cpu):
        return moved(args[0], "cuda" if func is torch.Tensor.cuda else "cpu")
    if func is torch.Tensor.to:
        return to(*args, **kwargs)
    if func is torch.nn.functional.one_hot and isinstance(args[0], GpuTensor):
        # In C++ the device of these tensors is the CPU, where it makes one of its own.
        return GpuTensor(func(*GpuTensor.unwrapped(args), **kwargs))
    if not is_gpu(kwargs.get("device")):
        return func(*args, **kwargs)
    check_generator((args, kwargs))
    out = func(*args, **{**kwargs, "device": "cpu"})
    return tree_map_only(torch.Tensor, lambda tensor: moved(tensor, GPU), out)


def to(tensor, *args, **kwargs):
    """`torch.Tensor.to` in all its forms; flags such as `non_blocking` count for nothing."""
    given = [value for value in (*args, *kwargs.values()) if value is not None and not isinstance(value, bool)]
    for value in given:
        if isinstance(value, torch.Tensor):
            tensor = torch.Tensor.to(moved(tensor, value.device), value.dtype)
        elif isinstance(value, torch.dtype):
            tensor = torch.Tensor.to(tensor, value)
        elif isinstance(value, (str, torch.device)) and torch.device(value).type in ("cpu", GPU.type):
            tensor = moved(tensor, value)
        else:
            tensor = torch.Tensor.to(tensor, value)
    return tensor
