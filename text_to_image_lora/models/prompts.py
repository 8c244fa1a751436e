"""Captions become a condition: tokens, in chunks where they are long, and what the text encoders make of them."""

import contextlib
import functools
import hashlib
import itertools
import json
import math

from ..errors import InputError
from .modules import evaluating, weights_identity


MOST_CHUNKS = 10  # for which memory and time of a step still make sense


def tokenize(tokenizer, captions, num_chunks=1):
    """Token ids (N x num_chunks, model_max_length), padded; what doesn't fit into them is cut.

    A chunk has the start and end tokens around its part of the caption, as A1111's web UI divides long prompts.
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
    """How many tokens each caption of each list has, start and end counted; those of a thousand are held at a time."""
    captions = [caption for group in caption_lists for caption in group]
    counts = itertools.chain.from_iterable(
        map(len, tokenizer(captions[start : start + 1000]).input_ids) for start in range(0, len(captions), 1000)
    )
    return [list(itertools.islice(counts, len(group))) for group in caption_lists]


def chunks_needed(tokenizer, num_tokens):
    """How many chunks hold a caption of that many tokens, the start and end ones counted."""
    return max(1, math.ceil((num_tokens - 2) / (tokenizer.model_max_length - 2)))


def choose_num_chunks(tokenizer, token_counts, sources, *, long_prompts):
    """(how many chunks of tokens each prompt is encoded in, a line on captions that are longer than one, or None).

    `token_counts` is what `count_tokens` gave, and `sources` names the picture of each of its lists. With `long_prompts`
    all prompts of a run get as many chunks as the longest needs, so that they fit into one batch; more than `MOST_CHUNKS`
    is an `InputError`.
    """
    limit = tokenizer.model_max_length
    long = [index for index, counts in enumerate(token_counts) for count in counts if count > limit]
    if not long_prompts:
        cut = (
            f"{len(long)} captions have more than {limit} tokens, and what follows is cut (--long_prompts reads them whole); "
            f"the first: {sources[long[0]] if long else None}"
        )
        return 1, cut if long else None
    longest, most = max(((i, count) for i, counts in enumerate(token_counts) for count in counts), key=lambda x: x[1])
    num_chunks = chunks_needed(tokenizer, most)
    if num_chunks > MOST_CHUNKS:
        raise InputError(
            f"{sources[longest]}: its caption of {most} tokens would make every prompt {num_chunks} chunks long. Shorten it "
            f"({MOST_CHUNKS} chunks are the limit), or leave --long_prompts out."
        )
    whole = f"{len(long)} captions have more than {limit} tokens; every prompt is encoded in {num_chunks} chunks"
    return num_chunks, whole if num_chunks > 1 else None


def encode_prompts(tokenizer, text_encoder, captions, clip_skip=None, num_chunks=1):
    """Hidden states (N, 77 x num_chunks, D) that the UNet attends to; `clip_skip` leaves out that many last layers.

    With `clip_skip` as in diffusers' `encode_prompt`: the final layer norm still applies. Gradients are as the caller has
    them; the text encoder may be in a wrapper for several processes.
    """
    inner = getattr(text_encoder, "module", text_encoder)
    output = text_encoder(tokenize(tokenizer, captions, num_chunks).to(inner.device), output_hidden_states=True)
    hidden_states = output[0]
    if clip_skip is not None:
        norm = getattr(inner, "text_model", inner).final_layer_norm
        # In mixed precision the text encoder's wrapper makes float32 of what it returns.
        hidden_states = norm(output.hidden_states[-(clip_skip + 1)].to(norm.weight.dtype))
    return hidden_states.reshape(len(captions), -1, hidden_states.shape[-1])


def encode_penultimate(tokenizer, text_encoder, captions, clip_skip=None, num_chunks=1):
    """(hidden states of the last layer but one (N, 77 x num_chunks, D), what the model returns first of chunk one (N, ...)).

    As the pipeline of Stable Diffusion XL has it: no layer norm follows, and `clip_skip` leaves out so many more. What a
    `CLIPTextModelWithProjection` returns first is the embedding of the whole caption (N, P).
    """
    inner = getattr(text_encoder, "module", text_encoder)
    output = text_encoder(tokenize(tokenizer, captions, num_chunks).to(inner.device), output_hidden_states=True)
    hidden_states = output.hidden_states[-2 - (clip_skip or 0)]
    return hidden_states.reshape(len(captions), -1, hidden_states.shape[-1]), output[0][::num_chunks]


def text_identity(tokenizer, text_encoder):
    """A hash of what turns a caption into hidden states: the tokenizer and the text encoder."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules |= {"padding": None, "truncation": None}  # as the last call left them
    rules = [json.dumps(rules), tokenizer.pad_token_id, tokenizer.model_max_length]
    digest = hashlib.sha256(json.dumps([*rules, weights_identity(text_encoder)]).encode())
    return digest.hexdigest()[:32]


class PromptEncoder:
    """Captions become conditions (see `families.py`), in the same way for a whole run.

    `num_chunks` and `clip_skip` are as in `encode_prompts`; `autocast` is entered where the text encoders are in training,
    since their LoRA is float32.
    """

    def __init__(
        self, family, tokenizers, text_encoders, *, clip_skip, num_chunks, dtype, autocast=contextlib.nullcontext
    ):
        self.family, self.tokenizers, self.text_encoders = family, tokenizers, text_encoders
        self.clip_skip, self.num_chunks, self.dtype, self.autocast = clip_skip, num_chunks, dtype, autocast

    def __call__(self, captions, *, with_clip_skip=True):
        """The condition in the run's precision, a row a caption, without gradients."""
        import torch

        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            for text_encoder in self.text_encoders:
                stack.enter_context(evaluating(text_encoder))
            return self.in_training(self.text_encoders, captions, with_clip_skip=with_clip_skip)

    def in_training(self, text_encoders, captions, *, with_clip_skip=True):
        """The condition in the run's precision, with gradients; the text encoders as each process wraps them."""
        with self.autocast():
            condition = self.family.encode(
                self.tokenizers, text_encoders, captions,
                clip_skip=self.clip_skip if with_clip_skip else None, num_chunks=self.num_chunks,
            )  # fmt: skip
        return {name: value.to(self.dtype) for name, value in condition.items()}

    @functools.cached_property
    def identity(self):
        """A hash of all that a caption's condition depends on, but its dtype."""
        pairs = zip(self.tokenizers, self.text_encoders, strict=True)
        parts = [text_identity(tokenizer, text_encoder) for tokenizer, text_encoder in pairs]
        return hashlib.sha256(json.dumps([*parts, self.num_chunks, self.clip_skip]).encode()).hexdigest()[:32]
