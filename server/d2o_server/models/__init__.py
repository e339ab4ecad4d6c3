"""From a ``--model`` value to weights that can be served: where they come from, what they are, whether they fit."""
