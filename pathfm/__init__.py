"""pathfm: self-supervised pretraining of vision transformers for computational pathology."""

__version__ = "0.1.0"
