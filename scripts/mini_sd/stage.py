"""A training stage that can be resumed, and the noisy batches that the UNet and the ControlNet are trained on."""

import os
import time
from typing import Any, NamedTuple

import numpy as np


class NoisyBatch(NamedTuple):
    """A batch for noise prediction, on the device of the training."""

    indices: np.ndarray  # of its pictures in the training set
    input_ids: Any
    noise: Any
    timesteps: Any
    noisy_latents: Any

    def loss(self, model_pred, weights):
        """Returns the mean squared error of the predicted noise; `weights` has a weight for each timestep."""
        errors = (model_pred.float() - self.noise).square().mean(dim=(1, 2, 3))
        return (weights[self.timesteps] * errors).mean()


class NoisyBatches(NamedTuple):
    """The batches of a training set for noise prediction. A batch depends only on `args.seed`, `stream` and the step.

    `input_ids` are those of `pictures.caption_input_ids`. The full sentence is drawn half of the time, and the empty caption
    for a share `args.caption_dropout` of the pictures. Timesteps are stratified within a batch (Kingma et al., 2021,
    https://arxiv.org/abs/2107.00630).
    """

    args: Any
    stream: int  # one number per model, so that models with the same seed are trained on different batches
    batch_size: int
    latents: Any  # (N, channels, h, w), scaled
    input_ids: Any
    noise_scheduler: Any
    device: Any

    def at(self, step):
        """Returns the `NoisyBatch` of a step."""
        import torch

        rng = np.random.default_rng([self.args.seed, self.stream, step])
        indices = rng.integers(len(self.latents), size=self.batch_size)
        rows = indices * 5 + rng.choice(5, size=self.batch_size, p=[0.5, 0.15, 0.15, 0.1, 0.1])
        rows[rng.random(self.batch_size) < self.args.caption_dropout] = len(self.input_ids) - 1
        latents = self.latents[indices].to(self.device, memory_format=torch.channels_last)
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + step)
        noise = torch.randn(latents.shape, generator=generator).to(self.device)
        strata = torch.arange(len(latents)) + torch.rand(len(latents), generator=generator)
        timesteps = (strata * 1000 / len(latents)).long().to(self.device)
        noisy_latents = self.noise_scheduler.add_noise(latents, noise, timesteps)
        return NoisyBatch(indices, self.input_ids[rows].to(self.device), noise, timesteps, noisy_latents)


class Stage:
    """A training stage: weights, their moving average, the optimizer, the number of steps made, and the time spent.

    `modules` is an `nn.Module`, and `parameters` are those of its parameters that are trained. If there is a checkpoint of
    the stage in `args.work_dir`, the stage resumes from it.
    """

    def __init__(self, name, args, steps, modules, parameters, betas, decay):
        import torch

        self.name = name
        self.steps = steps
        self.modules = modules
        self.decay = decay
        self.parameters = [parameter.requires_grad_(True) for parameter in parameters]
        self.path = args.work_dir / f"{name}.pt"
        self.peak = args.learning_rate
        self.save_every = args.save_every
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.peak, betas=betas, weight_decay=0.0)
        self.average = {k: v.clone().float() for k, v in modules.state_dict().items()}
        self.step = 0
        self.seconds = 0.0
        self.losses = []
        if self.path.exists():
            state = torch.load(self.path, weights_only=True, map_location="cpu")
            modules.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            device = next(modules.parameters()).device
            self.average = {k: v.to(device) for k, v in state["average"].items()}
            self.step, self.seconds = state["step"], state["seconds"]

    @property
    def progress(self):
        return self.step / self.steps

    def train(self, loss_at, warmup=200):
        """Makes the remaining steps and yields after each; `loss_at(step)` draws a batch and returns its loss."""
        import torch

        while self.step < self.steps:
            started = time.time()
            rate = self.peak * min((self.step + 1) / warmup, 1.0) * max(1 - self.progress, 0.01)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss = loss_at(self.step)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.step += 1
            self.losses.append(loss.detach())
            self.update_average(min(self.decay, self.step / (self.step + 10)))
            self.seconds += time.time() - started
            if self.step % 100 == 0:
                self.report()
            if self.step % self.save_every == 0 or self.step == self.steps:
                self.save()
            yield self.step

    def update_average(self, decay):
        """Exponential moving average of the weights (Polyak and Juditsky, 1992)."""
        import torch

        with torch.no_grad():
            values = [(mean, value) for mean, value in zip(self.average.values(), self.modules.state_dict().values())
                      if mean.is_floating_point()]  # fmt: skip
            torch._foreach_lerp_([mean for mean, _ in values], [value.float() for _, value in values], 1 - decay)

    def report(self):
        """Prints the mean loss since the last report, and the time."""
        loss, self.losses = float(sum(self.losses) / len(self.losses)), []
        left = self.seconds / self.step * (self.steps - self.step)
        print(
            f"{self.name} {self.step}/{self.steps}  loss {loss:.4f}  "
            f"{self.seconds / 60:.1f} min spent, {left / 60:.1f} min left",
            flush=True,
        )

    def save(self):
        """Saves a checkpoint. If the process is killed meanwhile, the previous checkpoint remains."""
        import torch

        torch.save(
            {"model": self.modules.state_dict(), "optimizer": self.optimizer.state_dict(), "average": self.average,
             "step": self.step, "seconds": self.seconds},
            self.path.with_suffix(".tmp"),
        )  # fmt: skip
        os.replace(self.path.with_suffix(".tmp"), self.path)

    def finish(self):
        """Returns the modules with the moving average of their weights, in eval mode."""
        self.modules.load_state_dict(self.average)
        return self.modules.eval().requires_grad_(False)


def keep_norms_in_float32(model):
    """Computes GroupNorm in float32, because its bfloat16 backward in channels_last takes four times as long on a CPU."""
    import torch

    class FloatGroupNorm(torch.nn.GroupNorm):
        def forward(self, x):
            return torch.nn.functional.group_norm(x.float(), self.num_groups, self.weight, self.bias, self.eps).to(x)

    for module in model.modules():
        if type(module) is torch.nn.GroupNorm:
            module.__class__ = FloatGroupNorm


def prepare_denoiser(model, device):
    """Moves a UNet or a ControlNet to the device, in the form in which it is trained fastest."""
    import torch
    from diffusers.models.attention_processor import AttnProcessor

    model.to(device, memory_format=torch.channels_last)
    keep_norms_in_float32(model)
    if device.type == "cpu":  # fused attention takes twice as long on a CPU with such small heads
        model.set_attn_processor(AttnProcessor())
