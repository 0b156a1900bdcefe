"""What training asks of a model, and the models that answer."""

from .protocol import Backbone

__all__ = ["Backbone"]
