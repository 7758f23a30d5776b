"""Decides, call by call, whether an op runs its kernel or its reference, and makes the call.

Modes: "auto" (kernels on a GPU, the reference elsewhere or where a kernel does not fit), "reference" (never a kernel),
"require" (a GPU tensor without its kernel is an error), "emulate" (kernels on CPU tensors too, in the emulator: for
tests).
Knows no op. Neighbours: the op files ask `library` and run the kernel with `call`; `build` compiles.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from . import build

MODES = ("auto", "reference", "require", "emulate")
DTYPES = (torch.float32, torch.bfloat16)  # what the kernels read and write

_ops = torch.library.Library("reasoner", "DEF")
_mode = "auto"
_log = logging.getLogger("reasoner.kernels")


def set_mode(mode: str) -> None:
    """Choose the mode of this process (the modes are told at the top of the file)."""
    global _mode
    if mode not in MODES:
        raise ValueError(f"kernels={mode!r}: choose one of {', '.join(MODES)}")
    _mode = mode


@contextmanager
def using(mode: str) -> Iterator[None]:
    """`with using("reference"):` the mode inside, the old one after."""
    before = _mode
    set_mode(mode)
    try:
        yield
    finally:
        set_mode(before)


@functools.cache
def _say_once(message: str) -> None:
    _log.warning(message)


@functools.cache
def _architecture(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"


def target_of(x: torch.Tensor) -> str | None:
    """What to compile for so that a kernel can run where `x` lies; None: run the reference."""
    if _mode == "reference":
        return None
    if x.is_cuda:
        return _architecture(x.device.index)
    return build.EMULATOR if _mode == "emulate" and x.device.type == "cpu" else None


def library(source: str, x: torch.Tensor, *misfits: str | None) -> ctypes.CDLL | None:
    """The compiled `csrc/{source}.cu` for the device of `x`, or None for the reference.

    `misfits`: one line for each thing the kernel does not support, None where it does. Under "require" and "emulate" a
    misfit or a missing compiler raises; under "auto" it is logged once.
    """
    target = target_of(x)
    if target is None:
        return None
    found = next(filter(None, misfits), None) or _load(source, target)
    if isinstance(found, ctypes.CDLL):
        return found
    message = f"{source}: {found}"
    if _mode in ("require", "emulate"):
        raise ValueError(f'{message}; kernels="{_mode}" forbids the reference: change the size, or use kernels="auto"')
    _say_once(f"{message}; the PyTorch reference runs instead")
    return None


@functools.cache
def _load(source: str, target: str) -> ctypes.CDLL | str:
    """The library, or why there is none: kept, because a compiler that failed once must not run at every call."""
    if target.startswith("sm_") and int(target.removeprefix("sm_").rstrip("a")) < 80:
        return f"{target} is older than sm_80"
    try:
        return build.load(build.SOURCES / f"{source}.cu", target)
    except (RuntimeError, OSError) as error:
        return str(error)


def dtype_misfit(*tensors: torch.Tensor) -> str | None:
    bad = next((t.dtype for t in tensors if t.dtype not in DTYPES), None)
    return None if bad is None else f"{bad} is not among {DTYPES}"


def define(schema: str, run: Callable, fake: Callable) -> Callable:
    """Make `run` the op reasoner::NAME of `schema` on CPU and GPU, `fake` its shape rule; returns the op.

    Autocast is off inside `run`: it would round the products of a reference to bf16.
    """
    name = schema.split("(")[0]
    _ops.define(schema)

    def exactly(x: torch.Tensor, *rest: object) -> object:
        if not torch.is_autocast_enabled(x.device.type):  # nearly always, and asking costs less than the context
            return run(x, *rest)
        with torch.autocast(x.device.type, enabled=False):
            return run(x, *rest)

    for key in ("CPU", "CUDA"):
        _ops.impl(name, exactly, key)
    torch.library.register_fake(f"reasoner::{name}", fake, lib=_ops)
    return getattr(torch.ops.reasoner, name)


def differentiate(op: Callable, gradients: Callable, save: Callable) -> None:
    """Give `op` its backward: `save(ctx, inputs, output)` in the forward, `gradients(ctx, *by_outputs)` after it."""
    torch.library.register_autograd(op._qualified_op_name, gradients, setup_context=save, lib=_ops)


def packed(x: torch.Tensor) -> torch.Tensor:
    """`x` as the kernels read it: without gaps, at an address that vector loads accept."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


class Strided:
    """A tensor given by its address alone, because the kernel takes its strides as further arguments."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


def _argument(value: torch.Tensor | Strided | int | float | None) -> ctypes._SimpleCData:
    if isinstance(value, torch.Tensor):
        assert value.is_contiguous(), f"a kernel needs contiguous memory, got strides {value.stride()}"
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, Strided):
        return ctypes.c_void_p(value.tensor.data_ptr())
    if value is None:
        return ctypes.c_void_p(None)
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_longlong(value)


def call(
    library: ctypes.CDLL, name: str, x: torch.Tensor, *arguments: torch.Tensor | Strided | int | float | None
) -> None:
    """Run `name` of `library` on the current stream of the device of `x`. Raises RuntimeError in the device's words."""
    function = getattr(library, name)
    converted = [_argument(a) for a in arguments]
    if x.is_cuda:
        with torch.cuda.device(x.device):
            code = function(*converted, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
    else:
        code = function(*converted, ctypes.c_void_p(None))
    if code:
        library.error_text.restype = ctypes.c_char_p
        raise RuntimeError(f"{name}: {library.error_text(code).decode()}")
