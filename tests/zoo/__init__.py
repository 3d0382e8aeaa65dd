"""The zoo: small instances of public architectures, random weights, no download.

Every table maps a name to a factory `() -> (model, example_inputs)`: `plain_cnn` and `plain_vit` are
families of image models in our own words, `hf` tiny configurations of transformers, `graph` models of
torch_geometric, `libraries` torchvision and timm taken as they are where they can be imported.
"""

from . import libraries as libraries  # first: makes torchvision importable, which transformers looks for
