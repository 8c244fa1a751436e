"""Optimizers by name, from the libraries that keep them; their options are checked before a model is loaded."""

import ast
import contextlib
import difflib
import importlib
import inspect
from typing import NamedTuple

from ..errors import InputError


# name: (module, class, what differs from its own defaults, package to install, bytes it keeps for each weight)
OPTIMIZERS = {
    "adamw": ("torch.optim", "AdamW", {}, "torch", 8),
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit", {}, "bitsandbytes", 2),
    # Mishchenko and Defazio, 2023, https://arxiv.org/abs/2306.06101: finds the step size itself; its learning rate is 1.
    # From its own first estimate of 1e-6 a LoRA, whose B is 0, hardly moves in its first 50 steps.
    "prodigy": ("prodigyopt", "Prodigy", {"use_bias_correction": True, "d0": 1e-5}, "prodigyopt", 16),
    # Defazio et al., 2024, https://arxiv.org/abs/2405.15682: needs no schedule
    "schedulefree": ("schedulefree", "AdamWScheduleFree", {"foreach": False}, "schedulefree", 8),
    # Shazeer and Stern, 2018, https://arxiv.org/abs/1804.04235; with a learning rate of ours, not its own
    "adafactor": ("transformers", "Adafactor", {"scale_parameter": False, "relative_step": False}, "transformers", 0),
}
# They treat each number alone: any of the others looks at the shape or the size of a tensor.
ELEMENTWISE = {"adamw", "prodigy", "schedulefree"}
RESERVED = ("self", "params", "lr")
BREAKING = ("capturable", "differentiable")  # options for a step that is recorded or differentiated: ours is neither


def parse_options(words):
    """{"key": value} of words such as `d_coef=0.5`; values are Python literals, `true` and `false` too, or strings."""
    options = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key.isidentifier():
            raise InputError(f"--optimizer_args {word}: write key=value, such as weight_decay=0.1")
        try:
            options[key] = ast.literal_eval({"true": "True", "false": "False"}.get(value, value))
        except (ValueError, SyntaxError):
            options[key] = value
    return options


def check_optimizer(name, words):
    """The optimizer's class and the options in `words`; an `InputError` where it isn't installed or has no such option."""
    module, class_name, _, package, _ = OPTIMIZERS[name]
    options = parse_options(words)
    if not options and name == "adamw":
        return None, {}  # so that torch isn't imported to look at nothing
    try:
        optimizer_class = getattr(importlib.import_module(module), class_name)
    except ImportError as error:
        raise InputError(f"--optimizer {name} needs {package}. Run: pip install {package}") from error
    parameters = inspect.signature(optimizer_class.__init__).parameters
    known = [key for key in parameters if key not in RESERVED]
    for key, value in options.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0)[0]
            raise InputError(f"--optimizer_args {key}: {name} has no such option. Did you mean {near}?")
        if key in BREAKING:
            raise InputError(f"--optimizer_args {key}: it can't be used with this training loop. Leave it out.")
        if isinstance(value, str) and isinstance(parameters[key].default, (int, float, tuple)):
            raise InputError(f"--optimizer_args {key}={value}: write a value such as {parameters[key].default}.")
    return optimizer_class, options


class OptimizerSettings(NamedTuple):
    """Which optimizer, and what it is told."""

    name: str
    learning_rate: float
    text_encoder_lr: float | None = None  # None: the same
    loraplus_lr_ratio: float | None = None  # how many times the learning rate the B matrices have
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 1e-2
    epsilon: float = 1e-8
    options: tuple[str, ...] | list[str] = ()  # key=value; they go before all else


class Schedule(NamedTuple):
    """How the learning rate changes over a run; step counts are optimizer steps."""

    name: str
    num_steps: int
    warmup_steps: int = 0
    num_cycles: int = 1
    power: float = 1.0
    step_rules: str | None = None


def make_optimizer(settings, groups, device):
    """The optimizer for parameter groups; betas, weight decay and epsilon go to those that have them."""
    name = settings.name
    optimizer_class, options = check_optimizer(name, settings.options)
    if optimizer_class is None:
        import torch

        optimizer_class = torch.optim.AdamW
    _, _, changes, _, _ = OPTIMIZERS[name]
    given = {"betas": settings.betas, "weight_decay": settings.weight_decay}
    given |= {} if name == "adafactor" else {"eps": settings.epsilon}
    if name == "adamw":
        changes = {"fused": device.type in ("cuda", "cpu") and not options.get("foreach")}
    known = inspect.signature(optimizer_class.__init__).parameters
    given = {key: value for key, value in given.items() if key in known}
    given = given | changes | options
    try:
        if name == "schedulefree" and not given["betas"][0]:
            raise InputError("--optimizer schedulefree needs a first beta above 0 (--adam_beta1): it averages by it.")
        return optimizer_class(groups, lr=settings.learning_rate, **given)
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


def make_optimizer_and_schedule(models, settings, schedule, device):
    """(optimizer, lr_scheduler) for the adapted models, a dict by component: text encoders may have a rate of their own."""
    from diffusers.optimization import get_scheduler

    from ..models import lean

    groups = []
    for name, model in models.items():
        own = settings.text_encoder_lr if name.startswith("text_encoder") else None
        learning_rate = settings.learning_rate if own is None else own
        parts = parameter_groups(model, learning_rate, settings.loraplus_lr_ratio)
        held = lean.hold_lean(model, [part["params"] for part in parts], flat=settings.name in ELEMENTWISE)
        groups += [part | {"params": params} for part, params in zip(parts, held, strict=True)]
    optimizer = make_optimizer(settings, groups, device)
    lr_scheduler = get_scheduler(
        schedule.name,
        optimizer,
        step_rules=schedule.step_rules,
        num_warmup_steps=schedule.warmup_steps,
        num_training_steps=schedule.num_steps,
        num_cycles=schedule.num_cycles,
        power=schedule.power,
    )
    return optimizer, lr_scheduler


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


@contextlib.contextmanager
def weights_for_use(parameters, optimizer, average=None):
    """Inside, the parameters have the weights to validate and to save; the training's own are put back to the bit.

    These differ with a moving average (diffusers' `EMAModel`), and with schedule-free optimizers, which have two sets of
    weights (`eval` and `train` go from one to the other and back, but not exactly).
    """
    import torch

    two_sets = hasattr(getattr(optimizer, "optimizer", optimizer), "eval")  # Accelerate's wrapper always has it
    if average is None and not two_sets:
        yield
        return
    before = [parameter.detach().clone() for parameter in parameters]
    if two_sets:
        optimizer.eval()
    if average is not None:
        average.copy_to(parameters)
    try:
        yield
    finally:
        if two_sets:
            optimizer.train()
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
