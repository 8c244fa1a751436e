"""The optimizer, its learning rate schedule, and the moving average of the weights."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import InputError
from ..models import lean, lora
from .learning_settings import OptimizerSettings, ScheduleSettings
from .optimizers import OPTIMIZERS, check_optimizer


def make_optimizer(settings: OptimizerSettings, groups: list[dict], device: torch.device) -> torch.optim.Optimizer:
    """Creates the optimizer; betas, weight decay and epsilon are passed to classes that accept them."""
    name = settings.name
    optimizer_class, options = check_optimizer(name, settings.optimizer_args)
    if optimizer_class is None:
        optimizer_class = torch.optim.AdamW
    changes: dict[str, Any] = OPTIMIZERS[name].changes
    given: dict[str, Any] = {
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "weight_decay": settings.adam_weight_decay,
    }
    if name != "adafactor":
        given["eps"] = settings.adam_epsilon
    if name == "adamw":
        changes = {"fused": device.type in ("cuda", "cpu") and not options.get("foreach")}
    known = inspect.signature(optimizer_class.__init__).parameters
    given = {key: value for key, value in given.items() if key in known}
    given = given | changes | options
    try:
        if name == "schedulefree" and not given["betas"][0]:
            raise InputError(
                "--optimizer schedulefree needs a first beta (--adam_beta1) above 0, which weights its average."
            )
        return optimizer_class(groups, lr=settings.rate, **given)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        raise InputError(
            f"--optimizer {name}: {str(error) or type(error).__name__}. Check --optimizer_args."
        ) from error


def parameter_groups(
    model: torch.nn.Module, learning_rate: float, lr_ratio: float | None = None
) -> list[dict[str, Any]]:
    """Returns the optimizer's groups of trainable parameters; with `lr_ratio`, B matrices have that multiple of the rate.

    The ratio is that of LoRA+ (Hayou et al., 2024, https://arxiv.org/abs/2402.12354).
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if lr_ratio is None:
        return [{"params": [parameter for _, parameter in trained], "lr": learning_rate}]
    matrices_b = [parameter for name, parameter in trained if "lora_B" in name]
    others = [parameter for name, parameter in trained if "lora_B" not in name]
    return [{"params": others, "lr": learning_rate}, {"params": matrices_b, "lr": learning_rate * lr_ratio}]


def step_if_finite(optimizer: Any, number: torch.Tensor) -> None:
    """Steps Accelerate's optimizer, or leaves weights and state unchanged if the tensor `number` is not finite.

    Fused kernels check this on the device, as they do for a loss scaler, and a loss scaler checks it too. Other optimizers
    would spread NaN to their whole state, so for them the host waits for the number and checks it.
    """
    inner = optimizer.optimizer
    if optimizer.scaler is None:
        if inner.param_groups[0].get("fused"):
            inner.found_inf = (number * 0 != 0).float()
        elif not number.isfinite():
            return
    optimizer.step()


class Learning:
    """The optimizer, the learning rate schedule and the moving average of a run.

    Args:
        adapted: The adapted models by component; text encoders may have their own learning rate.
        optimizer: The settings, with the learning rates of the run (`OptimizerSettings.scaled`).
        num_steps: Optimizer steps of the run, including `num_warmup_steps`.
        scaler: The loss scaler of fp16, or None.
    """

    def __init__(
        self, adapted: dict[str, torch.nn.Module], optimizer: OptimizerSettings, schedule: ScheduleSettings, *,
        num_steps: int, num_warmup_steps: int, device: torch.device, scaler: Any = None,
    ):  # fmt: skip
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        groups = []
        for name, model in adapted.items():
            own = optimizer.text_encoder_lr if name.startswith("text_encoder") else None
            parts = parameter_groups(model, optimizer.rate if own is None else own, optimizer.loraplus_lr_ratio)
            flat = OPTIMIZERS[optimizer.name].elementwise
            held = lean.use_lean_forward(model, [part["params"] for part in parts], flat=flat)
            groups += [part | {"params": params} for part, params in zip(parts, held, strict=True)]
        self.optimizer: Any = make_optimizer(optimizer, groups, device)
        self.lr_scheduler = get_scheduler(
            schedule.lr_scheduler,
            self.optimizer,
            step_rules=schedule.lr_step_rules or None,
            num_warmup_steps=num_warmup_steps,
            num_training_steps=num_steps,
            num_cycles=schedule.lr_num_cycles,
            power=schedule.lr_power,
        )
        self.parameters = [parameter for model in adapted.values() for parameter in lora.trainable_parameters(model)]
        self.average = None
        if optimizer.use_ema:
            self.average = EMAModel(self.parameters, decay=optimizer.ema_decay, foreach=True)
        self.ema_decay = optimizer.ema_decay
        self.scaler = scaler

    def prepare(self, accelerator: Any) -> None:
        """Wraps the optimizer for the accelerator. Must be called after the models are prepared."""
        self.optimizer = accelerator.prepare(self.optimizer)

    def step(self, number: torch.Tensor) -> float:
        """Takes an optimizer step, unless `number` is not finite, and returns its learning rate.

        The schedule also advances when the step is skipped, as checking that would wait for the GPU.
        """
        lr = float(self.lr_scheduler.get_last_lr()[0]) * self._found_rate()
        step_if_finite(self.optimizer, number)
        self.lr_scheduler.step()
        if self.average is not None:
            self.average.step(self.parameters)
        self.optimizer.zero_grad()
        return lr

    def _found_rate(self):
        """The learning rate that Prodigy has found, of which the schedule is a factor; 1 for other optimizers."""
        return float(self.optimizer.param_groups[0].get("d", 1))

    @contextlib.contextmanager
    def weights_for_use(self) -> Iterator[None]:
        """Replaces the parameters by the weights to validate and save, and restores the training weights bit by bit.

        The weights differ with a moving average (diffusers' `EMAModel`) and with schedule-free optimizers, whose `eval` and
        `train` switch between two sets of weights, with rounding errors.
        """
        # Looks at the wrapped optimizer, as Accelerate's wrapper always has an `eval`.
        two_sets = hasattr(getattr(self.optimizer, "optimizer", self.optimizer), "eval")
        if self.average is None and not two_sets:
            yield
            return
        before = [parameter.detach().clone() for parameter in self.parameters]
        if two_sets:
            self.optimizer.eval()
        if self.average is not None:
            self.average.copy_to(self.parameters)
        try:
            yield
        finally:
            if two_sets:
                self.optimizer.train()
            with torch.no_grad():
                for parameter, value in zip(self.parameters, before, strict=True):
                    parameter.copy_(value)
