"""A training that goes on where it stopped: of the small base's parts, or of its ControlNet."""

import os
import time


class Stage:
    """One of the trainings: its weights, their moving average, its optimizer, how far it is and what it has cost.

    `modules` is an `nn.Module`; `parameters` those of its parameters that learn. The state on disk is replaced whole.
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
        """Steps to the end; `loss_at(step)` draws a batch and returns its loss."""
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
        loss, self.losses = float(sum(self.losses) / len(self.losses)), []
        left = self.seconds / self.step * (self.steps - self.step)
        print(
            f"{self.name} {self.step}/{self.steps}  loss {loss:.4f}  "
            f"{self.seconds / 60:.1f} min spent, {left / 60:.1f} min left",
            flush=True,
        )

    def save(self):
        """Whole or not at all: a kill leaves the state before."""
        import torch

        torch.save(
            {"model": self.modules.state_dict(), "optimizer": self.optimizer.state_dict(), "average": self.average,
             "step": self.step, "seconds": self.seconds},
            self.path.with_suffix(".tmp"),
        )  # fmt: skip
        os.replace(self.path.with_suffix(".tmp"), self.path)

    def finish(self):
        self.modules.load_state_dict(self.average)
        return self.modules.eval().requires_grad_(False)


def keep_norms_in_float32(model):
    """GroupNorm's bfloat16 backward in channels_last takes four times as long on a CPU."""
    import torch

    class FloatGroupNorm(torch.nn.GroupNorm):
        def forward(self, x):
            return torch.nn.functional.group_norm(x.float(), self.num_groups, self.weight, self.bias, self.eps).to(x)

    for module in model.modules():
        if type(module) is torch.nn.GroupNorm:
            module.__class__ = FloatGroupNorm
