"""Which implementation of each kernel a configuration runs with, and why."""

from __future__ import annotations

from fedlr.build import kernel_call
from fedlr.config import RunConfig
from fedlr.doctor.finding import Result
from fedlr.kernels.dispatch import KERNELS, choose


def in_use(config: RunConfig) -> Result:
    """Name the implementation of every kernel and the reason for it.

    Raises:
        ConfigError: What is asked for cannot run here.
    """
    call, wanted = kernel_call(config), config.kernels.implementation
    if config.kernels.gradients != "captured":
        return Result(True, f"naive: kernels.gradients = {config.kernels.gradients} uses none")
    choices = [choose(kernel, call, wanted) for kernel in KERNELS]
    told = [f"{choice.kernel}: {choice.implementation}, {choice.reason}" for choice in choices]
    if len({(choice.implementation, choice.reason) for choice in choices}) == 1:
        told = [f"{choices[0].implementation}: {choices[0].reason}"]
    return Result(True, "; ".join(told))
