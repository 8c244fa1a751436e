"""Tiny captioning models with random weights, in the classes and files of the real ones."""

import csv
from pathlib import Path

import numpy as np
import torch


WORDS = "a red blue green dog cat axe house tree on with and sits near large small old sky grass photo of".split()  # noqa: SIM905
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
QWEN_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message.role }} {% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %} {{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def make_tokenizer(special, **named):
    """Returns a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", **named)


def randomise(model, scale=1.0):
    """Gives a model random weights that are large enough for its answers to differ from picture to picture."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # biases and norms would outweigh the picture
            continue
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)
        if any(
            part in name for part in ("embed_tokens", "embed_positions", "word_embeddings", "shared", "position_emb")
        ):
            parameter.data *= 0.1  # or the picture would hardly matter beside the words so far
    if hasattr(model, "generation_config"):
        model.generation_config.no_repeat_ngram_size = 1
    return model.eval()


def make_blip(folder):
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessorPil,
        BlipProcessor,
    )

    count = len(SPECIAL) + len(WORDS)
    text = dict(
        vocab_size=count + 1, hidden_size=16, encoder_hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=64, bos_token_id=count, pad_token_id=0, eos_token_id=3, sep_token_id=3,
    )  # fmt: skip
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    model = randomise(BlipForConditionalGeneration(BlipConfig(text_config=text, vision_config=vision)))
    bias = torch.zeros(count + 1)
    bias[[*range(len(SPECIAL)), count]] = -1e4  # answers are words
    model.text_decoder.cls.predictions.bias.data = bias
    model.text_decoder.cls.predictions.decoder.bias.data = bias
    model.save_pretrained(folder)
    # As on the hub, the tokenizer lacks the last token of the model, with which its answers begin.
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate([*SPECIAL, *WORDS])})
    images = BlipImageProcessorPil(size={"height": 32, "width": 32})
    BlipProcessor(images, tokenizer).save_pretrained(folder)
    return Path(folder)


def make_florence(folder):
    from transformers import (
        CLIPImageProcessorPil,
        Florence2Config,
        Florence2ForConditionalGeneration,
        Florence2Processor,
    )

    special = ["<s>", "[PAD]", "</s>", "[UNK]", "<image>"]
    tokenizer = make_tokenizer(
        special, bos_token="<s>", eos_token="</s>", extra_special_tokens={"image_token": "<image>"}
    )
    text = dict(
        model_type="bart", vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
        decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=128,
        bos_token_id=0, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    vision = dict(
        embed_dim=[4, 4, 8, 8], depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], num_groups=[1, 1, 2, 2], window_size=2,
        projection_dim=16, max_temporal_embeddings=4, max_position_embeddings=10,
    )  # fmt: skip
    config = Florence2Config(
        text_config=text, vision_config=vision, image_token_id=4, pad_token_id=1, bos_token_id=0, eos_token_id=2
    )
    model = randomise(Florence2ForConditionalGeneration(config))
    model.generation_config.suppress_tokens = [*range(len(special))]
    model.save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False)
    images.image_seq_length = 5
    Florence2Processor(images, tokenizer).save_pretrained(folder)
    return Path(folder)


def make_qwen(folder):
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLImageProcessorPil

    special = ["[PAD]", "[UNK]", *QWEN_TOKENS]
    tokenizer = make_tokenizer(special, eos_token="<|im_end|>", additional_special_tokens=QWEN_TOKENS)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in QWEN_TOKENS}
    text = dict(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]}, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=ids["<|im_end|>"], pad_token_id=0,
    )  # fmt: skip
    vision = dict(depth=1, embed_dim=16, hidden_size=16, num_heads=2, mlp_ratio=1, patch_size=8)
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    model = randomise(Qwen2VLForConditionalGeneration(config))
    model.generation_config.suppress_tokens = [*range(len(special))]
    # As the real ones have it: sampling, and several tokens that end an answer.
    model.generation_config.update(do_sample=True, temperature=0.1, eos_token_id=[ids["<|im_end|>"], 0])
    model.save_pretrained(folder)
    tokenizer.chat_template = QWEN_TEMPLATE
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=8, min_pixels=256, max_pixels=4096).save_pretrained(folder)
    return Path(folder)


def make_git(folder):
    from transformers import CLIPImageProcessorPil, GitConfig, GitForCausalLM, GitProcessor

    tokenizer = make_tokenizer(SPECIAL, cls_token="[CLS]", sep_token="[SEP]")
    config = GitConfig(
        vision_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8),
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=128, bos_token_id=2, eos_token_id=3, pad_token_id=0,
    )  # fmt: skip
    model = randomise(GitForCausalLM(config))
    model.generation_config.suppress_tokens = [*range(len(SPECIAL))]
    model.save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    GitProcessor(images, tokenizer).save_pretrained(folder)
    return Path(folder)


VISION = dict(
    hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
)  # fmt: skip
TEXT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)


def make_encoder_decoder(folder):
    """Without a processor of its own, like nlpconnect/vit-gpt2-image-captioning."""
    from transformers import (
        BertConfig,
        VisionEncoderDecoderConfig,
        VisionEncoderDecoderModel,
        ViTConfig,
        ViTImageProcessorPil,
    )

    tokenizer = make_tokenizer(SPECIAL, cls_token="[CLS]", sep_token="[SEP]")
    text = BertConfig(vocab_size=len(tokenizer), intermediate_size=16, max_position_embeddings=64, **TEXT)
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(ViTConfig(**VISION), text)
    named = dict(decoder_start_token_id=2, pad_token_id=0, eos_token_id=3)
    config.update(named)
    model = randomise(VisionEncoderDecoderModel(config))
    model.generation_config.update(suppress_tokens=[*range(len(SPECIAL))], **named)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return Path(folder)


def make_blip2(folder):
    from transformers import (
        Blip2Config,
        Blip2ForConditionalGeneration,
        Blip2Processor,
        BlipImageProcessorPil,
        OPTConfig,
    )

    special = ["[PAD]", "[UNK]", "</s>", "<image>"]
    tokenizer = make_tokenizer(special, bos_token="</s>", eos_token="</s>")
    text = OPTConfig(
        vocab_size=len(tokenizer) + 1, ffn_dim=16, max_position_embeddings=64, word_embed_proj_dim=16, bos_token_id=2,
        eos_token_id=2, pad_token_id=0, **TEXT,
    )  # fmt: skip
    qformer = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    config = Blip2Config(
        vision_config=VISION, qformer_config=qformer | dict(encoder_hidden_size=16, vocab_size=32), text_config=text,
        num_query_tokens=4, image_token_index=3,
    )  # fmt: skip
    model = randomise(Blip2ForConditionalGeneration(config))
    model.generation_config.suppress_tokens = [*range(len(special)), len(tokenizer)]
    model.save_pretrained(folder)
    images = BlipImageProcessorPil(size={"height": 32, "width": 32})
    Blip2Processor(images, tokenizer, num_query_tokens=4).save_pretrained(folder)
    return Path(folder)


def make_llava(folder):
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

    special = ["[PAD]", "[UNK]", "</s>", "<image>"]
    tokenizer = make_tokenizer(special, eos_token="</s>", additional_special_tokens=["<image>"])
    text = LlamaConfig(
        vocab_size=len(tokenizer), intermediate_size=16, num_key_value_heads=1, max_position_embeddings=512, pad_token_id=0,
        eos_token_id=2, bos_token_id=None, **TEXT,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION), text_config=text, image_token_index=3, vision_feature_layer=-1
    )
    model = randomise(LlavaForConditionalGeneration(config))
    model.generation_config.suppress_tokens = [*range(len(special))]
    model.save_pretrained(folder)
    template = QWEN_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>").replace(
        "<|im_end|>", ""
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=template.replace("<|im_start|>", ""),
    ).save_pretrained(folder)  # fmt: skip
    return Path(folder)


def make_qwen3(folder):
    from transformers import Qwen2VLImageProcessorPil, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    special = ["[PAD]", "[UNK]", *QWEN_TOKENS]
    tokenizer = make_tokenizer(special, eos_token="<|im_end|>", additional_special_tokens=QWEN_TOKENS)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in QWEN_TOKENS}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    text = dict(
        vocab_size=len(tokenizer), intermediate_size=16, num_key_value_heads=1, head_dim=8, rope_parameters=rope,
        max_position_embeddings=512, pad_token_id=0, eos_token_id=ids["<|im_end|>"], **TEXT | {"num_hidden_layers": 2},
    )  # fmt: skip
    vision = dict(
        depth=2, hidden_size=16, num_heads=2, intermediate_size=16, patch_size=8, out_hidden_size=16,
        num_position_embeddings=16, deepstack_visual_indexes=[0],
    )  # fmt: skip
    config = Qwen3VLConfig(
        text_config=text, vision_config=vision, image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
    )  # fmt: skip
    model = randomise(Qwen3VLForConditionalGeneration(config))
    model.generation_config.suppress_tokens = [*range(len(special))]
    model.save_pretrained(folder)
    tokenizer.chat_template = QWEN_TEMPLATE
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=8, min_pixels=256, max_pixels=4096).save_pretrained(folder)
    return Path(folder)


TAGS = [
    ("general", 9), ("sensitive", 9), ("1girl", 0), ("blue_sky", 0), ("o_o", 0), ("pink_blossoms", 0), ("mira_(knight)", 4),
    ("red_axe", 0),
]  # fmt: skip


def make_tagger(folder):
    """A tagger whose probabilities are sigmoid(a linear function of the mean colour), for pictures of 32 x 32."""
    import onnx
    from onnx import numpy_helper

    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    weights = np.zeros((3, len(TAGS)), dtype=np.float32)
    # Blue pictures have blue skies; red ones have red axes, pink blossoms and Mira. The channels are blue, green, red.
    weights[0, 3], weights[2, 7], weights[2, 5], weights[2, 6] = 0.04, 0.05, 0.03, 0.02
    bias = np.array([9, 9, 2, -4, 1, -4, -4, -4], dtype=np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["input", "axes"], ["mean"], keepdims=0),
        helper.make_node("Gemm", ["mean", "weights", "bias"], ["logits"]),
        helper.make_node("Sigmoid", ["logits"], ["output"]),
    ]
    constants = {"axes": np.array([1, 2]), "weights": weights, "bias": bias}
    graph = helper.make_graph(
        nodes, "tagger", [helper.make_tensor_value_info("input", float32, ["batch", 32, 32, 3])],
        [helper.make_tensor_value_info("output", float32, ["batch", len(TAGS)])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    Path(folder).mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(Path(folder) / "model.onnx"))
    with open(Path(folder) / "selected_tags.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([("tag_id", "name", "category", "count"), *((i, *tag, 9) for i, tag in enumerate(TAGS))])
    return Path(folder)
