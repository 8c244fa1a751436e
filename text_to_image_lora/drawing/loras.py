"""Reads LoRA files into a diffusers pipeline, and chooses which of its LoRAs are active."""

import contextlib
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import InputError
from ..models.dialects import COMPONENTS
from ..small_files import is_kind
from .fits import check_fits
from .rows import Lora


# Keys that stock diffusers reads. transformers ignores the magnitudes of DoRA if their names lack `.weight`.
STOCK_KEY = re.compile(
    rf"({'|'.join(COMPONENTS)})\.(.+)\.(lora_[AB]\.weight|lora_B\.bias|lora_magnitude_vector\.weight)"
)

# Options of a configuration in the header that can be set without changing how stock diffusers reads the file. Others could:
# some hold regular expressions.
UNDERSTOOD = {
    "r", "lora_alpha", "target_modules", "use_dora", "lora_bias", "peft_type", "task_type", "bias", "init_lora_weights",
    "inference_mode", "base_model_name_or_path", "revision", "peft_version",
}  # fmt: skip

ATTENTION_OF_TEXT = re.compile(r"\.self_attn\.(q|k|v|out)_proj(\.|$)")


def set_loras(pipe: Any, loras: Sequence[Lora]) -> None:
    """Enables only these LoRAs in the pipeline, each with its scale."""
    if loras:
        pipe.set_adapters([lora.adapter for lora in loras], adapter_weights=[lora.scale for lora in loras])
        pipe.enable_lora()
    elif pipe.get_list_adapters():
        pipe.disable_lora()


@contextlib.contextmanager
def use_loras(pipe: Any, loras: Sequence[Lora]) -> Iterator[None]:
    """Draws with these LoRAs inside the context; the next context sets its own."""
    set_loras(pipe, loras)
    yield


def stock_reads(lora: Lora) -> bool:
    """Returns whether stock diffusers provably reads the file as what it says; others go through our converter.

    diffusers recognizes the LoRA of a text encoder by its attention layers. It uses a single scale, and a single kind of
    adapter (DoRA or not, with or without bias), for all layers of a component. It reads a file with several of them wrongly
    without a warning, or fails.
    """
    from ..models.lora_file import read_adapter_metadata

    if lora.path.suffix != ".safetensors":  # diffusers would unpickle a file named X.SAFETENSORS
        return False
    layers: dict[str, dict[str, set]] = {}  # {component: {layer: its tensors}}
    ranks: dict[str, set[int]] = {}
    for key, shape in lora.shapes.items():
        if not (match := STOCK_KEY.fullmatch(key)):
            return False
        component, layer, leaf = match.groups()
        layers.setdefault(component, {}).setdefault(layer, set()).add(leaf)
        if leaf == "lora_A.weight":
            ranks.setdefault(component, set()).add(shape[0])
    try:
        stored = read_adapter_metadata(lora.header)
        return all(
            len(ranks.get(component, ())) == 1
            and (component == "unet" or any(map(ATTENTION_OF_TEXT.search, found)))
            and all(leaves == next(iter(found.values())) for leaves in found.values())
            and (not stored or _is_plain(stored, component, *ranks[component], *found.values()))
            for component, found in layers.items()
        )
    except InputError:  # not the JSON that diffusers writes
        return False


def _is_plain(stored, component, rank, leaves, *_):
    """Whether the configuration in the header gives all layers of a component the same scale, at this rank."""
    config = {key.partition(".")[2]: value for key, value in stored.items() if key.startswith(f"{component}.")}
    others = [value for key, value in config.items() if key not in UNDERSTOOD and value]
    return (
        not others
        and config.get("r") == rank
        and is_kind(config.get("lora_alpha"), float)
        and is_kind(config.get("target_modules", ["all"]), [str])
        and config.get("rank_pattern") == config.get("alpha_pattern") == {}
        and bool(config.get("use_dora")) == ("lora_magnitude_vector.weight" in leaves)
        and bool(config.get("lora_bias")) == ("lora_B.bias" in leaves)
    )


def read_weights(lora: Lora) -> dict[str, Any] | None:
    """Reads a LoRA that stock diffusers does not read as {key in the files of this project: tensor}; otherwise None.

    Raises `InputError` if the file is not a LoRA of a supported kind, or holds NaN or infinities, also at its strength.
    """
    from ..models.lora_file import as_diffusers
    from ..models.modules import non_finite

    try:
        weights = as_diffusers(lora.path)[0]
    except InputError as error:
        raise InputError(f"--lora {error}") from error
    if faults := non_finite((key, value * lora.scale) for key, value in weights.items() if ".lora_B." in key):
        raise InputError(f"--lora {lora.path}: at the strength {lora.scale:g}, {faults}. Pass a smaller strength.")
    return None if stock_reads(lora) else weights


def load_loras(pipe: Any, loras: Sequence[Lora], weights: dict[str, dict[str, Any] | None], clip_skip: int) -> None:
    """Adds the LoRAs to the pipeline; raises `InputError` if a weight of their files does not fit.

    `weights` are those of `read_weights`, {adapter: {key: tensor}}.
    """
    models = {name: pipe.components[name] for name in COMPONENTS if pipe.components.get(name)}
    shapes = {f"{name}.{k}": v.shape for name, model in models.items() for k, v in model.state_dict().items()}
    check_fits(shapes, loras, clip_skip, pipe.vae.config.latent_channels)
    warnings.filterwarnings("ignore", "Already found a `peft_config`", UserWarning)  # from the previous LoRA
    warnings.filterwarnings("ignore", "`lora_bias=True` was passed", UserWarning)  # it concerns merging only
    for lora in loras:
        own = weights.get(lora.adapter)
        misfit = f"--lora {lora.path} does not fit this base model"
        without_dora: list[str] = []
        added: list[str] = []
        if own is None:
            source, options = str(lora.path.parent), {"weight_name": lora.path.name}
        else:
            whole, added = _with_attention(own, models)
            source, without_dora = _with_dora_everywhere(whole)
            options = {}
        try:
            pipe.load_lora_weights(source, adapter_name=lora.adapter, **options)
        except (
            Exception
        ) as error:  # peft, diffusers and transformers raise many kinds for sizes and names that don't match
            raise InputError(f"{misfit}: {type(error).__name__}: {str(error)[:300]}") from error
        _remove_dora(models, lora.adapter, without_dora)
        for layer in added:
            _module(models, layer).delete_adapter(lora.adapter)
        # diffusers and transformers only warn about a weight that does not fit.
        in_file = sum(key.endswith(".weight") and "lora_magnitude" not in key for key in own or lora.shapes)
        pattern = re.compile(rf".+\.lora_[AB]\.{lora.adapter}\.weight")
        placed = sum(bool(pattern.fullmatch(name)) for m in models.values() for name, _ in m.named_parameters())
        if placed != in_file:
            counts = f"{in_file} weights in the file, {placed} in the model"
            raise InputError(f"{misfit}: {counts}. Pass the base that it was trained on.")


def _with_attention(weights, models):
    """Returns a copy of the weights in which each text encoder has a LoRA on an attention layer, and the added layers.

    diffusers can't load the LoRA of a text encoder that has none, such as one on feed-forward layers alone.
    """
    whole, added = dict(weights), []
    for component in dict.fromkeys(key.partition(".")[0] for key in weights if not key.startswith("unet.")):
        own = [key for key in weights if key.startswith(f"{component}.")]
        if any(map(ATTENTION_OF_TEXT.search, own)):
            continue
        layer = f"{component}.text_model.encoder.layers.0.self_attn.q_proj"
        a = next(weights[key] for key in own if key.endswith(".lora_A.weight"))
        width = models[component].config.hidden_size
        whole |= {
            f"{layer}.lora_A.weight": a.new_zeros(len(a), width),
            f"{layer}.lora_B.weight": a.new_zeros(width, len(a)),
        }
        if any(key.endswith(".lora_B.bias") for key in own):
            whole[f"{layer}.lora_B.bias"] = a.new_zeros(width)
        added.append(layer)
    return whole, added


def _with_dora_everywhere(weights):
    """Returns a copy of the weights in which all layers of a component have DoRA if one has it, and the added layers.

    diffusers can't load a LoRA in which only some layers have DoRA; `_remove_dora` makes the added ones plain again.
    """
    ends = {"down": ".lora_A.weight", "up": ".lora_B.weight", "magnitude": ".lora_magnitude_vector.weight"}
    layers = [key.removesuffix(ends["down"]) for key in weights if key.endswith(ends["down"])]
    with_dora = {layer for layer in layers if layer + ends["magnitude"] in weights}
    components = {layer.partition(".")[0] for layer in with_dora}
    added = [layer for layer in layers if layer.partition(".")[0] in components and layer not in with_dora]
    whole = dict(weights)
    for layer in added:
        up = weights[layer + ends["up"]]
        shape = (1, len(up), 1, 1) if up.dim() == 4 else (len(up),)
        whole[layer + ends["magnitude"]] = up.new_ones(shape)
    return whole, added


def _remove_dora(models, adapter, layers):
    """Turns the adapters of these layers, {component}.{name in the LoRA file}, into plain LoRA."""
    for layer in layers:
        module = _module(models, layer)
        del module.lora_variant[adapter], module.lora_magnitude_vector[adapter]
        module.use_dora[adapter] = False


def _module(models, layer):
    """Returns the module of a layer, {component}.{name in the LoRA file}."""
    component, _, name = layer.partition(".")
    model = models[component]
    if not hasattr(model, "text_model"):  # a level of the names that transformers 5.6 removed
        name = name.removeprefix("text_model.")
    return model.get_submodule(name)
