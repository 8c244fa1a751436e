"""What changes the weights: the optimizer, its schedule, and the moving average of what is trained."""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import InputError
from ..models import lean, lora
from .optimizers import OPTIMIZERS, check_optimizer
from .settings import OptimizerSettings, ScheduleSettings


def make_optimizer(settings: OptimizerSettings, groups: list[dict], device: torch.device) -> torch.optim.Optimizer:
    """The optimizer for parameter groups; betas, weight decay and epsilon go to those that have them."""
    name = settings.name
    optimizer_class, options = check_optimizer(name, settings.optimizer_args)
    if optimizer_class is None:
        optimizer_class = torch.optim.AdamW
    changes = OPTIMIZERS[name].changes
    given = {"betas": (settings.adam_beta1, settings.adam_beta2), "weight_decay": settings.adam_weight_decay}
    given |= {} if name == "adafactor" else {"eps": settings.adam_epsilon}
    if name == "adamw":
        changes = {"fused": device.type in ("cuda", "cpu") and not options.get("foreach")}
    known = inspect.signature(optimizer_class.__init__).parameters
    given = {key: value for key, value in given.items() if key in known}
    given = given | changes | options
    try:
        if name == "schedulefree" and not given["betas"][0]:
            raise InputError("--optimizer schedulefree needs a first beta above 0 (--adam_beta1): it averages by it.")
        return optimizer_class(groups, lr=settings.rate, **given)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        raise InputError(
            f"--optimizer {name}: {str(error) or type(error).__name__}. Check --optimizer_args."
        ) from error


def parameter_groups(model, learning_rate, lr_ratio=None):
    """The parameters to train; with `lr_ratio` the B matrices have that times the learning rate.

    LoRA+ (Hayou et al., 2024, https://arxiv.org/abs/2402.12354).
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if lr_ratio is None:
        return [{"params": [parameter for _, parameter in trained], "lr": learning_rate}]
    of_b = [parameter for name, parameter in trained if "lora_B" in name]
    others = [parameter for name, parameter in trained if "lora_B" not in name]
    return [{"params": others, "lr": learning_rate}, {"params": of_b, "lr": learning_rate * lr_ratio}]


def step_if_finite(optimizer, number):
    """A step of Accelerate's optimizer, unless the tensor `number` isn't finite: then weights and state stay.

    The fused kernels look at it on the device, as they do for a loss scaler, and a scaler has looked itself. The other
    optimizers would make all of their state of what is not a number: for them the host waits and looks.
    """
    inner = optimizer.optimizer
    if optimizer.scaler is None:
        if inner.param_groups[0].get("fused"):
            inner.found_inf = (number * 0 != 0).float()
        elif not number.isfinite():
            return
    optimizer.step()


class Learning:
    """The optimizer, the learning rate schedule and the moving average of a run, as one value.

    Args:
        adapted: The adapted models by component; text encoders may have a learning rate of their own.
        optimizer: With the learning rates of the run (`OptimizerSettings.scaled`).
        num_steps: Optimizer steps of the run, of which the learning rate rises in the first `num_warmup_steps`.
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
        """Wraps the optimizer for the accelerator, after the models."""
        self.optimizer = accelerator.prepare(self.optimizer)

    def step(self, number: torch.Tensor) -> float:
        """An optimizer step, unless `number` is not finite; returns the learning rate that it had.

        The schedule goes on where the step was skipped, as to ask for that would wait for the GPU.
        """
        step_if_finite(self.optimizer, number)
        lr = self.lr_scheduler.get_last_lr()[0]
        self.lr_scheduler.step()
        if self.average is not None:
            self.average.step(self.parameters)
        self.optimizer.zero_grad()
        return lr

    @contextlib.contextmanager
    def weights_for_use(self) -> Iterator[None]:
        """Inside, the parameters have the weights to validate and to save; the training's own are put back to the bit.

        These differ with a moving average (diffusers' `EMAModel`), and with schedule-free optimizers, which have two sets
        of weights (`eval` and `train` go from one to the other and back, but not exactly).
        """
        # Accelerate's wrapper always has an `eval`.
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
