"""With our LoRA file, stock diffusers draws the picture of `infer.py`, bit for bit, without importing this project."""

import json
import subprocess
import sys

import pytest
from infer_fixtures import PROMPT, draw
from PIL import Image

from text_to_image_lora.models.dialects import WEIGHTS_NAME


pytestmark = pytest.mark.usefixtures("library_settings")
# (strength of the LoRA or None, sampler in infer.py, sampler in diffusers)
PICTURES = [
    (None, "dpm++", "DPMSolverMultistepScheduler"),
    (0.7, "dpm++", "DPMSolverMultistepScheduler"),
    (1.0, "euler_a", "EulerAncestralDiscreteScheduler"),
]
# The script of a user who has only diffusers and the file.
STOCK = """
import importlib, json, sys

for name in ("text_to_image_lora", "infer", "train_text_to_image_lora"):
    sys.modules[name] = None  # wherever it may be found
    try:
        importlib.import_module(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} can be imported")
sys.modules |= {"bitsandbytes": None, "xformers": None}  # not needed, and slow to import

import diffusers, torch

torch.set_num_threads(1)
asked = json.loads(sys.argv[1])
pipe = diffusers.DiffusionPipeline.from_pretrained(asked["model"])
for number, (scale, _, scheduler) in enumerate(asked["pictures"]):
    if number == 1:
        pipe.load_lora_weights(asked["lora"], weight_name=asked["weight_name"], adapter_name="axe")
    if scale is not None:
        pipe.set_adapters("axe", scale)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    options = dict(num_inference_steps=3, guidance_scale=7.5, generator=torch.Generator().manual_seed(7))
    pipe(asked["prompt"], **options).images[0].save(f"{number}.png")
"""


@pytest.mark.parametrize("base", ["tiny_sd", "tiny_xl"])
def test_stock_diffusers_draws_what_infer_draws(request, train, tmp_path, base):
    """The LoRA comes from the training script, its alpha differs from its rank, and it adapts the text encoders too."""
    model = str(request.getfixturevalue(base))
    lora = train(
        pretrained_model_name_or_path=model, rank=4, lora_alpha=8, learning_rate=0.1, train_text_encoder=True,
        max_train_steps=2,
    )  # fmt: skip
    asked = {"model": model, "lora": str(lora), "weight_name": WEIGHTS_NAME, "prompt": PROMPT, "pictures": PICTURES}
    command = [sys.executable, "-I", "-c", STOCK, json.dumps(asked)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for number, (scale, scheduler, _) in enumerate(PICTURES):
        flags = [] if scale is None else ["--lora", f"{lora}:{scale}"]
        flags += ["--num_inference_steps", 3, "--seed", 7, "--scheduler", scheduler]
        (own,) = draw(model, tmp_path / f"own-{number}", *flags).values()
        theirs = Image.open(tmp_path / f"{number}.png")
        assert (own.size, own.tobytes()) == (theirs.size, theirs.tobytes()), number
