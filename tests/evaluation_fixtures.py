"""A CLIP and a DINOv2 model with one layer each, for tests of evaluations."""

import json

import pytest


@pytest.fixture(scope="session")
def clip_model(tmp_path_factory):
    """Saves a CLIP model with one layer per encoder, and the tokenizer of the embedded base model."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    from scripts.mini_sd.model import write_tokenizer

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = write_tokenizer(folder / "words")
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    tokens = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = CLIPModel(
        CLIPConfig(
            text_config=sizes | tokens | dict(vocab_size=len(tokenizer), max_position_embeddings=20),
            vision_config=sizes | dict(image_size=224, patch_size=56), projection_dim=16,
        )
    )  # fmt: skip
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def dino_model(tmp_path_factory):
    """Saves a DINOv2 model with one layer, and its preprocessing."""
    import torch
    from transformers import Dinov2Config, Dinov2Model

    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    Dinov2Model(
        Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14)
    ).save_pretrained(folder)
    how = {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}
    (folder / "preprocessor_config.json").write_text(json.dumps(how))
    return folder
