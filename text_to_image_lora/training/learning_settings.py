"""The flags of the optimizer and of the learning rate schedule. Does not import torch."""

import dataclasses
import re
from dataclasses import dataclass
from typing import ClassVar

from ..command_line import (
    COMPATIBILITY,
    above,
    at_least,
    between,
    count,
    flag,
    from_up_to,
)
from ..config_file import Conflict, Remark
from ..errors import InputError
from ..files import counted
from .optimizers import OPTIMIZERS, check_optimizer


WITHOUT_WARMUP = ("constant", "piecewise_constant")  # schedules of diffusers


def _is_prodigy(flags):
    return flags["optimizer"] == "prodigy"


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimizer and its learning rates."""

    title: ClassVar = "optimizer"
    conflicts: ClassVar = (
        Conflict(
            "use_8bit_adam", "optimizer", "Pass one of --use_8bit_adam and --optimizer {optimizer}.",
            lambda flags: flags["use_8bit_adam"] and flags["optimizer"] not in (None, "adamw8bit"),
        ),
        Conflict(
            "optimizer", "lr_scheduler",
            "--optimizer schedulefree can't be combined with --lr_scheduler {lr_scheduler}. Leave the scheduler out, or use "
            "another optimizer.",
            lambda flags: flags["optimizer"] == "schedulefree" and not flags["lr_scheduler"].startswith("constant"),
            one_way=True,
        ),
        # The learning rate in the file is meant for the optimizer in the file.
        Conflict("optimizer", "learning_rate", clash=_is_prodigy, one_way=True),
        *(
            Conflict(
                "optimizer", name, f"--optimizer prodigy {reason}. Leave --{name} out.",
                lambda flags, name=name: _is_prodigy(flags) and flags[name], one_way=True,
            )
            for name, reason in {
                "loraplus_lr_ratio": "has a single learning rate", "text_encoder_lr": "has a single learning rate",
                "scale_lr": "finds the learning rate itself",
            }.items()
        ),
    )  # fmt: skip
    remarks: ClassVar = (
        Remark(
            "learning_rate", "is a factor of the learning rate that --optimizer prodigy finds itself, and should be near 1: leave it out",
            lambda flags: _is_prodigy(flags) and not 0.1 <= flags["learning_rate"] <= 10,
        ),
        Remark("ema_decay", "has no effect without --use_ema", lambda flags: not flags["use_ema"]),
    )  # fmt: skip
    # fmt: off
    optimizer: str | None = flag(None, "optimizer (default: adamw)", choices=[*OPTIMIZERS])
    optimizer_args: tuple[str, ...] = flag((), "further options of the optimizer, such as d_coef=0.5", nargs="+", metavar="KEY=VALUE", may_change=True)
    learning_rate: float | None = flag(None, "learning rate after warmup (default: 1e-4, or 1 with --optimizer prodigy)", above(0), may_change=True)
    text_encoder_lr: float | None = flag(None, "learning rate of the text encoder's LoRA (default: --learning_rate)", above(0), may_change=True)
    loraplus_lr_ratio: float | None = flag(None, "LoRA+: ratio of the learning rate of the B matrices to that of the A matrices; 16 is usual", above(0), may_change=True)
    scale_lr: bool = flag(False, "multiply the learning rate by processes x accumulation steps x batch size", may_change=True)
    adam_beta1: float = flag(0.9, "decay rate of the optimizer's first moment", from_up_to(0, 1), may_change=True)
    adam_beta2: float = flag(0.999, "decay rate of the optimizer's second moment", from_up_to(0, 1), may_change=True)
    adam_weight_decay: float = flag(1e-2, "weight decay of the optimizer", at_least(0), may_change=True)
    adam_epsilon: float = flag(1e-8, "epsilon that the optimizer adds to its denominator", at_least(0), may_change=True)
    max_grad_norm: float = flag(1.0, "maximum gradient norm, for clipping; 0: no clipping", at_least(0), may_change=True)
    use_ema: bool = flag(False, "validate and save the exponential moving average of the LoRA's weights")
    ema_decay: float = flag(0.999, "maximum decay of the moving average of --use_ema, which rises to it from lower values", from_up_to(0, 1), may_change=True)
    use_8bit_adam: bool = flag(False, "equivalent to --optimizer adamw8bit", may_change=True, title=COMPATIBILITY)
    # fmt: on

    @property
    def name(self) -> str:
        """The key in `OPTIMIZERS`."""
        return "adamw8bit" if self.use_8bit_adam else self.optimizer or "adamw"

    @property
    def rate(self) -> float:
        """The learning rate, with the default for the optimizer."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1.0 if self.name == "prodigy" else 1e-4

    def scaled(self, effective_batch_size: int) -> "OptimizerSettings":
        """Returns these settings with --scale_lr applied to the learning rates."""
        if not self.scale_lr:
            return self
        text_encoder_lr = None if self.text_encoder_lr is None else effective_batch_size * self.text_encoder_lr
        rate = effective_batch_size * self.rate
        return dataclasses.replace(self, learning_rate=rate, text_encoder_lr=text_encoder_lr)

    def check(self, settings):
        check_optimizer(self.name, self.optimizer_args)


@dataclass(frozen=True)
class ScheduleSettings:
    """The schedule of the learning rate."""

    title: ClassVar = "learning rate schedule"
    conflicts: ClassVar = (
        Conflict("lr_warmup_steps", "lr_warmup_ratio", "Pass one of --lr_warmup_steps and --lr_warmup_ratio."),
    )
    remarks: ClassVar = (
        *(
            Remark(
                name, "has no effect with --lr_scheduler constant and piecewise_constant, which have no warmup; use "
                "constant_with_warmup or another scheduler",
                lambda flags, name=name: flags[name] and flags["lr_scheduler"] in WITHOUT_WARMUP,
            )
            for name in ("lr_warmup_steps", "lr_warmup_ratio")
        ),
        *(
            Remark(
                name, f"has no effect without --lr_scheduler {scheduler}",
                lambda flags, scheduler=scheduler: flags["lr_scheduler"] != scheduler,
            )
            for name, scheduler in {
                "lr_num_cycles": "cosine_with_restarts", "lr_power": "polynomial", "lr_step_rules": "piecewise_constant",
            }.items()
        ),
    )  # fmt: skip
    # fmt: off
    lr_scheduler: str = flag("constant", "schedule of the learning rate", choices=["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "piecewise_constant"], may_change=True)
    lr_warmup_steps: int | None = flag(None, "number of optimizer steps in which the learning rate rises from 0 (default: 500, but at most a tenth of the run)", count(0), may_change=True)
    lr_warmup_ratio: float | None = flag(None, "fraction of the run in which the learning rate rises from 0, instead of --lr_warmup_steps", between(0, 1), may_change=True)
    lr_num_cycles: int = flag(1, "number of cycles of --lr_scheduler cosine_with_restarts", count(1), may_change=True)
    lr_power: float = flag(1.0, "power of --lr_scheduler polynomial", at_least(0), may_change=True)
    lr_step_rules: str = flag("", "factors of --lr_scheduler piecewise_constant and the steps at which they end, such as 1:100,0.1:200,0.01", may_change=True)
    # fmt: on

    def num_warmup_steps(self, num_steps: int) -> int:
        """Returns the number of warmup steps; raises `InputError` if they leave none for a polynomial schedule."""
        if self.lr_warmup_ratio is not None:
            warmup_steps = round(self.lr_warmup_ratio * num_steps)
        elif self.lr_warmup_steps is not None:
            warmup_steps = self.lr_warmup_steps
        else:
            warmup_steps = min(500, num_steps // 10)
        if self.lr_scheduler == "polynomial" and warmup_steps >= num_steps:
            raise InputError(
                f"--lr_scheduler polynomial: {warmup_steps} of {num_steps} steps are warmup. Use fewer warmup steps."
            )
        return warmup_steps

    def describe_long_warmup(self, num_steps: int) -> str | None:
        """Returns a line about warmup that does not end before the run, or None."""
        warmup_steps = self.num_warmup_steps(num_steps)
        if self.lr_scheduler in WITHOUT_WARMUP or warmup_steps < num_steps:
            return None
        flag = "lr_warmup_steps" if self.lr_warmup_ratio is None else "lr_warmup_ratio"
        return (
            f"--{flag}: the warmup of {counted(warmup_steps, 'step')} does not end in the run of "
            f"{counted(num_steps, 'step')}, so the learning rate stays below --learning_rate; use fewer warmup steps"
        )

    def check_rate(self, learning_rate: float) -> None:
        """Raises `InputError` for a learning rate below that at which diffusers' polynomial schedule ends."""
        if self.lr_scheduler == "polynomial" and learning_rate <= 1e-7:
            raise InputError(
                f"--learning_rate {learning_rate}: --lr_scheduler polynomial ends at 1e-07. Pass a higher learning rate."
            )

    def check(self, settings):
        if self.lr_scheduler == "piecewise_constant" and not self.lr_step_rules:
            raise InputError("--lr_scheduler piecewise_constant needs --lr_step_rules, such as 1:100,0.1:200,0.01.")
        factor = r"\d*\.?\d+(e[+-]?\d+)?"
        if not re.fullmatch(rf"({factor}:\d+,)*{factor}", self.lr_step_rules or "1"):
            raise InputError(
                f"--lr_step_rules {self.lr_step_rules}: write pairs factor:step and then the last factor, such as "
                "1:100,0.1:200,0.01."
            )
        if not settings.optimizer.scale_lr:
            self.check_rate(settings.optimizer.rate)
