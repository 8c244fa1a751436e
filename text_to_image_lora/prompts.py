"""Captions become what the UNet attends to: tokens, in chunks where they are long, and the text encoder's hidden states."""

import math

from .errors import InputError


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


def count_tokens(tokenizer, captions):
    """How many tokens each caption has, start and end counted; the tokens of a thousand are held at a time."""
    counts = []
    for start in range(0, len(captions), 1000):
        counts += map(len, tokenizer(captions[start : start + 1000]).input_ids)
    return counts


def chunks_needed(tokenizer, num_tokens):
    """How many chunks hold a caption of that many tokens, the start and end ones counted."""
    return max(1, math.ceil((num_tokens - 2) / (tokenizer.model_max_length - 2)))


def choose_num_chunks(tokenizer, caption_lists, sources, *, long_prompts, say):
    """How many chunks of tokens each prompt is encoded in; says how many captions are longer than one.

    With `long_prompts` all prompts of a run get as many as the longest needs, so that they fit into one batch; more than
    `MOST_CHUNKS` is an `InputError`. `sources` names the picture of each list of captions.
    """
    owners = [index for index, group in enumerate(caption_lists) for _ in group]
    lengths = count_tokens(tokenizer, [caption for group in caption_lists for caption in group])
    limit = tokenizer.model_max_length
    long = [owner for owner, length in zip(owners, lengths, strict=True) if length > limit]
    if not long_prompts:
        if long:
            say(
                f"{len(long)} captions have more than {limit} tokens, and what follows is cut (--long_prompts reads "
                f"them whole); the first: {sources[long[0]]}"
            )
        return 1
    num_chunks = chunks_needed(tokenizer, max(lengths))
    if num_chunks > MOST_CHUNKS:
        raise InputError(
            f"{sources[owners[lengths.index(max(lengths))]]}: its caption of {max(lengths)} tokens would make every "
            f"prompt {num_chunks} chunks long. Shorten it ({MOST_CHUNKS} chunks are the limit), or leave --long_prompts "
            "out."
        )
    if num_chunks > 1:
        say(f"{len(long)} captions have more than {limit} tokens; every prompt is encoded in {num_chunks} chunks")
    return num_chunks


def encode_prompts(tokenizer, text_encoder, captions, clip_skip=None, num_chunks=1):
    """Hidden states (N, 77 x num_chunks, D) that the UNet attends to; `clip_skip` leaves out that many last layers.

    With `clip_skip` as in diffusers' `encode_prompt`: the final layer norm still applies.
    """
    import torch

    with torch.no_grad():
        ids = tokenize(tokenizer, captions, num_chunks).to(text_encoder.device)
        output = text_encoder(ids, output_hidden_states=True)
        hidden_states = output[0]
        if clip_skip is not None:
            inner = getattr(text_encoder, "text_model", text_encoder)
            hidden_states = inner.final_layer_norm(output.hidden_states[-(clip_skip + 1)])
        return hidden_states.reshape(len(captions), -1, hidden_states.shape[-1])
