"""The pictures that the embedded base is trained on: those of the autoencoder, and the captioned drawings of the UNet."""

import multiprocessing
import os
from functools import lru_cache, partial

import numpy as np
from PIL import Image

from .creatures import BUILDS, EYE_COLOURS, FEATURES, MOODS, draw_creature
from .drawings import (
    COLOURS,
    KINDS,
    MOTIFS,
    SUPERSAMPLING,
    WEAPONS,
    decorate_with,
    decorate_with_confetti,
    draw_object,
    draw_scene,
    jittered,
)
from .model import RESOLUTION, all_scenes, captions_of, held_out_scenes
from .weapons import PINKS, WEAPON_POSES, decorate_with_blossoms, draw_backdrop, lit, weapon_shapes


DECORATED = 0.45  # share of the UNet's drawings with dots, stars, hearts, diamonds or flowers on the object


def any_colour(rng):
    """Returns red, green and blue (0 to 255): half of the time a named colour, and otherwise any colour."""
    names = list(COLOURS)
    return tuple(int(c) for c in (rng.integers(0, 256, 3) if rng.random() < 0.5 else COLOURS[str(rng.choice(names))]))


def draw_blossomed(rng):
    """Draws an object with blossoms like the bundled weapons, in any colour.

    About a third of the objects can be of any kind instead of a weapon, and a third of the pictures have blossoms of any
    colour instead of pink ones.
    """
    size = RESOLUTION * SUPERSAMPLING
    image = draw_backdrop(jittered(any_colour(rng), rng), size, rng)
    kind = str(rng.choice(WEAPONS if rng.random() < 0.7 else list(KINDS)))
    shapes = weapon_shapes(kind) if kind in WEAPONS else KINDS[kind]
    colour = jittered(any_colour(rng), rng)
    mask = draw_object(image, shapes, colour, rng, WEAPON_POSES)
    colours = PINKS if rng.random() < 0.65 else rng.integers(30, 256, (2, 3)).astype(float)
    decorate_with_blossoms(image, mask, int(rng.integers(4, 10)), rng, colours)
    return lit(image.resize((RESOLUTION, RESOLUTION), Image.Resampling.BOX), rng)


def draw_any_creature(rng):
    """Draws a creature with random properties."""
    names = list(COLOURS)
    colour = str(rng.choice(names))
    eyes = str(rng.choice(EYE_COLOURS))
    build = str(rng.choice(list(BUILDS)))
    features = FEATURES[rng.integers(len(FEATURES))]
    mood = MOODS[rng.integers(len(MOODS))]
    return draw_creature(colour, eyes, build, features, mood, RESOLUTION, rng)


def draw_for_codec(seed, index):
    """Returns picture `index` of the autoencoder's set, uint8 (H, W, 3): what the bundled datasets show, in any colour."""
    rng = np.random.default_rng([seed, 10, index])
    what = rng.random()
    if what < 0.4:
        image = draw_blossomed(rng)
    elif what < 0.85:
        kind = str(rng.choice(list(KINDS)))
        motif = decorate_with(str(rng.choice(list(MOTIFS))), any_colour(rng))
        decorate = (decorate_with_confetti, motif, None)[0 if what < 0.6 else 1 if what < 0.72 else 2]
        image = draw_scene(kind, any_colour(rng), any_colour(rng), RESOLUTION, rng, decorate=decorate)
    else:
        image = draw_any_creature(rng)
    return np.asarray(image.convert("RGB"))


def crops_of(pictures, count, size, rng):
    """Returns random crops, uint8 (count, size, size, 3), which prefer detail to plain background.

    Crops are rotated by multiples of 90 degrees and flipped, and the colour channels of some are permuted.
    """
    crops = []
    for index in rng.integers(len(pictures), size=count):
        picture, candidates = pictures[index], []
        for _ in range(2 if size < RESOLUTION and rng.random() < 0.6 else 1):
            y, x = rng.integers(0, RESOLUTION - size + 1, 2)
            crop = picture[y : y + size, x : x + size]
            candidates.append((np.abs(np.diff(crop[::2, ::2].astype(np.int16), axis=0)).mean(), y, x))
        _, y, x = max(candidates)
        crop = np.rot90(picture[y : y + size, x : x + size], rng.integers(4))
        crop = crop[:, ::-1] if rng.random() < 0.5 else crop
        crops.append(crop[..., rng.permutation(3)] if rng.random() < 0.3 else crop)
    return np.stack(crops)


@lru_cache(maxsize=1)
def training_scenes(seed):
    """Returns all scenes that are not held out."""
    held_out = set(held_out_scenes(seed))
    return [scene for scene in all_scenes() if scene not in held_out]


def scene_of(seed, index):
    """Returns the `Scene` of drawing `index` of the UNet's set, and the random generator to draw it with."""
    rng = np.random.default_rng([seed, 30, index])
    scenes = training_scenes(seed)
    scene = scenes[rng.integers(len(scenes))]
    if rng.random() < DECORATED:
        other = str(rng.choice([name for name in COLOURS if name not in (scene.colour, scene.background)]))
        scene = scene._replace(decoration=f"{other} {rng.choice(list(MOTIFS))}")
    return scene, rng


def caption_input_ids(tokenizer, seed, count):
    """Returns the input ids of all captions of the UNet's set, five rows per drawing, and of the empty caption at the end."""
    scenes = (scene for scene, _ in (scene_of(seed, i) for i in range(count)))
    captions = [caption for scene in scenes for caption in captions_of(scene)]
    return tokenizer([*captions, ""], padding="max_length", truncation=True, return_tensors="pt").input_ids


def draw_for_unet(seed, index):
    """Returns drawing `index` of the UNet's set, uint8 (H, W, 3)."""
    scene, rng = scene_of(seed, index)
    decorate = None
    if scene.decoration:
        other, motif = scene.decoration.split()
        decorate = decorate_with(motif, COLOURS[other])
    return np.asarray(draw_scene(scene.kind, scene.colour, scene.background, RESOLUTION, rng, decorate=decorate))


def drawn_set(path, draw, seed, count):
    """Returns the pictures `draw(seed, index)` of all indices, uint8 (count, H, W, 3), as a memory map of the file `path`.

    If the file does not exist, all CPU cores draw the pictures.
    """
    if not path.exists():
        print(f"drawing {count} pictures: {path}", flush=True)
        temporary = path.with_suffix(".tmp")
        shape = (count, RESOLUTION, RESOLUTION, 3)
        pictures = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        with multiprocessing.get_context("spawn").Pool() as workers:
            for i, picture in enumerate(workers.imap(partial(draw, seed), range(count), chunksize=16)):
                pictures[i] = picture
        pictures.flush()
        os.replace(temporary, path)
    return np.load(path, mmap_mode="r")
