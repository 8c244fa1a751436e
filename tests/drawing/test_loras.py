"""LoRA files that stock diffusers misreads are drawn as what they say: the base model with their updates in its weights."""

import copy
import json
from pathlib import Path

import pytest
import torch
from infer_fixtures import difference, draw
from safetensors.torch import save_file

from text_to_image_lora.drawing import find, loras, pipeline
from text_to_image_lora.drawing.rows import Lora
from text_to_image_lora.models.dialects import WEIGHTS_NAME
from text_to_image_lora.models.lora_file import ADAPTER_METADATA_KEY


pytestmark = [pytest.mark.usefixtures("library_settings"), pytest.mark.lora_file]

ENDS = {"unet": ("to_q", "to_k", "to_v", "to_out.0"), "text_encoder": ("q_proj", "v_proj", "fc1", "fc2")}
# {kind: ({end of a module's name: rank}, ends with DoRA, ends with a bias, configuration in the header or None)}
RANKS = {"to_q": 4, "to_k": 4, "to_v": 4, "to_out.0": 4, "q_proj": 4, "v_proj": 4, "fc1": 4}
MIXED = RANKS | {"to_q": 1, "to_v": 8, "q_proj": 1, "fc1": 8}
ONE_RANK = {"r": 4, "lora_alpha": 4, "rank_pattern": {}, "alpha_pattern": {}}
KINDS = {
    "mixed ranks": (MIXED, (), (), None),
    "mixed ranks with DoRA": (MIXED, tuple(RANKS), (), None),
    "DoRA on some layers": (RANKS, ("to_k", "to_out.0", "v_proj"), (), None),
    "mixed ranks with DoRA on some layers": (MIXED, ("to_q", "q_proj"), (), None),
    "a bias on some layers": (RANKS, (), ("to_out.0", "fc1"), None),
    "rsLoRA": (RANKS, (), (), ONE_RANK | {"use_rslora": True}),
    "mixed alphas": (RANKS, (), (), ONE_RANK | {"alpha_pattern": {"to_q": 1, "fc1": 12}}),
    "mixed ranks and alphas": (MIXED, (), (), ONE_RANK | {"rank_pattern": {"to_q": 1}, "alpha_pattern": {"to_q": 3}}),
    "part of a configuration": (RANKS, (), (), {"r": 4, "lora_alpha": 2}),
    "no attention layer in the text encoder": ({"to_q": 4, "fc1": 4, "fc2": 8}, (), (), None),
    "no attention layer in the text encoder, with DoRA": ({"to_q": 4, "fc1": 4}, ("fc1",), (), None),
    "no attention layer in the text encoder, with a bias": ({"to_q": 4, "fc1": 4, "fc2": 4}, (), ("fc2",), None),
    "feed-forward layers alone": ({"fc1": 64, "fc2": 64}, (), (), ONE_RANK | {"r": 64, "lora_alpha": 32}),
    "one rank": (RANKS, (), (), None),
    "one rank with DoRA": (RANKS, tuple(RANKS), (), None),
    "one rank, and an alpha in the header": (RANKS, (), (), ONE_RANK | {"lora_alpha": 2}),
}
BY_STOCK = ("one rank", "one rank with DoRA", "one rank, and an alpha in the header")


def scale_in(config, end, rank):
    """The factor of B·A by the rules of peft."""
    if config is None:
        return 1.0
    alpha = config.get("alpha_pattern", {}).get(end, config["lora_alpha"])
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def write_kind(tiny_pipeline, path, kind, strength):
    """Writes a LoRA of a kind; returns the models with its updates at this strength in their weights, by hand."""
    ranks, with_dora, with_bias, config = KINDS[kind]
    torch.manual_seed(4)
    tensors, models, header = {}, {}, {}
    for component, ends in ENDS.items():
        models[component] = model = copy.deepcopy(getattr(tiny_pipeline, component))
        for name, module in model.named_modules():
            end = next((end for end in ends if end in ranks and name.endswith(f".{end}")), None)
            if end is None:
                continue
            weight, rank, key = module.weight.data, ranks[end], f"{component}.{name}"
            a, b = torch.randn(rank, weight.shape[1]) * 0.3, torch.randn(len(weight), rank) * 0.3
            tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
            scale = strength * scale_in(config, end, rank)
            new = weight + scale * (b @ a)
            if end in with_dora:
                magnitude = weight.norm(dim=1) * (0.5 + torch.rand(len(weight)))
                tensors[f"{key}.lora_magnitude_vector.weight"] = magnitude
                new = new * (magnitude / new.norm(dim=1))[:, None]
            if end in with_bias:
                bias = torch.randn(len(weight)) * 0.3
                tensors[f"{key}.lora_B.bias"] = bias
                own = module.bias.data if module.bias is not None else 0
                module.bias = torch.nn.Parameter(own + scale * bias)
            module.weight.data = new
        if config is not None:
            targets = sorted(
                {key.partition(".lora_")[0].partition(".")[2] for key in tensors if key.startswith(f"{component}.")}
            )
            header |= {f"{component}.{k}": v for k, v in (config | {"target_modules": targets}).items()}
    save_file(tensors, path, {"format": "pt"} | ({ADAPTER_METADATA_KEY: json.dumps(header)} if header else {}))
    return models


@pytest.mark.parametrize("strength", [1, 0.6])
@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_is_drawn_as_its_updates_say(tiny_pipeline, model, tmp_path, monkeypatch, kind, strength):
    models = write_kind(tiny_pipeline, tmp_path / "lora.safetensors", kind, strength)
    (drawn,) = draw(model, tmp_path / "a", "--lora", f"{tmp_path / 'lora.safetensors'}:{strength}").values()
    load = pipeline.load_pipeline

    def with_updates(*args):
        pipe = load(*args)
        pipe.register_modules(**models)
        return pipe

    (base,) = draw(model, tmp_path / "b").values()
    monkeypatch.setattr(pipeline, "load_pipeline", with_updates)
    (wanted,) = draw(model, tmp_path / "c").values()
    assert difference(drawn, wanted) <= 1
    assert difference(drawn, base) > 10


@pytest.mark.parametrize("kind", KINDS)
def test_stock_diffusers_reads_only_what_it_provably_reads_right(tiny_pipeline, tmp_path, kind):
    write_kind(tiny_pipeline, tmp_path / "lora.safetensors", kind, 1)
    lora = find.find_lora(str(tmp_path / "lora.safetensors"), 1.0, "lora0")
    assert loras.stock_reads(lora) == (kind in BY_STOCK)


def test_a_lora_whose_name_is_in_capital_letters(model, lora, compared, tmp_path):
    """diffusers itself would read such a file as a pickle."""
    path = tmp_path / "AXE.SAFETENSORS"
    path.write_bytes((Path(lora) / WEIGHTS_NAME).read_bytes())
    (drawn,) = draw(model, tmp_path / "out", "--lora", path).values()
    assert difference(drawn, compared[1]) <= 1


EVIL = "(([a-z0-9_.]+)+)+X"


@pytest.mark.parametrize(
    "field",
    [
        {"target_modules": EVIL}, {"exclude_modules": EVIL}, {"layers_pattern": EVIL, "layers_to_transform": [0]},
        {"alpha_pattern": {EVIL: 2}}, {"rank_pattern": {EVIL: 2}}, {"target_parameters": [EVIL]},
    ],
)  # fmt: skip
def test_peft_gets_no_regular_expression_of_a_header(tmp_path, field):
    """Stock diffusers would compile it; such files go through our converter, which reads names only."""
    shapes = {f"unet.mid_block.to_q.lora_{leaf}.weight": (4, 4) for leaf in "AB"}
    plain = {"unet.r": 4, "unet.lora_alpha": 4, "unet.rank_pattern": {}, "unet.alpha_pattern": {}}
    for changes, read in (({}, True), ({f"unet.{name}": value for name, value in field.items()}, False)):
        header = {ADAPTER_METADATA_KEY: json.dumps(plain | changes)}
        assert loras.stock_reads(Lora("a", tmp_path / "a.safetensors", 1.0, "a", shapes, header)) is read
