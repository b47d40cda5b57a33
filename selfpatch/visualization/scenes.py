"""Synthetic scenes for the demo: faintly coloured, patterned objects on a patterned ground, with labels.

    scene = draw_scene(np.random.default_rng(0), 96, 96)        # frames, materials and objects of a still image
    scene = draw_scene(rng, 320, 240, objects=(2, 3), motion=Motion(frames=12, speed=5))        # of a video

A material is one of eight patterns, of random direction, scale, phase and contrast, slightly bent, with a faint tint.
Objects overlap, darken towards their rims and cast shadows. All materials of a scene have nearly the same two greys, so
that pattern and tint tell them apart, and brightness does not.
"""
import math
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np

WAVELENGTHS = (10, 15)  # pixels from one stripe, dot or brick to the next
TINT = 0.12  # largest relative difference of a channel from grey


# ---------------------------------------------------------------- materials: [size, size] of 0 … 1

def noise(rng: np.random.Generator, size: int, scale: float) -> np.ndarray:
    """Smooth noise with lumps of about `scale` pixels, float32 [size, size]."""
    cells = int(size / scale) + 4
    side = max(round(cells * scale), size)
    lumps = cv2.resize(rng.random((cells, cells), dtype=np.float32), (side, side), interpolation=cv2.INTER_CUBIC)
    return lumps[-size:, -size:]


def lattice(rng: np.random.Generator, size: int, wave: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates (u, v) of the pixels in wavelengths, in a random direction and slightly bent."""
    y, x = (axis.astype(np.float32) + wave / 2 * noise(rng, size, 4 * wave) for axis in np.mgrid[:size, :size])
    angle = rng.uniform(0, 2 * math.pi)
    u = (x * math.cos(angle) + y * math.sin(angle)) / wave + rng.uniform()
    v = (y * math.cos(angle) - x * math.sin(angle)) / wave + rng.uniform()
    return u, v


def soft_step(x: np.ndarray, slope: float = 4) -> np.ndarray:
    return 1 / (1 + np.exp(-slope * x))


def wave_of(x: np.ndarray) -> np.ndarray:
    return np.sin(2 * math.pi * x)


def on_lattice(formula: Callable, stretch: float = 1) -> Callable:
    """A material that is bright where formula(u, v) of a lattice's coordinates is positive, and dark elsewhere."""
    return lambda rng, size, wave: soft_step(formula(*lattice(rng, size, stretch * wave)))


def bricks(rng: np.random.Generator, size: int, wave: float) -> np.ndarray:
    u, v = lattice(rng, size, wave)
    to_upright = wave * (1 - 2 * abs((u + np.floor(v)) / 2 % 1 - 0.5))  # pixels to the nearest joint
    to_level = wave * (0.5 - abs(v % 1 - 0.5))
    return soft_step(np.minimum(to_upright, to_level) - 1.3, 2)


def spots(rng: np.random.Generator, size: int, wave: float) -> np.ndarray:
    return soft_step(noise(rng, size, 0.7 * wave) - 0.55, 24)


def cells(rng: np.random.Generator, size: int, wave: float) -> np.ndarray:
    """Distance to the nearest of scattered points, as in a Voronoi diagram."""
    wave, margin = 1.3 * wave, 2 * int(wave)
    count = (size + 2 * margin) // int(wave) + 1
    points = np.indices((count, count)).reshape(2, -1) * wave + rng.uniform(0, 0.8 * wave, (2, count * count))
    canvas = np.ones((size + 2 * margin,) * 2, np.uint8)
    row, column = points.astype(int)
    inside = (row < len(canvas)) & (column < len(canvas))
    canvas[row[inside], column[inside]] = 0
    distance = cv2.distanceTransform(canvas, cv2.DIST_L2, 5)[margin:margin + size, margin:margin + size]
    return (distance / (0.7 * wave)).clip(0, 1)


def plain(rng: np.random.Generator, size: int, wave: float) -> np.ndarray:
    return noise(rng, size, 5 * wave)


PATTERNS = {"stripes": on_lattice(lambda u, v: wave_of(u)),
            "checks": on_lattice(lambda u, v: 2 * wave_of(u) * wave_of(v), stretch=1.5),
            "dots": on_lattice(lambda u, v: wave_of(u) + wave_of(v) - 0.7),
            "zigzag": on_lattice(lambda u, v: wave_of(u + 2 * abs(v / 2 % 1 - 0.5))),
            "bricks": bricks, "spots": spots, "cells": cells, "plain": plain}
NAMES, MATERIALS = tuple(PATTERNS), tuple(PATTERNS.values())


# ---------------------------------------------------------------- scenes

def surface(rng: np.random.Generator, size: int, material: int, greys: tuple[float, float]) -> np.ndarray:
    """A square of a material in roughly two greys, lit from one side, float32 [size, size] in 0 … 255."""
    pattern = MATERIALS[material](rng, size, rng.uniform(*WAVELENGTHS))
    low, high = rng.permutation(greys) + rng.uniform(-12, 12, 2)
    y, x = np.mgrid[:size, :size] / size - 0.5
    angle = rng.uniform(0, 2 * math.pi)
    light = 1 + rng.uniform(0, 0.5) * (x * math.cos(angle) + y * math.sin(angle))
    return ((low + (high - low) * pattern) * light).astype(np.float32)


def draw_tints(rng: np.random.Generator) -> np.ndarray:
    """Factors on red, green and blue for each material of a scene, float32 [materials, 3]."""
    hues = 2 * math.pi * np.arange(len(MATERIALS)) / len(MATERIALS) + rng.uniform(-0.15, 0.15, len(MATERIALS))
    return np.float32(1 + TINT * np.cos(hues[:, None] - 2 * math.pi / 3 * np.arange(3)))


class Scene(NamedTuple):
    """Frames [T, H, W, 3]; each pixel's material, an index of NAMES, and object, 0 for the ground [T, H, W]; uint8."""
    frames: np.ndarray
    materials: np.ndarray
    objects: np.ndarray


class Motion(NamedTuple):
    """Number of frames; highest speed of an object in pixels per frame in each direction; change of light.

    light is the phase in radians by which the brightness of the light advances with each frame; 0 keeps it constant.
    """
    frames: int = 1
    speed: float = 0
    light: float = 0


STILL = Motion()


class Blob:
    """An object with a wavy outline, a material, a position, a speed and a spin.

    Args:
        radius: smallest and largest mean radius in pixels.
        speed: highest speed in pixels per frame, in each direction.
    """

    def __init__(self, rng: np.random.Generator, frame_size: tuple[int, int], radius: tuple[float, float],
                 material: int, greys: tuple[float, float], speed: float):
        self.material, r = material, rng.uniform(*radius)
        self.position = rng.uniform(0.15, 0.85, 2) * frame_size
        self.velocity = rng.uniform(-speed, speed, 2)
        self.angle, self.spin = rng.uniform(0, 360), rng.uniform(-3.5, 3.5)  # degrees
        size = int(2.8 * r)
        angle = np.linspace(0, 2 * math.pi, 80, endpoint=False)
        outline = r * (1 + rng.uniform(0.05, 0.3) * np.cos(rng.integers(2, 6) * angle))
        points = size / 2 + np.stack([outline * np.cos(angle), outline * np.sin(angle)], axis=-1)
        self.stencil = np.zeros((size, size), np.uint8)
        cv2.fillPoly(self.stencil, [(16 * points).astype(np.int32)], 255, cv2.LINE_AA, shift=4)
        from_rim = cv2.distanceTransform(self.stencil, cv2.DIST_L2, 5) / r
        self.surface = surface(rng, size, material, greys) * (0.65 + 0.35 * (2.5 * from_rim).clip(0, 1))

    def paint(self, frame: np.ndarray, materials: np.ndarray, objects: np.ndarray, number: int, time: int) -> None:
        """Draw the object and its shadow into a frame, float32 [H, W], and the object into the frame's labels."""
        height, width = frame.shape
        middle = len(self.stencil) / 2
        move = cv2.getRotationMatrix2D((middle, middle), self.angle + self.spin * time, 1)
        move[:, 2] += self.position + self.velocity * time - middle
        stencil = cv2.warpAffine(self.stencil, move, (width, height))
        shadow = cv2.warpAffine(self.stencil, move + [[0, 0, 3], [0, 0, 4]], (width, height))
        frame *= 1 - 0.35 / 255 * cv2.GaussianBlur(shadow, (0, 0), 4)
        share = stencil / np.float32(255)
        frame += share * (cv2.warpAffine(self.surface, move, (width, height)) - frame)
        materials[stencil > 127], objects[stencil > 127] = self.material, number


def draw_scene(rng: np.random.Generator, width: int, height: int, objects: tuple[int, int] = (1, 3),
               radius: tuple[float, float] = (16, 32), motion: Motion = STILL, ground: int | None = None) -> Scene:
    """Draw a scene of one or several frames.

    Args:
        width, height: of the frames in pixels.
        objects: smallest and largest number of objects.
        radius: smallest and largest mean radius of an object in pixels.
        ground: material of the ground; default: a random one. Objects have materials of their own.
    """
    middle, contrast = rng.uniform(95, 160), rng.uniform(30, 60)
    greys = middle - contrast, middle + contrast
    order = rng.permutation(len(MATERIALS))
    if ground is not None:
        order = np.r_[ground, order[order != ground]]
    background = surface(rng, max(width, height), order[0], greys)[:height, :width]
    blobs = [Blob(rng, (width, height), radius, material, greys, motion.speed)
             for material in order[1:1 + rng.integers(objects[0], objects[1] + 1)]]
    phase, tints, drawn = rng.uniform(0, 2 * math.pi), draw_tints(rng), []
    for time in range(motion.frames):
        frame, labels = background.copy(), np.zeros((2, height, width), np.uint8)
        labels[0] = order[0]
        for number, blob in enumerate(blobs, 1):
            blob.paint(frame, *labels, number, time)
        if motion.light:
            frame *= 0.8 + 0.2 * math.cos(phase + motion.light * time)
        frame += rng.normal(0, 6, frame.shape)
        coloured = frame[..., None] * tints[labels[0]]
        drawn.append((coloured.clip(0, 255).astype(np.uint8), *labels))
    return Scene(*map(np.stack, zip(*drawn, strict=True)))
