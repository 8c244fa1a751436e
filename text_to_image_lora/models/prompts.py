"""Encodes captions: tokens, in chunks if they are long, and the hidden states of the text encoders."""

import contextlib
import functools
import hashlib
import itertools
import json
import math

from ..errors import InputError
from .modules import evaluating, weights_identity
from .settings import MOST_CHUNKS


def tokenize(tokenizer, captions, num_chunks=1):
    """Tokenizes captions to padded, truncated token ids (N x num_chunks, model_max_length).

    Each chunk has start and end tokens around its part of the caption, as in A1111's web UI.
    """
    import torch

    if num_chunks == 1:
        return tokenizer(
            captions, max_length=tokenizer.model_max_length, padding="max_length", truncation=True, return_tensors="pt"
        ).input_ids
    body, rows = tokenizer.model_max_length - 2, []
    for ids in tokenizer(captions, add_special_tokens=False).input_ids:
        for chunk in range(num_chunks):
            part = ids[body * chunk : body * (chunk + 1)]
            padding = [tokenizer.pad_token_id] * (body - len(part))
            rows.append([tokenizer.bos_token_id, *part, tokenizer.eos_token_id, *padding])
    return torch.tensor(rows)


def count_tokens(tokenizer, caption_lists):
    """Counts the tokens of each caption of each list, with start and end token, a thousand captions at a time."""
    captions = [caption for group in caption_lists for caption in group]
    counts = itertools.chain.from_iterable(
        map(len, tokenizer(captions[start : start + 1000]).input_ids) for start in range(0, len(captions), 1000)
    )
    return [list(itertools.islice(counts, len(group))) for group in caption_lists]


def chunks_needed(tokenizer, num_tokens):
    """Returns the number of chunks for a caption of `num_tokens` tokens, which include the start and end token."""
    return max(1, math.ceil((num_tokens - 2) / (tokenizer.model_max_length - 2)))


def choose_num_chunks(tokenizer, token_counts, sources, *, long_prompts):
    """Returns the number of chunks for all prompts of a run, and a message about long captions or None.

    `token_counts` is the result of `count_tokens`, and `sources` names the picture of each of its lists. With
    `long_prompts`, all prompts get as many chunks as the longest one needs, so that they fit into one batch; more than
    `MOST_CHUNKS` is an `InputError`.
    """
    limit = tokenizer.model_max_length
    long = [index for index, counts in enumerate(token_counts) for count in counts if count > limit]
    if not long_prompts:
        cut = (
            f"{len(long)} captions have more than {limit} tokens and are truncated (--long_prompts reads them completely); "
            f"the first: {sources[long[0]] if long else None}"
        )
        return 1, cut if long else None
    longest, most = max(((i, count) for i, counts in enumerate(token_counts) for count in counts), key=lambda x: x[1])
    num_chunks = chunks_needed(tokenizer, most)
    if num_chunks > MOST_CHUNKS:
        raise InputError(
            f"{sources[longest]}: its caption of {most} tokens would make every prompt {num_chunks} chunks long. Shorten it "
            f"(the limit is {MOST_CHUNKS} chunks), or remove --long_prompts."
        )
    whole = f"{len(long)} captions have more than {limit} tokens; every prompt is encoded in {num_chunks} chunks"
    return num_chunks, whole if num_chunks > 1 else None


def encode_prompts(tokenizer, text_encoder, captions, clip_skip=None, num_chunks=1):
    """Encodes captions to the hidden states (N, 77 x num_chunks, D) that the UNet attends to.

    `clip_skip` leaves out that many last layers, but not the final layer norm, as in diffusers' `encode_prompt`. The caller
    decides on gradients; the text encoder may be wrapped for several processes.
    """
    inner = getattr(text_encoder, "module", text_encoder)
    output = text_encoder(tokenize(tokenizer, captions, num_chunks).to(inner.device), output_hidden_states=True)
    hidden_states = output[0]
    if clip_skip is not None:
        norm = getattr(inner, "text_model", inner).final_layer_norm
        # In mixed precision, Accelerate's wrapper casts the outputs of the text encoder to float32.
        hidden_states = norm(output.hidden_states[-(clip_skip + 1)].to(norm.weight.dtype))
    return hidden_states.reshape(len(captions), -1, hidden_states.shape[-1])


def encode_penultimate(tokenizer, text_encoder, captions, clip_skip=None, num_chunks=1):
    """Encodes captions to penultimate hidden states (N, 77 x num_chunks, D) and the first output for the first chunk.

    As in the pipeline of Stable Diffusion XL, no layer norm is applied, and `clip_skip` leaves out that many more layers.
    The first output of a `CLIPTextModelWithProjection` is the pooled embedding (N, P).
    """
    inner = getattr(text_encoder, "module", text_encoder)
    output = text_encoder(tokenize(tokenizer, captions, num_chunks).to(inner.device), output_hidden_states=True)
    hidden_states = output.hidden_states[-2 - (clip_skip or 0)]
    return hidden_states.reshape(len(captions), -1, hidden_states.shape[-1]), output[0][::num_chunks]


def text_identity(tokenizer, text_encoder):
    """Returns a hash of the tokenizer and the text encoder."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules |= {"padding": None, "truncation": None}  # the state left by the last call
    rules = [json.dumps(rules), tokenizer.pad_token_id, tokenizer.model_max_length]
    digest = hashlib.sha256(json.dumps([*rules, weights_identity(text_encoder)]).encode())
    return digest.hexdigest()[:32]


def vocabulary_identity(tokenizer):
    """Returns a hash of the words of a tokenizer and their numbers, which does not depend on the library's version."""
    words = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps([words, tokenizer.model_max_length]).encode()).hexdigest()[:16]


class PromptEncoder:
    """Encodes captions to conditions (see `families.py`) for a whole run.

    `num_chunks` and `clip_skip` are those of `encode_prompts`. `autocast` makes the context for text encoders in training,
    whose LoRA is float32.
    """

    def __init__(
        self, family, tokenizers, text_encoders, *, clip_skip, num_chunks, dtype, autocast=contextlib.nullcontext
    ):
        self.family = family
        self.tokenizers = tokenizers
        self.text_encoders = text_encoders
        self.clip_skip = clip_skip
        self.num_chunks = num_chunks
        self.dtype = dtype
        self.autocast = autocast

    def __call__(self, captions, *, with_clip_skip=True):
        """Returns the condition in the precision of the run, with a row per caption, without gradients."""
        import torch

        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for text_encoder in self.text_encoders:
                stack.enter_context(evaluating(text_encoder))
            return self.in_training(self.text_encoders, captions, with_clip_skip=with_clip_skip)

    def in_training(self, text_encoders, captions, *, with_clip_skip=True):
        """Returns the condition in the precision of the run, with gradients; the text encoders may be wrapped."""
        with self.autocast():
            condition = self.family.encode(
                self.tokenizers, text_encoders, captions,
                clip_skip=self.clip_skip if with_clip_skip else None, num_chunks=self.num_chunks,
            )  # fmt: skip
        return {name: value.to(self.dtype) for name, value in condition.items()}

    @functools.cached_property
    def identity(self):
        """A hash of everything except the dtype that the condition of a caption depends on."""
        pairs = zip(self.tokenizers, self.text_encoders, strict=True)
        parts = [text_identity(tokenizer, text_encoder) for tokenizer, text_encoder in pairs]
        return hashlib.sha256(json.dumps([*parts, self.num_chunks, self.clip_skip]).encode()).hexdigest()[:32]
