"""Scenes of simple shapes, drawn: pictures with features, captions, questions and statements, in
files that `lxscale shards build` reads. A pure function of a seed.

scene       things on a picture, drawn for what is to be true of them
sentences   captions, and questions whose answers are balanced
statements  statements over two pictures, true of as many pairs as they are false of
picture     a scene as pixels, and its regions as a detector would give them
write       the files of all splits, whole or not at all
prior       what the questions alone give away
"""

from shards.sources.scenes.prior import Prior, language_prior
from shards.sources.scenes.write import SceneSettings, Written, write_scenes

__all__ = ["Prior", "SceneSettings", "Written", "language_prior", "write_scenes"]
