"""`PrunedModelHubMixin`: any module that is saved and loaded as the hub does, dense or pruned.

class Net(nn.Module, PrunedModelHubMixin): …     in place of huggingface_hub's PyTorchModelHubMixin

cp.save_pretrained(controller, "small")          config.json; model.safetensors, with the widths in its header
small = Net.from_pretrained("small")
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import PyTorchModelHubMixin, constants
from safetensors import safe_open
from safetensors.torch import save_model

from ..state.files import replacing
from ..state.saver import KEY, remembered
from ..state.widths import narrow

__all__ = ["PrunedModelHubMixin"]


class PrunedModelHubMixin(PyTorchModelHubMixin):
    """huggingface_hub's mixin, for models whose widths are not those that the class makes."""

    def _save_pretrained(self, save_directory: Path) -> None:
        widths = remembered(self)  # type: ignore[arg-type]
        metadata = {KEY: json.dumps(widths)} if widths else None
        with replacing(save_directory / constants.SAFETENSORS_SINGLE_FILE) as part:
            save_model(self, str(part), metadata=metadata)  # type: ignore[arg-type]

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        with safe_open(model_file, framework="pt") as file:
            metadata = file.metadata() or {}
        if KEY in metadata:
            widths = json.loads(metadata[KEY])
            narrow(model, widths)
            setattr(model, KEY, widths)
        return super()._load_as_safetensor(model, model_file, map_location, strict)
